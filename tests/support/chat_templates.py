# ruff: noqa: RUF001  (the tokens of DeepSeek have full-width bars)
"""Chat templates as those of released models are, on a small tokenizer, and the oracle: transformers' own rendering."""

from __future__ import annotations

from typing import Any

from conftest import SENTENCES

from otpo.models.fresh import make_tokenizer

# As Qwen2.5's: a default system prompt, tools in the system turn, calls and their results in tags.
CHATML_TOOLS = """
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{% else %}{{- 'You are a helpful assistant.' }}
{%- endif %}
{{- "\n\n# Tools\n<tools>" }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "system" and not loop.first)
    or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == "assistant" %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' + (tool_call.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# As Llama 3's: BOS in the template, contents trimmed, an end of turn that is not the EOS of the base tokenizer.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# As DeepSeek R1's: thoughts are taken out of every answer; `think` opens one for the answer to come.
R1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}THINK{% endif %}"
)
R1_STRIPS = R1.replace("THINK", "")
R1_OPENS = R1.replace("THINK", "{{ '<think>\\n' }}")

# As Qwen3's: thoughts of the last answer stay, an empty one is put before an answer without, or into the prompt.
QWEN3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% set content = message.content %}"
    "{% set thought = message.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)

# As Qwen3-Thinking's and QwQ's: the prompt opens a thought, which the rendered answer has too.
QWEN3_OPENS = QWEN3.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}", "{% if true %}"
).replace("{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}", "{{ '<think>\n' }}{% endif %}{% endif %}")

# As Gemma's: no system role, strict turns, the assistant is called model.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# As Mistral's: the system prompt inside the user's turn, a space before the answer, EOS after it.
MISTRAL = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last or loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

SPECIAL = (
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",
    "<start_of_turn>", "<end_of_turn>", "<tool_call>", "</tool_call>",
)  # fmt: skip


def tokenizer_with(chat_template: str | None) -> Any:
    """A small tokenizer that knows the special tokens of all templates here, with one of them."""
    tokenizer = make_tokenizer(SENTENCES, vocab_size=600)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = chat_template
    return tokenizer


def rendered(tokenizer: Any, messages: list[dict], **settings: Any) -> list[int]:
    """The oracle: transformers' own ids of messages."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)


def assert_rendered(tokenizer: Any, item: Any, prompt: list[dict], *completions: dict, **settings: Any) -> None:
    """The ids of a pair or a completion are those that transformers makes of the messages.

    White space after the end of turn, which is never generated, is not trained.
    """
    sides = [item.chosen_ids, item.rejected_ids] if len(completions) == 2 else [item.completion_ids]
    assert item.prompt_ids == rendered(tokenizer, prompt, add_generation_prompt=True, **settings)
    for ids, completion in zip(sides, completions, strict=True):
        whole = rendered(tokenizer, [*prompt, completion], **settings)
        ours = item.prompt_ids + ids
        assert ours == whole[: len(ours)]
        assert not tokenizer.decode(whole[len(ours) :]).strip()

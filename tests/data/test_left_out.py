"""What a chat template leaves out of a prompt or an answer leaves the row out, whoever says it."""

import pytest
from support.chat_templates import CHATML_TOOLS, GEMMA, QWEN3, R1_STRIPS, assert_rendered, tokenizer_with
from support.published_rows import assistant, user

from otpo.data.tokens import tokenize_pairs
from otpo.errors import UserError

ASK = user("Where does the train leave?")
AGAIN = user("Sure?")


def row(*prompt, chosen="From the third.", **columns):
    chosen = [assistant(chosen)] if isinstance(chosen, str) else [chosen]
    return {"prompt": list(prompt), "chosen": chosen, "rejected": [assistant("No idea.")], **columns}


def called(*arguments):
    calls = [{"type": "function", "function": {"name": "board", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def refused(rows, template, **settings):
    with pytest.raises(UserError) as error:
        tokenize_pairs(rows, tokenizer_with(template), **settings)
    return str(error.value)


@pytest.mark.parametrize("role", ["function", "ipython", "assitant", "tool", "context"])
def test_messages_of_roles_that_the_template_does_not_know_are_not_dropped(role):
    template = R1_STRIPS if role in ("tool", "context") else CHATML_TOOLS
    said = refused([row(ASK, {"role": role, "content": "It is three."}, AGAIN)], template)
    assert f"the chat template leaves out or changes a message of the {role}" in said


def test_earlier_answers_are_not_dropped_and_their_thoughts_may_be():
    drops = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
        "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    prompt = [ASK, assistant("The third."), AGAIN]
    assert "leaves out or changes a message of the assistant" in refused([row(*prompt)], drops)
    thought = [ASK, assistant("<think>\nHm.\n</think>\n\nThe third."), AGAIN]
    (pair,), _ = tokenize_pairs([row(*thought)], tokenizer_with(R1_STRIPS))
    assert_rendered(tokenizer_with(R1_STRIPS), pair, thought, assistant("From the third."), assistant("No idea."))


def test_a_message_that_says_what_another_says_is_missed_too():
    drops = CHATML_TOOLS.replace('message.role == "tool"', "false")
    said = refused([row(user("It is three."), {"role": "tool", "content": "three"}, AGAIN)], drops)
    assert "leaves out or changes a message of the tool" in said


FIRST_ONLY = CHATML_TOOLS.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
EMPTY = CHATML_TOOLS.replace("(tool_call.arguments | tojson)", "'{}'")


@pytest.mark.parametrize(
    ("template", "arguments"),
    [(FIRST_ONLY, ({"x": 1}, {"x": 7})), (FIRST_ONLY, ({}, {})), (EMPTY, ({"to": {"city": "Rome"}},)),
     (EMPTY, ({"platforms": [3]},)), (EMPTY, ({"late": True},))],
)  # fmt: skip
def test_calls_and_arguments_of_any_kind_are_not_dropped(template, arguments):
    assert "leaves out tool calls" in refused([row(ASK, called(*arguments), AGAIN)], template)
    assert "a tool call is left out" in refused([row(ASK, chosen=called(*arguments))], template)
    tokenizer = tokenizer_with(CHATML_TOOLS)
    (pair,), _ = tokenize_pairs([row(ASK, chosen=called(*arguments))], tokenizer)
    assert_rendered(tokenizer, pair, [ASK], called(*arguments), assistant("No idea."))


def test_results_that_a_template_writes_as_json_are_no_loss():
    template = CHATML_TOOLS.replace("'<|im_start|>user\n<tool_response>\n' + message.content",
        "'<|im_start|>user\n<tool_response>\n' + (message.content | tojson)")  # fmt: skip
    prompt = [ASK, called({"x": 1}), {"role": "tool", "content": 'He said "drei" ü\nIt is.'}]
    (pair,), _ = tokenize_pairs([row(*prompt)], tokenizer_with(template))
    assert_rendered(tokenizer_with(template), pair, prompt, assistant("From the third."), assistant("No idea."))


@pytest.mark.parametrize("key", ["attachments", "images", "context", "tools"])
def test_keys_of_a_message_beside_its_content_are_not_dropped(key):
    said = refused([row({**ASK, key: ["The board says three."]})], CHATML_TOOLS)
    assert f"the chat template leaves out {key} of a message" in said


@pytest.mark.parametrize("name", ["add_generation_prompt", "tools", "messages"])
def test_how_a_conversation_is_rendered_is_no_variable_of_the_template(name):
    assert f"{name} is no variable of a chat template" in refused([row(ASK)], QWEN3, chat_template_kwargs={name: True})
    assert f"has no variable {name}" in refused([row(ASK, chat_template_kwargs={name: True})], QWEN3)


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": parameters}}}


NONE_KNOWN = "{{ '<|im_start|>system\nYou have no tools.<|im_end|>\n' }}" + QWEN3
BESIDE_SYSTEM = "{% if tools and messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}" + QWEN3
FIRST_TOOL = "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + QWEN3
NAMES_ONLY = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + QWEN3


@pytest.mark.parametrize("template", [NONE_KNOWN, BESIDE_SYSTEM, FIRST_TOOL, NAMES_ONLY])
def test_tools_and_parameters_that_the_template_does_not_show_are_not_dropped(template):
    tools = [tool("board", station={}), tool("clock", zone={"type": "string"})]
    said = refused([row(ASK, tools=tools)], template, rewritten="template")
    assert "the chat template leaves out tools (data.columns: {tools: null} leaves the column out)" in said
    all_shown = "{% if tools %}{{ tools | tojson }}{% endif %}" + QWEN3
    assert len(tokenize_pairs([row(ASK, tools=tools)], tokenizer_with(all_shown), rewritten="template")[0]) == 1


PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_opens_an_answer_whether_asked_or_not_is_refused():
    """It opens one behind the trained answer too, and the model would learn to go on with it."""
    always = PLAIN.replace("{% if add_generation_prompt %}", "{% if true %}")
    said = refused([row(ASK)], always)
    assert "begins another answer behind each answer" in said and "{% if add_generation_prompt %}" in said
    ended = PLAIN + "{% if not add_generation_prompt %}{{ '<|eot_id|>' }}{% endif %}"
    for template in (PLAIN, ended):  # the end of a conversation may be another than that of an answer
        tokenizer = tokenizer_with(template)
        (pair,), _ = tokenize_pairs([row(ASK)], tokenizer)
        assert_rendered(tokenizer, pair, [ASK], assistant("From the third."), assistant("No idea."))


def test_a_refused_system_prompt_comes_with_a_way_out():
    system = {"role": "system", "content": "Be brief."}
    said = refused([row(system, ASK)], GEMMA)
    assert "System role not supported (write the system prompt into the user's message" in said
    assert "data.columns: {system: null}" in said
    assert "system prompt" not in refused([row(ASK, ASK)], GEMMA)

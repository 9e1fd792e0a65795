"""One meaning of a template: rows, a model alone and a whole run are rendered by the same rule and to the same ids."""

import json

import pytest
from conftest import SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from support.chat_templates import CHATML_TOOLS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.tasks import load_task
from otpo.data.convert import convert
from otpo.data.encoder import encode_prompt
from otpo.data.template import (
    FILE,
    Choice,
    Rendering,
    as_trained,
    has_chat_template,
    of_model,
    of_run,
    template_of,
    trained_kwargs,
    trained_with,
    write_template,
)
from otpo.data.tokens import tokenize_completions, tokenize_outputs, tokenize_pairs
from otpo.errors import UserError
from otpo.models.fresh import make_tokenizer

STRINGS = {"prompt": "Where does the train leave?", "chosen": " From the third.", "rejected": " No idea."}
MESSAGES = {
    "prompt": [{"role": "user", "content": "Where does the train leave?"}],
    "chosen": [{"role": "assistant", "content": "From the third."}],
    "rejected": [{"role": "assistant", "content": "No idea."}],
}


def with_bos_and_chat() -> PreTrainedTokenizerFast:
    return make_tokenizer(SENTENCES, vocab_size=600)


def without_bos() -> PreTrainedTokenizerFast:
    """As Llama 2's, where spaces belong to the next piece; neither BOS nor a chat template of its own."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"]))
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template + "{% if add_generation_prompt %}[assistant]{% endif %}",
    )


TOKENIZERS = {"with BOS": with_bos_and_chat(), "without BOS": without_bos()}
PROMPTS = ["Where is it?", " leading and trailing ", "<|bos|>marked", "é 谢谢 😀\n\n", "ends in </s>"]


# ---- training, generation and reward models make the same ids ----


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["chat", "literal"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_generation_and_reward_models_see_the_ids_that_training_made(name, template, prompt):
    tokenizer = TOKENIZERS[name]
    row = {"prompt": prompt, "chosen": " yes, of course.", "rejected": " No."}
    if template == "chat" and tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        with pytest.raises(UserError, match="rendered already"):
            tokenize_pairs([row], tokenizer, template=template)
        return
    (pair,), _ = tokenize_pairs([row], tokenizer, template=template)
    (completion,), _ = tokenize_completions([row], tokenizer, template=template)
    (scored,) = tokenize_outputs([prompt], [row["chosen"]], tokenizer, template=template)
    assert encode_prompt(tokenizer, prompt, template) == pair.prompt_ids == completion.prompt_ids == scored.prompt_ids
    assert scored.completion_ids == pair.chosen_ids


def test_a_prompt_with_tools_and_variables_is_generated_from_as_it_was_trained(tmp_path):
    tokenizer = make_tokenizer(SENTENCES, vocab_size=600)
    tokenizer.chat_template = CHATML_TOOLS
    tools = [{"type": "function", "function": {"name": "train_times", "parameters": {"type": "object"}}}]
    row = {
        "prompt": "Where does it leave?",
        "system": "Be brief.",
        "tools": tools,
        "chosen": "Here.",
        "rejected": "No.",
    }
    (pair,), _ = tokenize_pairs([row], tokenizer)
    (tmp_path / "prompts.json").write_text(json.dumps([{key: row[key] for key in ("prompt", "system", "tools")}]))
    [prompt] = load_task(str(tmp_path / "prompts.json")).prompts
    assert encode_prompt(tokenizer, prompt.messages, "chat", prompt.tools, prompt.template_kwargs) == pair.prompt_ids
    assert encode_prompt(tokenizer, prompt.messages, "chat") != pair.prompt_ids


@given(st.text(max_size=60))
def test_any_literal_prompt_is_generated_from_as_it_was_trained(prompt):
    for tokenizer in TOKENIZERS.values():
        (item,), _ = tokenize_completions([{"prompt": prompt, "completion": " yes."}], tokenizer)
        assert encode_prompt(tokenizer, prompt, "literal") == item.prompt_ids


def test_strings_and_the_messages_that_they_stand_for_are_alike_under_chat():
    tokenizer = TOKENIZERS["with BOS"]
    strings = {key: text.strip() for key, text in STRINGS.items()}
    (wrapped,), report = tokenize_pairs([strings], tokenizer, template="chat")
    (messages,), _ = tokenize_pairs([MESSAGES], tokenizer)
    assert wrapped == messages and report.template == "chat"
    assert encode_prompt(tokenizer, strings["prompt"], "chat") == wrapped.prompt_ids
    assert encode_prompt(tokenizer, MESSAGES["prompt"], "chat") == wrapped.prompt_ids


# ---- rows ----


def test_auto_takes_rows_as_they_are_and_says_so():
    _, strings = convert([STRINGS])
    _, messages = convert([MESSAGES])
    _, mixed = convert([MESSAGES, STRINGS])
    assert (strings.template, messages.template, mixed.template) == ("literal", "chat", "chat and literal")
    for report, remark in (
        (strings, "data.template=chat"),
        (messages, "messages"),
        (mixed, "mix messages and strings"),
    ):
        (line,) = [line for line in report.lines() if line.startswith("template")]
        assert report.template in line and remark in line


def test_literal_refuses_messages_and_says_which_row_and_what_to_do():
    tokenizer = TOKENIZERS["with BOS"]
    with pytest.raises(UserError, match=r"pairs\.json: row 1: expected strings.*found a list of messages.*chat"):
        tokenize_pairs([STRINGS, MESSAGES], tokenizer, template="literal", source="pairs.json")
    pairs, report = tokenize_pairs([STRINGS], tokenizer, template="literal")
    assert pairs == tokenize_pairs([STRINGS], tokenizer)[0] and report.template == "literal"
    with pytest.raises(UserError, match=r"data\.template is one of auto, chat, literal; found 'chatml'"):
        template_of("chatml", ("text",), "here")


def test_the_report_shows_one_training_example_with_its_special_tokens():
    tokenizer = TOKENIZERS["with BOS"]
    pairs, report = tokenize_pairs([MESSAGES], tokenizer)
    ends = {part: shown.pop("ends") for part, shown in report.example.items()}
    assert report.example["prompt"]["text"].endswith("".join(ends["prompt"])) and len(ends["prompt"]) == 24
    assert ends["chosen"][-1] == "<|im_end|>" and len(ends["chosen"]) == len(pairs[0].chosen_ids)
    assert report.example == {
        part: {"tokens": len(ids), "text": text}
        for part, ids, text in (
            (
                "prompt",
                pairs[0].prompt_ids,
                "<|bos|><|im_start|>user\nWhere does the train leave?<|im_end|>\n<|im_start|>assistant\n",
            ),
            ("chosen", pairs[0].chosen_ids, "From the third.<|im_end|>"),
            ("rejected", pairs[0].rejected_ids, "No idea.<|im_end|>"),
        )
    }
    for part, shown in report.example.items():
        shown["ends"] = ends[part]
    (line,) = [line for line in report.lines() if line.startswith("tokens    rejected")]
    assert line.endswith(" | <|im_end|>") and f"the first {len(pairs[0].rejected_ids)}: " in line
    lines = [line for line in report.lines() if line.startswith("example")]
    assert len(lines) == 3
    assert lines[0].endswith(r"<|im_start|>user\nWhere does the train leave?<|im_end|>\n<|im_start|>assistant\n")


# ---- a model without training rows ----


def folder_of(path, tokenizer):
    tokenizer.save_pretrained(path)
    return path


def test_a_model_alone_is_asked_as_it_was_trained_else_as_its_tokenizer_allows(tmp_path):
    bare = with_bos_and_chat()
    bare.chat_template = None
    chat, plain = folder_of(tmp_path / "chat", TOKENIZERS["with BOS"]), folder_of(tmp_path / "plain", bare)
    assert has_chat_template(chat) and not has_chat_template(plain)
    assert of_model("auto", chat).template == "chat" and of_model("auto", plain).template == "literal"
    write_template(chat, "literal")
    assert json.loads((chat / FILE).read_text()) == {"template": "literal"}
    assert (
        trained_with(chat) == "literal"
        and str(of_model("auto", chat)) == "literal: as the model was trained (otpo.json)"
    )
    assert (
        as_trained("auto", chat) == "literal"
        and as_trained("chat", chat) == "chat"
        and as_trained("auto", plain) == "auto"
    )
    asked = of_model("chat", chat)
    assert asked.template == "chat" and "although the model was trained with literal" in asked.why


def test_a_file_that_does_not_say_the_template_is_one_clear_error(tmp_path):
    for text in ("{", "[]", "{}", '{"template": "chatml"}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r'expected \{"template": "chat" or "literal"\} in .*otpo\.json'):
            trained_with(tmp_path)


def test_rows_of_both_kinds_leave_no_template_behind(tmp_path):
    write_template(tmp_path, "chat and literal")
    assert trained_with(tmp_path) is None and trained_with(tmp_path / "missing") is None


# ---- a run ----

CHAT, LITERAL = Choice("chat", "the rows are messages"), Choice("literal", "the rows are strings")


def test_a_run_is_rendered_as_its_training_rows_are(tmp_path):
    for choice in (CHAT, LITERAL):
        for generate in ("auto", choice.template):
            assert (
                of_run("auto", generate, {"base.data": choice, "data.path": choice}, tmp_path).template
                == choice.template
            )


def test_a_run_whose_parts_would_be_rendered_differently_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"rendered alike, found base\.data chat: .*, data\.path literal: .*data\.template=chat"
    ):
        of_run("auto", "auto", {"base.data": CHAT, "data.path": LITERAL}, tmp_path)
    with pytest.raises(UserError, match=r"found generate\.template=chat where data\.path is trained as literal: "):
        of_run("auto", "chat", {"data.path": LITERAL}, tmp_path)
    with pytest.raises(UserError, match=r"found generate\.template=literal where data\.template is chat"):
        of_run("chat", "literal", {}, tmp_path)


def test_a_run_without_training_rows_asks_its_settings_then_its_model(tmp_path):
    model = folder_of(tmp_path / "model", TOKENIZERS["with BOS"])
    assert of_run("auto", "auto", {}, model).template == "chat"
    assert of_run("auto", "literal", {}, model).template == of_run("literal", "auto", {}, model).template == "literal"
    write_template(model, "literal")
    assert of_run("auto", "auto", {}, model).template == "literal"


def test_a_run_says_that_its_start_was_trained_otherwise(tmp_path):
    model = folder_of(tmp_path / "model", TOKENIZERS["with BOS"])
    write_template(model, "chat")
    assert "was trained with chat" in of_run("auto", "auto", {"data.path": LITERAL}, model).why
    assert "was trained" not in of_run("auto", "auto", {"data.path": CHAT}, model).why


def test_rows_of_both_kinds_can_be_trained_on_but_not_generated_from(tmp_path):
    _, report = convert([MESSAGES, STRINGS])
    choice = of_run("auto", "auto", {"data.path": report.choice}, tmp_path)
    with pytest.raises(UserError, match=r"all messages or all strings.*found both.*data\.template=chat"):
        _ = choice.for_generation
    assert (str(CHAT.for_generation), str(LITERAL.for_generation)) == ("chat", "literal")


# ---- variables of the chat template ----


def test_variables_of_a_chat_template_follow_the_model(tmp_path):
    kwargs = {"enable_thinking": False}
    model = folder_of(tmp_path / "model", TOKENIZERS["with BOS"])
    assert trained_kwargs(model) == {} and of_model("auto", model, kwargs).chat_template_kwargs == kwargs
    write_template(model, Rendering("chat", kwargs))
    assert json.loads((model / FILE).read_text()) == {"template": "chat", "chat_template_kwargs": kwargs}
    assert trained_kwargs(model) == kwargs and trained_with(model) == "chat"
    rendering = of_model("auto", model).for_generation
    assert rendering == Rendering("chat", kwargs) and str(rendering) == 'chat with {"enable_thinking": false}'
    assert of_model("literal", model).for_generation == Rendering("literal")
    assert of_model("auto", model, {}).for_generation == Rendering("chat")
    assert of_run("auto", "auto", {"data.path": CHAT}, model).chat_template_kwargs == kwargs
    assert of_run("auto", "auto", {"data.path": CHAT}, model, {"x": 1}).for_generation == Rendering("chat", {"x": 1})
    assert of_run("auto", "auto", {"data.path": LITERAL}, model, {"x": 1}).for_generation == Rendering("literal")
    (model / FILE).write_text('{"template": "chat", "chat_template_kwargs": 1}')
    with pytest.raises(UserError, match="expected an object as chat_template_kwargs"):
        trained_kwargs(model)


def test_variables_of_a_chat_template_without_one_are_refused():
    with pytest.raises(UserError, match="belong to a chat template, and the rows are strings"):
        tokenize_pairs([STRINGS], TOKENIZERS["with BOS"], chat_template_kwargs={"enable_thinking": False})

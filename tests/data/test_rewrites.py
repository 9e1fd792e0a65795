"""A completion is trained as it is written: what a chat template or a tokenizer makes of it otherwise is counted."""

import pytest
from conftest import SENTENCES
from support.chat_templates import (
    CHATML_TOOLS,
    GEMMA,
    LLAMA3,
    MISTRAL,
    QWEN3,
    QWEN3_OPENS,
    R1_OPENS,
    R1_STRIPS,
    assert_rendered,
    rendered,
    tokenizer_with,
)
from support.published_rows import assistant, user
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from otpo.data.encoder import encode_prompt
from otpo.data.template import Rendering
from otpo.data.tokens import tokenize_completions, tokenize_outputs, tokenize_pairs
from otpo.errors import UserError

ASK = user("Where does the train leave?")
THOUGHT = "<think>\nThe board says three.\n</think>\n\nFrom the third."
OTHER = "<think>\nNo board.\n</think>\n\nNo idea."


def row(chosen, rejected, prompt=(ASK,)):
    return {"prompt": list(prompt), "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def texts(pair, tokenizer):
    return tuple(tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids))


def refused(rows, tokenizer, **settings):
    with pytest.raises(UserError) as error:
        tokenize_pairs(rows, tokenizer, source="pairs.json", **settings)
    return str(error.value)


PLAIN = {"ChatML": CHATML_TOOLS, "Llama 3": LLAMA3, "R1": R1_STRIPS, "Gemma": GEMMA, "Mistral": MISTRAL}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_answers_have_the_ids_of_every_template_without_a_remark(name):
    tokenizer = tokenizer_with(PLAIN[name])
    talk = [ASK, assistant("At nine."), user("And from which platform?")]
    pairs, report = tokenize_pairs([row("From the third.", "No idea."), row("Three.", "Four.", talk)], tokenizer)
    assert not report.notes
    assert_rendered(tokenizer, pairs[0], [ASK], assistant("From the third."), assistant("No idea."))
    assert_rendered(tokenizer, pairs[1], talk, assistant("Three."), assistant("Four."))


@pytest.mark.parametrize("template", [R1_STRIPS, R1_OPENS])
def test_thoughts_that_a_template_takes_out_are_refused_counted_and_shown(template):
    tokenizer = tokenizer_with(template)
    said = refused([row(THOUGHT, OTHER), row("a", THOUGHT)], tokenizer)
    assert "pairs.json: the chat template rewrites the completions of 2 of 2 rows" in said
    assert r"row 0, chosen: '<think>\nThe board says three.\n</think>\n\nFrom the third.' rendered as" in said
    assert r"'\n\nFrom the third.'" in said
    for value in ("template", "text", "drop"):
        assert f"to {value} (" in said


@pytest.mark.parametrize(
    ("template", "rewritten", "chosen"),
    [
        (R1_STRIPS, "template", "\n\nFrom the third.<｜end▁of▁sentence｜>"),  # noqa: RUF001
        (R1_STRIPS, "text", THOUGHT + "<｜end▁of▁sentence｜>"),  # noqa: RUF001
        (R1_OPENS, "text", THOUGHT.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"),  # noqa: RUF001
        (QWEN3, "text", "From the third.<|im_end|>"),
        (QWEN3, "template", "<think>\n\n</think>\n\nFrom the third.<|im_end|>"),
    ],
)
def test_rewritten_completions_are_trained_as_asked(template, rewritten, chosen):
    tokenizer = tokenizer_with(template)
    sides = ("From the third.", "No idea.") if template == QWEN3 else (THOUGHT, OTHER)
    (pair,), report = tokenize_pairs([row(*sides)], tokenizer, rewritten=rewritten)
    assert tokenizer.decode(pair.chosen_ids) == chosen
    assert pair.prompt_ids == rendered(tokenizer, [ASK], add_generation_prompt=True)
    assert report.notes == {"completion rewritten by the chat template": [0]}
    assert any(line.strip().startswith("for example row 0, chosen: ") for line in report.lines())


def test_rewritten_rows_are_left_out_as_asked():
    tokenizer = tokenizer_with(R1_STRIPS)
    pairs, report = tokenize_pairs([row(THOUGHT, "No."), row("Yes.", "No.")], tokenizer, rewritten="drop")
    assert [pair.row for pair in pairs] == [1]
    assert report.problems == {"the chat template rewrites a completion": [0]}
    with pytest.raises(UserError, match=r"data\.rewritten is one of refuse, drop, template, text; found 'keep'"):
        tokenize_pairs([row("Yes.", "No.")], tokenizer, rewritten="keep")


def test_words_of_the_templates_markers_are_not_taken_for_the_answer():
    """`sentence` stands in the end marker too, and the rendered prompt ends in an opened thought."""
    tokenizer = tokenizer_with(R1_OPENS)
    said = refused([row("sentence", "end")], tokenizer)
    assert r"'sentence' put behind '<｜Assistant｜><think>\n'" in said  # noqa: RUF001
    (pair,), _ = tokenize_pairs([row("sentence", "end")], tokenizer, rewritten="template")
    assert texts(pair, tokenizer) == ("sentence<｜end▁of▁sentence｜>", "end<｜end▁of▁sentence｜>")  # noqa: RUF001


def test_an_answer_that_goes_on_with_the_thought_that_the_prompt_opens_is_as_written():
    tokenizer = tokenizer_with(QWEN3_OPENS)
    (pair,), report = tokenize_pairs([row(THOUGHT, OTHER)], tokenizer)
    assert_rendered(tokenizer, pair, [ASK], assistant(THOUGHT), assistant(OTHER))
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert texts(pair, tokenizer)[0] == "The board says three.\n</think>\n\nFrom the third.<|im_end|>"
    assert report.notes == {"rendered prompt already begins the completion": [0]}
    assert r"rendered as '\n</think>\n\nYes.'" in refused([row("Yes.", "No.")], tokenizer)


def test_an_empty_thought_is_refused_and_a_variable_of_the_template_puts_it_into_the_prompt():
    tokenizer = tokenizer_with(QWEN3)
    rows = [row("From the third.", "No idea.")]
    assert "data.chat_template_kwargs={enable_thinking: false}" in refused(rows, tokenizer)
    (pair,), report = tokenize_pairs(rows, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert_rendered(tokenizer, pair, [ASK], assistant("From the third."), assistant("No idea."), enable_thinking=False)
    assert texts(pair, tokenizer) == ("From the third.<|im_end|>", "No idea.<|im_end|>") and not report.notes
    (own,), _ = tokenize_pairs([rows[0] | {"chat_template_kwargs": {"enable_thinking": False}}], tokenizer)
    assert own == pair
    (scored,) = tokenize_outputs(
        [[ASK]], ["From the third."], tokenizer, template="chat", chat_template_kwargs={"enable_thinking": False}
    )
    assert (scored.prompt_ids, scored.completion_ids) == (pair.prompt_ids, pair.chosen_ids)
    assert encode_prompt(tokenizer, [ASK], Rendering("chat", {"enable_thinking": False})) == pair.prompt_ids
    (thought,), report = tokenize_pairs([row(THOUGHT, OTHER)], tokenizer)
    assert_rendered(tokenizer, thought, [ASK], assistant(THOUGHT), assistant(OTHER))
    assert not report.notes


def test_variables_that_a_template_does_not_have_are_refused():
    tokenizer = tokenizer_with(CHATML_TOOLS)
    rows = [row("Yes.", "No.")]
    with pytest.raises(UserError, match="has no variable enable_thinkng"):
        tokenize_pairs(rows, tokenizer, chat_template_kwargs={"enable_thinkng": False})
    assert "1 the chat template has no variable enable_thinkng" in refused(
        [rows[0] | {"chat_template_kwargs": {"enable_thinkng": False}}], tokenizer
    )


@pytest.mark.parametrize("template", [CHATML_TOOLS, LLAMA3, MISTRAL])
def test_a_prefill_stays_open_and_the_completion_goes_on_with_it(template):
    tokenizer = tokenizer_with(template)
    (pair,), report = tokenize_pairs([row(" Paris.", " Lyon.", [ASK, assistant("Sure:")])], tokenizer)
    assert pair.prompt_ids == rendered(tokenizer, [ASK, assistant("Sure:")], continue_final_message=True)
    whole = rendered(tokenizer, [ASK, assistant("Sure: Paris.")])
    assert whole[: len(pair.prompt_ids + pair.chosen_ids)] == pair.prompt_ids + pair.chosen_ids
    assert texts(pair, tokenizer)[0].startswith(" Paris.<|")
    assert list(report.notes) == ["prompt ends in the assistant's words, and the completion goes on with them"]
    assert encode_prompt(tokenizer, [ASK, assistant("Sure:")], "chat") == pair.prompt_ids


def test_a_template_that_knows_no_tools_or_calls_refuses_them():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    plain = tokenizer_with(LLAMA3)
    assert "the chat template has no place for tools" in refused([row("Yes.", "No.") | {"tools": [tool]}], plain)
    assert "the chat template leaves out tool calls" in refused([row("Yes.", "No.", [ASK, called])], plain)
    assert "a tool call is left out" in refused([row("a", "b") | {"chosen": [called]}], plain)
    thoughts = {**assistant("Yes."), "reasoning_content": "A board."}
    assert "its reasoning_content is left out" in refused([row("a", "b") | {"chosen": [thoughts]}], plain)
    (pair,), _ = tokenize_pairs([row(THOUGHT, OTHER) | {"chosen": [thoughts]}], tokenizer_with(QWEN3))
    assert "A board." in tokenizer_with(QWEN3).decode(pair.chosen_ids)


def test_thoughts_under_a_key_that_the_template_does_not_read_are_told_the_one_it_reads():
    thoughts = {**assistant("Yes."), "thinking": "A board."}
    said = refused([row("a", "b") | {"chosen": [thoughts]}], tokenizer_with(QWEN3))
    assert "its thinking is left out (the chat template reads reasoning_content: call it so in the rows)" in said


def named_by(header):
    """A tokenizer whose template begins each message with `header`."""
    opened = "{% if add_generation_prompt %}[assistant]{% endif %}"
    return tokenizer_with("{% for m in messages %}" + header + "{{ m.content }}</s>{% endfor %}" + opened)


def test_names_of_those_who_speak_are_not_dropped_unnoticed():
    tokenizer = named_by("[{{ m.role }}]")
    rows = [row("Yes.", "No.") | {"prompt": [{**ASK, "name": name}]} for name in ("Anna", "user", "")]
    pairs, report = tokenize_pairs(rows, tokenizer)
    ((reason, left_out),) = report.problems.items()
    assert "leaves out the name of a message" in reason and left_out == [0] and len(pairs) == 2
    said = refused([row("Yes.", "No.") | {"chosen": [{**assistant("Yes."), "name": "Bot"}]}], tokenizer)
    assert "row 0, chosen: its name is left out" in said


def test_names_that_the_template_writes_are_read():
    tokenizer = named_by("[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]")
    (pair,), report = tokenize_pairs([row("Yes.", "No.") | {"prompt": [{**ASK, "name": "Anna"}]}], tokenizer)
    assert not report.problems and "[user Anna]" in tokenizer.decode(pair.prompt_ids)


def test_a_template_that_writes_arguments_as_they_are_gets_them_as_json():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for city in ("Zürich", "Oslo")
    ]
    chosen, rejected = ({"role": "assistant", "content": "", "tool_calls": [call]} for call in calls)
    tokenizer = tokenizer_with(template)
    (pair,), _ = tokenize_pairs([{"prompt": [ASK], "chosen": [chosen], "rejected": [rejected]}], tokenizer)
    assert texts(pair, tokenizer)[0] == 'weather {"city": "Zürich"}<|im_end|>'


def test_a_template_that_drops_a_system_prompt_refuses_it():
    template = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    system = {"role": "system", "content": "Be brief."}
    said = refused([row("Yes.", "No.", [system, ASK])], tokenizer_with(template))
    assert "the chat template leaves out or changes a message of the system" in said


def test_a_template_that_takes_parts_only_is_given_parts():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    (pair,), report = tokenize_pairs([row("From the third.", "No idea.")], tokenizer)

    def parts(message):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    answers = assistant("From the third."), assistant("No idea.")
    assert_rendered(tokenizer, pair, [parts(ASK)], *map(parts, answers))
    assert not report.notes and tokenizer.decode(pair.prompt_ids).count(ASK["content"]) == 1


def test_thoughts_behind_a_prompt_that_ends_them_are_refused():
    tokenizer = tokenizer_with(QWEN3)
    said = refused([row(THOUGHT, OTHER)], tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert r"put behind '<|im_start|>assistant\n<think>\n\n</think>\n\n'" in said


def test_strict_templates_refuse_what_they_cannot_say():
    tokenizer = tokenizer_with(GEMMA)
    good = row("Yes.", "No.")
    _, report = tokenize_pairs(
        [good, row("a", "b", [{"role": "system", "content": "s"}, ASK]), row("a", "b", [ASK, ASK])], tokenizer
    )
    assert [rows for rows in report.problems.values()] == [[1], [2]]
    assert "System role not supported" in str(report.problems) and "must alternate" in str(report.problems)


def test_a_date_in_the_prompt_is_noted_with_the_variable_that_fixes_it():
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = tokenizer_with("{{ bos_token }}" + dated + "Today: {{ date_string }}\n" + CHATML_TOOLS)
    _, report = tokenize_pairs([row("Yes.", "No.")], tokenizer)
    assert any("today's date" in note and "date_string" in note for note in report.notes)
    _, report = tokenize_pairs([row("Yes.", "No.")], tokenizer, chat_template_kwargs={"date_string": "1 May 2025"})
    assert not report.notes


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%B %d, %Y"])
def test_a_date_without_a_variable_is_noted_in_every_form(form):
    template = "{{ 'Current date: ' + strftime_now('" + form + "') }}" + CHATML_TOOLS
    _, report = tokenize_pairs([row("Yes.", "No.")], tokenizer_with(template))
    (note,) = report.notes
    assert "today's date" in note and "chat_template_kwargs" not in note and "strftime_now" in note


# ---- tokenizers ----


def metaspace(normalizer=None):
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer:
        inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MISTRAL
    )


def test_a_space_that_a_decoder_drops_is_no_change_of_the_text():
    plain = {"prompt": "The train leaves from", "chosen": " the old station", "rejected": "no mountain"}
    for rows in ([plain], [row("the old station", "no mountain")]):
        _, report = tokenize_pairs(rows, metaspace())
        assert not any("changed by the tokenizer" in note for note in report.notes)


@pytest.mark.parametrize(
    ("normalizer", "chosen"),
    [(normalizers.Lowercase(), "The Train"), (normalizers.NFKC(), "the ﬁrst"), (None, "the £")],
)
def test_ids_that_stand_for_another_text_are_refused_with_an_example_or_treated_as_asked(normalizer, chosen):
    tokenizer = metaspace(normalizer)
    rows = [row(chosen, "no"), row("the train", "no")]
    said = refused(rows, tokenizer)
    assert "the tokenizer changes the completions of 1 of 2 rows" in said and repr(f" {chosen}</s>") in said
    kept, report = tokenize_pairs(rows, tokenizer, rewritten="drop")
    assert [pair.row for pair in kept] == [1] and report.problems == {"the tokenizer changes a completion": [0]}
    pairs, report = tokenize_pairs(rows, tokenizer, rewritten="template")
    assert report.notes["completion changed by the tokenizer: its ids stand for another text"] == [0]
    (line,) = [line for line in report.lines() if "for example row 0" in line]
    assert repr(f" {chosen}</s>") in line and repr(tokenizer.decode(pairs[0].chosen_ids)) in line


def test_the_text_of_a_special_token_inside_a_message_is_noted():
    tokenizer = tokenizer_with(CHATML_TOOLS)
    asked = user("What does <|im_end|> mean?")
    items, report = tokenize_completions(
        [{"prompt": [ask], "completion": [assistant("An end.")]} for ask in (ASK, asked)], tokenizer
    )
    assert report.notes == {"text of a special token inside a message, read as that token": [1]}
    assert_rendered(tokenizer, items[1], [asked], assistant("An end."))


def test_what_is_rendered_already_is_not_wrapped_again():
    tokenizer = tokenizer_with(CHATML_TOOLS)
    good = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
    wrapped = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    rows = [good, good | {"prompt": wrapped}, good | {"chosen": "Yes.<|im_end|>\n"}]
    pairs, report = tokenize_pairs(rows, tokenizer, template="chat")
    assert [pair.row for pair in pairs] == [0] and list(report.problems.values()) == [[1], [2]]
    assert "the prompt is rendered already: it begins with <|im_start|>" in str(report.problems)
    assert "a completion ends in <|im_end|> already" in str(report.problems)
    (pair,), _ = tokenize_pairs([rows[1]], tokenizer)
    assert tokenizer.decode(pair.prompt_ids) == tokenizer.bos_token + wrapped
    assert len(tokenize_pairs(rows, tokenizer, template="chat", rewritten="template")[0]) == 3


@pytest.mark.parametrize("template", ["chat", "literal"])
def test_half_of_a_surrogate_pair_leaves_its_row_out(template):
    good = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
    rows = [good, *({**good, column: "Yes \ud83d"} for column in good)]
    pairs, report = tokenize_pairs(rows, tokenizer_with(CHATML_TOOLS), template=template)
    assert [pair.row for pair in pairs] == [0]
    assert report.problems == {"half of a surrogate pair, which no text has": [1, 2, 3]}

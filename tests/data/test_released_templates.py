"""The chat templates of released models, as TRL ships them: transformers' own ids, or rows refused in words."""

from pathlib import Path

import pytest
import trl
from support.chat_templates import rendered, tokenizer_with
from support.published_rows import assistant, user

from otpo.data.tokens import tokenize_completions
from otpo.errors import UserError

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
ASK = user("Where does the train leave?")
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "departures",
        "description": "Trains of a station.",
        "parameters": {
            "type": "object",
            "properties": {"station": {"type": "string", "description": "Its name."}},
            "required": ["station"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "departures", "arguments": {"station": "Old Town"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "departures", "content": "09:15, platform three"}
THOUGHT = "<think>\nThe board says three.\n</think>\n\nFrom the third."

ROWS = {
    "plain": ([ASK], assistant("From the third."), None),
    "several turns": ([SYSTEM, ASK, assistant("Here."), user("Sure?")], assistant("Yes."), None),
    "a word of the markers": ([ASK], assistant("assistant"), None),
    "a prefill": ([ASK, assistant("Sure:")], assistant(" three."), None),
    "thoughts in the text": ([ASK], assistant(THOUGHT), None),
    "thoughts of their own": ([ASK], assistant("From the third.") | {"reasoning_content": "The board."}, None),
    "a result of a tool": ([ASK, CALLED, RESULT], assistant("From the third."), [TOOL]),
    "a call": ([ASK], CALLED, [TOOL]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(None)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_ids_are_those_of_transformers_or_the_rows_are_refused(path, tokenizer):
    tokenizer.chat_template = path.read_text()
    trained, takes_parts = [], path.stem.startswith(("idefics3", "llava_next", "smolvlm"))
    for name, (prompt, completion, tools) in ROWS.items():
        row = {"prompt": prompt, "completion": [completion], "tools": tools}
        try:
            (item,), report = tokenize_completions([row], tokenizer, max_length=None)
        except UserError as error:
            assert "data.rewritten" in str(error) or "the chat template" in str(error), name
            continue
        trained.append(name)
        text = tokenizer.decode(item.completion_ids)
        for told in (completion["content"], completion.get("reasoning_content", "")):
            begun = told.removeprefix("<think>\n") if tokenizer.decode(item.prompt_ids).endswith("<think>\n") else told
            assert begun.strip() in text, name
        prefilled = name == "a prefill"

        def oracle(messages, tools=tools, **settings):
            return rendered(tokenizer, parts(messages) if takes_parts else messages, tools=tools, **settings)

        assert item.prompt_ids == oracle(
            prompt, add_generation_prompt=not prefilled, continue_final_message=prefilled
        ), name
        whole = oracle([*prompt[:-1], assistant("Sure: three.")] if prefilled else [*prompt, completion])
        ours = item.prompt_ids + item.completion_ids
        if any("EOS added" in note for note in report.notes):  # our tokenizer does not know the template's end of turn
            ours = ours[:-1]
        assert tokenizer.decode(whole).startswith(tokenizer.decode(ours)), name
        assert ours == whole[: len(ours)] or any("merge" in note for note in report.notes), name
    assert trained or path.stem.endswith("_training"), "nothing can be trained with this template"


def parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]

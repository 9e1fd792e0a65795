"""Keys of a recipe's `data`, and options of the verbs: which column is what, and how completions are rendered."""

import json

import pytest
from support.chat_templates import QWEN3, R1_STRIPS, assert_rendered, rendered, tokenizer_with
from support.published_rows import assistant, user
from typer.testing import CliRunner

from jobs.cli import app
from otpo.data.template import Rendering
from otpo.data.token_file import load_tokens
from otpo.errors import UserError
from otpo.models.fresh import make_model
from pipeline.progress import silent
from pipeline.recipe import make_recipe
from pipeline.run.folder import RunFolder
from pipeline.run.inputs import reading_inputs
from pipeline.run.sources import Sources

FRAGEN = [
    {"frage": f"What is {n}?", "gut": f"It is {n}.", "schlecht": f"It is {n + 1}.", "quelle": "x"} for n in range(6)
]
COLUMNS = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}


@pytest.fixture
def folder(tmp_path):
    tokenizer = tokenizer_with(QWEN3)
    make_model(tokenizer, hidden=32, layers=1, heads=1, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, FRAGEN)))
    return tmp_path


def sources(folder, progress=silent, **data):
    tree = {"name": "trial", "model": {"path": str(folder / "model")}, "methods": {"dpo": {}}}
    tree["data"] = {"path": str(folder / "pairs.jsonl"), "validation": 0, **data}
    return Sources(make_recipe(tree), RunFolder(folder / "run"), progress)


def test_a_run_reads_mapped_columns_renders_with_its_variables_and_says_what_it_does_not_read(folder):
    said = []
    run = sources(
        folder, lambda what, *_: said.append((what, _[-1])), columns=COLUMNS, template="chat",
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    items = load_tokens(run.tokens().train)
    assert len(items) == 6
    for pair, row in zip(items, FRAGEN, strict=True):
        sides = (assistant(row["gut"]), assistant(row["schlecht"]))
        assert_rendered(tokenizer_with(QWEN3), pair, [user(row["frage"])], *sides, enable_thinking=False)
    assert run.generation_template == Rendering("chat", {"enable_thinking": False})
    assert any("columns that are not read: quelle" in remark for _, remark in said)
    assert ("template", 'chat with {"enable_thinking": false}: as data.template says') in said


def test_a_run_refuses_completions_that_its_template_rewrites_unless_told(folder):
    with pytest.raises(UserError, match=r"rewrites the completions of 6 of 6 rows"):
        sources(folder, columns=COLUMNS, template="chat").tokens()
    run = sources(folder, columns=COLUMNS, template="chat", rewritten="text")
    tokenizer = tokenizer_with(QWEN3)
    assert tokenizer.decode(load_tokens(run.tokens().train)[0].chosen_ids) == "It is 0.<|im_end|>"


def test_a_mix_has_columns_for_each_set_and_one_rendering(folder):
    more = [{"prompt": f"Is it {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(3)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    path, kwargs = str(folder / "pairs.jsonl"), {"enable_thinking": False}
    run = sources(
        folder, path=None, template="chat", chat_template_kwargs=kwargs,
        datasets={"fragen": {"path": path, "columns": COLUMNS}, "more": {"path": str(folder / "more.jsonl")}},
    )  # fmt: skip
    assert run.tokens().report.rendering == Rendering("chat", kwargs)
    texts = [tokenizer_with(QWEN3).decode(item.prompt_ids) for item in load_tokens(run.tokens().train)]
    assert len(texts) == 9 and all(text.endswith("<think>\n\n</think>\n\n") for text in texts)
    assert "What is 3?" in texts[3] and "Is it 1?" in texts[7]


def test_a_base_has_columns_of_its_own(folder):
    (folder / "base.jsonl").write_text("\n".join(json.dumps({"q": f"What is {n}?", "a": "It."}) for n in range(3)))
    tree = {"name": "trial", "model": {"path": str(folder / "model")}}
    tree["base"] = {"data": str(folder / "base.jsonl"), "columns": {"prompt": "q", "completion": "a"}, "max_steps": 2}
    run = Sources(make_recipe(tree), RunFolder(folder / "run"), silent)
    assert run.recipe.train_of("base").max_steps == 2
    tokens = load_tokens(run.tokens(supervised=True).train)
    assert tokens[1].prompt_ids == tokenizer_with(QWEN3)("What is 1?")["input_ids"]


def test_finished_runs_stay_finished(folder):
    """What decides how rows are read has no new key until one is set."""
    assert not {"columns", "chat_template_kwargs", "rewritten"} & reading_inputs(sources(folder).recipe).keys()
    changed = sources(folder, columns=COLUMNS, chat_template_kwargs={}, rewritten="drop").recipe
    assert {"columns", "chat_template_kwargs", "rewritten"} <= reading_inputs(changed).keys()


def test_data_takes_the_keys_as_options_and_shows_where_prompt_and_completion_meet(folder):
    options = [part for what, column in COLUMNS.items() for part in ("--column", f"{what}={column}")]
    path = str(folder / "pairs.jsonl")
    plain = CliRunner().invoke(app, ["data", path, *options])
    assert plain.exit_code == 0 and "ignored   columns that are not read: quelle" in plain.output
    asked = ["data", path, *options, "--template", "chat", "--model", str(folder / "model")]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code != 0 and "rewrites the completions of 6 of 6 rows" in str(refused.exception)
    shown = CliRunner().invoke(app, [*asked, "--chat-template-kwargs", '{"enable_thinking": false}'])
    (line,) = [line for line in shown.output.splitlines() if line.startswith("tokens    prompt")]
    assert line.endswith(r" | > | \n | \n") and line.startswith("tokens    prompt, the last 24: ")
    (line,) = [line for line in shown.output.splitlines() if line.startswith("tokens    chosen")]
    assert line.endswith(" | <|im_end|>")
    for wrong in (["--column", "prompt"], ["--chat-template-kwargs", "[1]"], ["--chat-template-kwargs", "{"]):
        assert "expected" in str(CliRunner().invoke(app, ["data", path, *wrong]).exception)
    left = CliRunner().invoke(app, ["data", path, *options, "--column", "quelle="])
    assert "ignored" not in left.output


def test_a_model_keeps_the_variables_that_it_was_trained_with(folder):
    """A reward model's texts and generated prompts are rendered with them."""
    from otpo.data.encoder import encode_prompt
    from otpo.data.template import of_model, write_template

    write_template(folder / "model", Rendering("chat", {"enable_thinking": False}))
    tokenizer = tokenizer_with(QWEN3)
    rendering = of_model("auto", folder / "model").for_generation
    assert encode_prompt(tokenizer, "Is it?", rendering) == rendered(
        tokenizer, [user("Is it?")], add_generation_prompt=True, enable_thinking=False
    )
    run = sources(folder, columns=COLUMNS, template="chat")
    assert tokenizer.decode(load_tokens(run.tokens().train)[0].prompt_ids).endswith("<think>\n\n</think>\n\n")


def test_outputs_that_a_template_rewrites_are_scored_with_a_warning(caplog):
    from otpo.data.tokens import tokenize_outputs

    tokenizer = tokenizer_with(R1_STRIPS)
    (item,) = tokenize_outputs(["Is it?"], ["<think>\nHm.\n</think>\n\nYes."], tokenizer, template="chat")
    assert tokenizer.decode(item.completion_ids).startswith("\n\nYes.")
    assert "the chat template rewrites 1 of 1 outputs" in caplog.text

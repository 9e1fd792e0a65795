"""The command itself: bad input ends in exit code 2 and one clear message, and what is done is not done again."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.command import nothing_begun, otpo, refused
from support.servers import Reply, ScriptedJudge
from support.training import losses, settings, write_pairs
from transformers import AutoTokenizer
from typer.testing import CliRunner

from jobs.cli import app
from jobs.cli.options import in_flags
from otpo.errors import UserError
from otpo.methods import METHODS, SHARED, WEIGHT_RULES
from pipeline.recipe import apply_overrides, make_recipe
from pipeline.run.manifest import Manifest
from pipeline.run.run import run
from pipeline.train.tokens import prepare_tokens


@pytest.fixture
def recipe(tmp_path, tiny_llama) -> Path:
    """A recipe that would train."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, tiny_llama, methods={"dpo": {}, "otpo": {}})))
    return path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_step=3"], ["unknown key 'train.max_step'", "Did you mean 'max_steps'?"]),
        (["methods.dppo="], ["found 'dppo'", "did you mean 'dpo'"]),
        (["methods.otpo.reg=0"], ["methods.otpo.reg", "above 0"]),
        (["methods.otpo.rge=1"], ["methods.otpo.rge", "did you mean 'reg'"]),
        (["train.max_steps"], ["'train.max_steps' is not an override", "key.path=value"]),
        (["train.workers=0"], ["train.workers", "greater than or equal to 1"]),
        (["data.path=nowhere.json"], ["data.path", "'nowhere.json'"]),
        (["model.path=./nowhere"], ["model.path", "'./nowhere'"]),
    ],
)  # fmt: skip
def test_a_bad_recipe(tmp_path, recipe, overrides, words):
    done = otpo(tmp_path, "train", recipe, *overrides)
    refused(done, *words)
    assert done.loaded == []
    nothing_begun(tmp_path)


def test_a_recipe_that_is_not_there(tmp_path):
    refused(otpo(tmp_path, "train", "nowhere.yaml"), "No recipe at 'nowhere.yaml'", "small_world")
    refused(otpo(tmp_path, "train"), "Missing argument")
    refused(otpo(tmp_path, "train", "small_world", "--runs", "hdfs://a/b"), "--runs hdfs://a/b", "s3:// or gs://")
    assert not list(tmp_path.glob("hdfs*")), "a folder called hdfs: would hold the run"
    refused(otpo(tmp_path, "trian", "x"), "No such command")


def test_a_folder_that_cannot_be_written(tmp_path, recipe):
    """Not even root can write below a file."""
    done = otpo(tmp_path, "train", recipe, "--runs", recipe / "sub")
    refused(done, "cannot be written", "Not a directory", "--runs")
    (tmp_path / "pairs.json").write_text(json.dumps([ROW]))
    done = otpo(tmp_path, "fresh", tmp_path / "pairs.json", "--out", recipe / "sub" / "model")
    refused(done, "cannot be written", "Not a directory", "--out")


ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.json", "[{]", ["d.json", "not JSON"]),
        ("d.json", "[]", ["d.json", "no rows"]),
        ("d.json", json.dumps([{"prompt": "q", "chosen": "a"}]), ["chosen", "rejected"]),
        ("d.json", json.dumps([{**ROW, "chosen": " "}, {**ROW, "rejected": "a"}]), ["none of the 2 rows"]),
        ("d.txt", json.dumps([ROW]), ["d.txt", ".jsonl"]),
        ("d.json.gz", "no gzip", ["d.json.gz"]),
        ("d.json", json.dumps([ROW]), ["cannot split 1 rows"]),
    ],
    ids=["not_json", "empty", "no_column", "unusable", "suffix", "gzip", "too_few"],
)  # fmt: skip
def test_bad_data(tmp_path, tiny_llama, name, content, words):
    """In this process: what the command adds to the error is tested above."""
    (tmp_path / name).write_text(content)
    recipe = make_recipe(
        settings(tmp_path, tiny_llama, data={"path": str(tmp_path / name), "validation": 0.2}, methods={"dpo": {}})
    )
    with pytest.raises(UserError) as error:
        run(recipe, tmp_path / "runs" / "small", world=None, progress=lambda *_: None, until="train")
    for word in words:
        assert word in str(error.value)
    nothing_begun(tmp_path)


def test_what_the_recipe_and_the_first_rows_tell_is_refused_before_torch_is_loaded(tmp_path, recipe):
    (tmp_path / "sft.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 9)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "task.json").write_text('[{"instruction": "Question"}]')
    for overrides, words in [
        (["data=sft.jsonl"], ["methods.dpo", "needs preference pairs", "sft.jsonl", "'prompt-completion'"]),
        (["data=empty.jsonl"], ["empty.jsonl is empty"]),
        (["generate.tasks=task.json", "judge.url=http://127.0.0.1:9/v1"], ["judge.url and judge.model are needed"]),
    ]:
        done = otpo(tmp_path, "run", recipe, *overrides)
        refused(done, *words)
        assert done.loaded == [], overrides
    nothing_begun(tmp_path)


def test_bad_data_through_the_command_and_then_mended(tmp_path, recipe):
    (tmp_path / "d.json").write_text("[{]")
    done = otpo(tmp_path, "train", recipe, "data.path=d.json")
    refused(done, "d.json", "not JSON")
    assert "ray" not in done.loaded
    nothing_begun(tmp_path)
    (tmp_path / "d.json").write_text(json.dumps([{**ROW, "prompt": f"q{i}"} for i in range(9)]))
    done = otpo(tmp_path, "train", recipe, "data.path=d.json", "model.path=.")
    refused(done, "no model folder")  # and no word of another recipe


def test_a_model_that_is_not_there_or_not_whole(tmp_path, tiny_llama, recipe):
    weightless = tmp_path / "llama-tiny"
    shutil.copytree(tiny_llama, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    done = otpo(tmp_path, "train", recipe, "model=llama-tinny", **unreachable)
    refused(done, "model.path: there is no folder 'llama-tinny' here", "cannot be asked", "Did you mean 'llama-tiny'?")
    assert done.loaded == []
    done = otpo(tmp_path, "train", recipe, "model=llama-tiny")
    refused(done, "model.path", "llama-tiny holds no weights", "save_pretrained")
    assert done.loaded == []
    nothing_begun(tmp_path)


def test_a_model_without_tokenizer_or_template(tmp_path, tiny_llama, recipe):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("token*", "*.jinja"))
    refused(otpo(tmp_path, "train", recipe, f"model.path={bare}"), "tokenizer", str(bare))
    template = bare / "chat_template.jinja"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(bare)
    template.unlink()
    messages = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]} for i in range(9)
    ]  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(messages))
    done = otpo(tmp_path, "train", recipe, f"model.path={bare}", "data.path=m.json")
    refused(done, "chat template", "row 0", str(bare))
    nothing_begun(tmp_path)


def test_before_training_a_run_checks_how_it_will_answer_and_who_judges(tmp_path, tiny_llama, recipe):
    prompts = [{"instruction": f"Question {i}"} for i in range(3)]
    answers = [{"instruction": f"Question {i}", "output": "a", "generator": "g"} for i in (0, 1, 7)]
    (tmp_path / "task.json").write_text(json.dumps(prompts))
    (tmp_path / "reference.json").write_text(json.dumps(answers))
    asked = ["generate.tasks=[task.json]", "generate.max_tokens=8"]
    refused(otpo(tmp_path, "run", recipe, *asked), "judge.url")
    nowhere = ["judge.url=http://127.0.0.1:9/v1", "judge.model=test", "judge.max_retries=0"]
    refused(otpo(tmp_path, "run", recipe, *asked, *nowhere), "127.0.0.1:9")
    refused(otpo(tmp_path, "run", recipe, *asked, *nowhere, "judge.reference=reference.json"), "Question 7")
    nothing_begun(tmp_path)


@pytest.mark.parametrize(
    ("method", "words"), [("reg=0", "reg"), ("reg", "not an override"), ("rge=1", "did you mean 'reg'")]
)
def test_weights_are_asked_for_wrongly(tmp_path, tiny_llama, method, words):
    pairs = write_pairs(tmp_path / "p.json", 3)
    refused(otpo(tmp_path, "weights", tiny_llama, pairs, method), words)
    refused(otpo(tmp_path, "weights", tiny_llama, pairs, "--out", "x.txt"), ".html")


def outputs(path: Path, instructions: list[str], generator: str) -> Path:
    rows = [
        {"instruction": i, "output": f"{generator} {i}", "generator": generator, "dataset": "d"} for i in instructions
    ]
    text = json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_judge_refuses_what_it_cannot_judge(tmp_path):
    reference = outputs(tmp_path / "r.json", ["a", "b"], "r")
    model = outputs(tmp_path / "m.json.gz", ["a", "b"], "m")
    other = outputs(tmp_path / "o.json", ["a", "c"], "o")

    def judge(file, url, *more):
        return otpo(
            tmp_path, "judge", file, "--reference", reference, "--judge-url", url, "--judge-model", "test", "--out",
            tmp_path / "board", *more, OPENAI_API_KEY="sk-secret",
        )  # fmt: skip

    with ScriptedJudge() as server:
        refused(judge(other, server.url), "c")
        refused(judge(model, server.url, "--protocol", "prefrence"), "preference")
        refused(judge(tmp_path / "none.json", server.url), "none.json")
        assert not server.calls
    refused(judge(model, server.url), server.url.split("//")[1].split("/")[0])
    for status in (401, 404):
        no = Reply({"error": {"message": "no"}}, status)
        with ScriptedJudge(lambda call, no=no: no, models=no) as server:
            done = judge(model, server.url)
            refused(done, str(status))
            assert "sk-secret" not in done.err + done.out
    assert not (tmp_path / "board" / "leaderboard.csv").exists()


def test_judge_takes_any_key_of_the_judge_section(tmp_path):
    reference = outputs(tmp_path / "r.json", ["a", "b"], "r")
    model = outputs(tmp_path / "m.json", ["a", "b"], "m")
    with ScriptedJudge() as server:

        def judge(*more):
            return otpo(
                tmp_path, "judge", model, "--reference", reference, "--judge-url", server.url,
                "--judge-model", "test", "--out", tmp_path / "board", *more,
            )  # fmt: skip

        refused(judge("--set", "judge.temperatur=1"), "judge.temperatur", "did you mean temperature")
        refused(judge("--set", "temperature=1"), "expected judge.KEY=VALUE")
        refused(judge("--set", "judge.temperature=hot"), "judge.temperature", "hot")
        assert not server.calls
        done = judge("--set", "judge.temperature=0.5", "--set", "judge.extra_body={top_k: 3}")
        assert done.code == 0, done.err
        asked = [call.body for call in server.calls if call.body.get("top_k") == 3]
        assert asked and {body["temperature"] for body in asked} == {0.5}


def test_each_generator_of_a_file_is_a_model_of_its_own(tmp_path):
    reference = outputs(tmp_path / "r.json", ["a", "b"], "r")
    rows = [
        {"instruction": f"{text} ", "output": f"{name} {text} \ud83d", "generator": name}
        for name in ("x", "y")
        for text in "ab"
    ]
    (tmp_path / "both.json").write_text(json.dumps(rows))
    (tmp_path / "half.json").write_text(json.dumps(rows[1:3]))
    with ScriptedJudge() as server:

        def judge(file, *more):
            return otpo(
                tmp_path, "judge", file, "--reference", reference, "--judge-url", server.url, "--judge-model", "test",
                "--out", tmp_path / "board", *more,
            )  # fmt: skip

        refused(judge("half.json"), "1 instructions of the reference have no output", "NAME=FILE")
        done = judge("both.json")
        assert done.code == 0 and "differ from the reference's in white space" in done.err, done.err
        assert set(pd.read_csv(tmp_path / "board" / "leaderboard.csv")["name"]) == {"x", "y"}
        assert judge("z=half.json").code == 0
        assert set(pd.read_csv(tmp_path / "board" / "leaderboard.csv")["name"]) == {"z"}


@pytest.mark.parametrize(
    ("verb", "said", "shown"),
    [
        (
            "generate",
            "Set generate.backend=transformers, or data.template.",
            "Set --backend transformers, or --template.",
        ),
        (
            "generate",
            "{x}: generate.gpu_memory_utilization, data.jsonl",
            "{x}: generate.gpu_memory_utilization, data.jsonl",
        ),
        ("judge", "set judge.url (such as u) and judge.model", "set --judge-url (such as u) and --judge-model"),
        ("judge", "judge.budget_usd, judge.temperature", "--budget-usd, --set judge.temperature"),
        ("judge", "--set judge.temperature: no", "--set judge.temperature: no"),
        ("judge", "judge.columns: {output: my reply}.", "--column 'output=my reply'."),
        ("judge", "judge.count_missing counts them", "--count-missing counts them"),
        ("data", "data.columns: {system: null} leaves it out", "--column system= leaves it out"),
        ("data", "data.columns: {history: a, b, labels: x: y}.", "--column 'history=a, b' --column 'labels=x: y'."),
        ("pairs", "data.columns: {system: null}", "data.columns: {system: null}"),
        ("pairs", "Raise pairs.n or pairs.max_tokens", "Raise --n or --max-tokens"),
    ],
)
def test_verbs_without_a_recipe_name_options(verb, said, shown):
    [command] = [each.callback for each in app.registered_commands if each.callback.__name__ == verb]

    @functools.wraps(command)
    def refuses() -> None:
        raise UserError(said)

    with pytest.raises(UserError) as error:
        in_flags(refuses)()
    assert str(error.value) == shown


def test_rows_that_cannot_be_used_are_counted_and_not_fatal(tmp_path, tiny_llama):
    rows = json.loads(write_pairs(tmp_path / "pairs.json", 40).read_text())
    rows[3]["chosen"] = "  "
    rows[5] = dict(rows[4])
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["prompt"] = "far too long " * 100
    rows[11]["chosen"] = "cut at its end " * 30
    del rows[13]["rejected"]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    recipe = make_recipe(apply_overrides(tree, ["data.max_length=128"]))
    tokens = prepare_tokens(
        recipe, tmp_path / "run", model=str(tiny_llama), source=str(tmp_path / "pairs.json"), supervised=False
    )
    assert (tokens.report.n_rows, tokens.report.n_usable, tokens.n_train) == (40, 36, 29)
    assert sorted(row for rows in tokens.report.problems.values() for row in rows) == [3, 7, 9, 13]
    notes = tokens.report.notes
    assert notes["duplicate row"] == [5] and any("cut" in note and rows == [11] for note, rows in notes.items())
    (report,) = (tmp_path / "run" / "data").glob("*/report.json")
    assert json.loads(report.read_text())["n_usable"] == 36


# ---- one run, and what later calls make of it ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, ray_cluster) -> Path:
    """A folder with a recipe and the run that `otpo train` made of it (here in this process, to share its Ray)."""
    folder = tmp_path_factory.mktemp("finished")
    tree = settings(folder, tiny_llama, methods={"dpo": {}, "otpo": {"reg": 0.1}}, train={"max_steps": 3, "workers": 1})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    said: list[tuple] = []
    place = folder / "runs" / "small"
    done = run(make_recipe(tree), place, world=None, progress=lambda *line: said.append(line), until="train")
    assert done.did == ["train/dpo", "train/otpo"]
    assert ("rows of pairs.json", 60, 60, "usable") in said
    assert ("train dpo", 3, 3) in {line[:3] for line in said}
    return folder


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (folder / "runs" / "small" / "models").rglob("*") if p.is_file()}


def test_the_second_call_does_nothing_and_does_it_fast(finished):
    before = files(finished)
    done = otpo(finished, "train", "recipe.yaml")
    assert done.code == 0 and "Nothing to do" in done.out and str(finished) in done.out
    assert done.loaded == [] and done.seconds < 20
    assert files(finished) == before


def test_other_workers_make_it_no_other_run(finished):
    done = otpo(finished, "train", "recipe.yaml", "train.workers=2", "train.micro_batch_size=1")
    assert done.code == 0 and "Nothing to do" in done.out and done.loaded == []


def test_a_changed_recipe_is_refused_with_the_difference_and_both_ways_out(finished):
    before = files(finished)
    done = otpo(finished, "train", "recipe.yaml", "methods.otpo.reg=0.3", "methods.sampo=")
    refused(done, "methods.otpo.reg: 0.1 -> 0.3", "methods.sampo: null -> {}", "name=", "--redo")
    assert files(finished) == before
    assert otpo(finished, "train", "recipe.yaml").code == 0, "the refusal left the old recipe in place"


@pytest.mark.slow
def test_redo_does_again_only_what_changed(finished, tmp_path, ray_cluster):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["data"]["path"] = str(folder / "pairs.json")
    target = folder / "runs" / "small"
    stored = (target / "recipe.yaml").read_text()
    (target / "recipe.yaml").write_text(stored.replace(str(finished), str(folder)))

    def again(*overrides, **keywords):
        recipe = make_recipe(apply_overrides(tree, overrides))
        return run(recipe, target, world=None, progress=lambda *_: None, until="train", **keywords).did

    before = files(folder)
    assert again("methods.otpo.reg=0.01", redo=True) == ["train/otpo"]
    after = files(folder)
    assert {p: t for p, t in after.items() if "/dpo/" in p} == {p: t for p, t in before.items() if "/dpo/" in p}
    old = losses(finished / "runs" / "small" / "models" / "otpo")
    new = losses(target / "models" / "otpo")
    assert len(new) == 3 and new[0] == pytest.approx(old[0], abs=1e-6) and new[2] != pytest.approx(old[2], abs=1e-9)
    assert again("methods.otpo.reg=0.01", "methods.sampo=", redo=True) == ["train/sampo"]
    assert again("methods.otpo.reg=0.01", "methods.sampo=") == []
    assert {p: t for p, t in files(folder).items() if "/sampo/" not in p} == after
    (target / "models" / "dpo" / "model" / "config.json").parent.rename(folder / "gone")
    assert again("methods.otpo.reg=0.01", "methods.sampo=") == ["train/dpo"], "what is missing is made again"
    assert set(Manifest(target).tree["stages"]) == {"train/dpo", "train/otpo", "train/sampo"}


@pytest.mark.slow
def test_more_workers_than_the_cluster_has(tmp_path, recipe):
    done = otpo(tmp_path, "train", recipe, "train.workers=999")
    assert done.code == 2 and done.started_ray and "Traceback" not in done.err, done.err
    assert "train.workers is 999" in done.err and "Set train.workers=" in done.err
    assert not list(tmp_path.glob("runs/*/models"))


def test_methods_ends_with_what_every_method_takes():
    done = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    *_, rules, last = done.output.splitlines()
    assert last == "Every method also takes: sft_weight=0.0, swap_answers=False"
    assert rules.endswith(f"weights: otpo, reg: 0.1}}: {', '.join(WEIGHT_RULES)}")
    assert set(SHARED) == {"sft_weight", "swap_answers"}
    assert all(f" {name} " in done.output for name in METHODS)

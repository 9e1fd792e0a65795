"""The Python interface: light to import, and the same checks, numbers and files as the command's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.random_pairs import PAIR_METHODS, random_pair, spec_of
from support.training import settings

import otpo
import pipeline
from eval.board.run_files import write_outputs
from otpo.errors import UserError
from otpo.explain import model_token_weights
from otpo.methods.losses import pair_loss
from otpo.methods.spec import resolve
from otpo.methods.weights.apply import token_weights
from otpo.records import TokenPair
from pipeline import load_recipe, make_recipe, open_run, run_recipe
from pipeline.progress import Lines
from pipeline.recipe import dump_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", ["otpo", "pipeline"])
def test_names_are_loaded_when_they_are_used(package):
    code = f"import sys, {package}\nassert not {{'torch', 'pandas', 'pydantic', 'ray'}} & set(sys.modules)\n"
    code += f"for name in {package}.__all__: assert name in dir({package}) and getattr({package}, name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has"):
        sys.modules[package].nothing  # noqa: B018


def test_types_are_published():
    for package in ("otpo", "pipeline", "eval", "jobs"):
        assert (ROOT / package / "py.typed").exists()


# ---- recipes ----


def test_a_recipe_made_here_is_the_one_of_the_file(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}, "otpo": {"reg": 0.05}})
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    assert make_recipe(tree) == make_recipe(**tree) == load_recipe(tmp_path / "recipe.yaml")
    assert make_recipe(tree, name="other").name == "other"
    assert isinstance(make_recipe(tree), pipeline.Recipe)


def test_a_wrong_recipe_is_refused_in_the_words_of_the_command(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    with pytest.raises(UserError, match=r"unknown key 'train\.max_step'.*'max_steps'"):
        make_recipe(tree, train={"max_step": 3})
    with pytest.raises(UserError, match="'name' is needed and missing"):
        make_recipe(model={"path": "x"})
    with pytest.raises(UserError, match="until='train' or 'report'"):
        run_recipe(make_recipe(tree), runs=tmp_path, until="judge")
    with pytest.raises(UserError, match="expected the folder of a run"):
        open_run(tmp_path / "nothing")


# ---- a run's files ----


def test_a_run_that_is_going_on_is_read(tmp_path):
    folder = tmp_path / "models" / "dpo"
    folder.mkdir(parents=True)
    lines = [
        {"step": 1, "loss": 0.7},
        {"step": 2, "loss": 0.6},
        {"step": 2, "eval_loss": 0.65},
        {"step": 3, "loss": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    results = open_run(tmp_path)
    assert results.metrics["step"].tolist() == [1, 2, 3] and results.metrics["loss"].tolist() == [0.7, 0.6, 0.5]
    assert results.metrics["eval_loss"].tolist() == pytest.approx([math.nan, 0.65, math.nan], nan_ok=True)
    for empty in (results.outputs, results.verdicts, results.leaderboard):
        assert isinstance(empty, pd.DataFrame) and empty.empty and len(empty.columns) > 1
    with pytest.raises(UserError, match="no trained model 'dpo'"):
        results.model("dpo")


def test_a_label_that_was_taken_out_of_the_recipe_is_no_part_of_the_run(tmp_path):
    from eval.board.report import build

    for label in ("base", "dpo", "gone"):
        (tmp_path / "models" / label / "model").mkdir(parents=True)
        (tmp_path / "models" / label / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n'
        )
        write_outputs(tmp_path, "task", {label: [{"instruction": "q", "output": "a", "generator": label}]}, [])
    (tmp_path / "weights.json").write_text(json.dumps([{"label": "gone"}]))
    assert set(open_run(tmp_path).metrics["label"]) == {"base", "dpo", "gone"}, "without a recipe"
    recipe = make_recipe(name="x", model="m", data="d.json", methods=["dpo"])
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    results = open_run(tmp_path)
    for frame in (results.metrics, results.outputs):
        assert set(frame["label"]) == {"base", "dpo"}
    assert results.files.weights == [] and results.model("dpo").exists()
    with pytest.raises(UserError, match=r"no trained model 'gone'\. Trained here: base, dpo"):
        results.model("gone")
    assert "gone" not in build([tmp_path], tmp_path / "page").read_text()


# ---- the science ----


def test_token_weights_are_those_of_the_pair_in_a_data_file(tiny_llama):
    texts = {"prompt": "The capital of", "chosen": " Mongolia is Ulaanbaatar", "rejected": " Mongolia, perhaps, is"}
    frame = otpo.token_weights(tiny_llama, **texts, method="otpo", reg=0.05)
    sides = {side: rows for side, rows in frame.groupby("side")}
    assert frame["side"].unique().tolist() == ["chosen", "rejected"]
    ids = [sides[side]["token_id"].tolist() for side in ("chosen", "rejected")]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt = tokenizer(texts["prompt"]).input_ids
    found = model_token_weights(str(tiny_llama), [TokenPair(0, prompt, *ids)], resolve("otpo", {"reg": 0.05}))[0]
    for side in ("chosen", "rejected"):
        assert sides[side]["weight"].tolist() == pytest.approx(found[f"{side}_weights"], rel=1e-5)
        assert sides[side]["position"].tolist() == list(range(len(sides[side])))
        assert tokenizer.decode(sides[side]["token_id"].tolist()).startswith(texts[side])
    assert frame.attrs["metrics"] == pytest.approx(found["metrics"], rel=1e-4)
    uniform = otpo.token_weights(tiny_llama, **texts, method="dpo")
    assert (uniform["weight"] == 1).all() and uniform["token_id"].tolist() == frame["token_id"].tolist()


def tensors(pair, spec):
    """The arguments of `otpo.loss` for a record."""
    extra = {}
    for name in spec.method.needs - {"reference", "hidden"}:
        extra[name] = tuple((side.frozen | side.vocabulary)[name] for side in (pair.chosen, pair.rejected))
    return {
        "chosen_logps": pair.chosen.policy,
        "rejected_logps": pair.rejected.policy,
        "chosen_mask": pair.chosen.mask,
        "rejected_mask": pair.rejected.mask,
        "ref_chosen_logps": pair.chosen.frozen["reference"],
        "ref_rejected_logps": pair.rejected.frozen["reference"],
        "chosen_hidden": pair.chosen.hidden,
        "rejected_hidden": pair.rejected.hidden,
        "extra": extra,
    }


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_a_loss_on_tensors_is_that_of_training(name):
    spec, pair = spec_of(name), random_pair([5, 3, 7], [4, 6, 2], hidden=8)
    expected = pair_loss(spec, pair, token_weights(spec, pair))
    given = tensors(pair, spec)
    padding = ~given["chosen_mask"]
    # a user's padding holds anything
    found = otpo.loss(name, **given | {"chosen_logps": given["chosen_logps"].masked_fill(padding, math.nan)})
    torch.testing.assert_close(found.losses, expected.losses)
    assert found.metrics.keys() == expected.metrics.keys()
    for metric, values in expected.metrics.items():
        torch.testing.assert_close(found.metrics[metric], values)


def test_the_loss_of_dpo_by_hand_with_its_gradient():
    pair = random_pair([5, 3], [4, 6])
    given = tensors(pair, resolve("dpo", {})) | {"chosen_hidden": None, "rejected_hidden": None, "extra": None}
    given["chosen_logps"].requires_grad_()
    margins = (given["chosen_logps"] - given["ref_chosen_logps"]).sum(-1)
    margins = margins - (given["rejected_logps"] - given["ref_rejected_logps"]).sum(-1)
    output = otpo.loss("dpo", beta=0.2, **given)
    torch.testing.assert_close(output.losses, -torch.nn.functional.logsigmoid(0.2 * margins))
    output.losses.sum().backward()
    expected = -0.2 * torch.sigmoid(-0.2 * margins.detach())[:, None] * given["chosen_mask"]
    torch.testing.assert_close(given["chosen_logps"].grad, expected)


def test_swapped_sides_are_swapped():
    pair = random_pair([5, 3], [4, 6])
    given = tensors(pair, resolve("dpo", {}))
    swapped = tensors(type(pair)(pair.rejected, pair.chosen), resolve("dpo", {}))
    torch.testing.assert_close(otpo.loss("dpo", swap_answers=True, **given).losses, otpo.loss("dpo", **swapped).losses)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("otpo", {"chosen_hidden": None}, "OTPO needs chosen_hidden and rejected_hidden"),
        ("dpo", {"ref_rejected_logps": None}, "DPO needs ref_chosen_logps and ref_rejected_logps"),
        ("wpo", {}, r"needs extra\['log_sum_squares'\]"),
        ("kto", {}, "expected a method of pairs"),
        ("reward-model", {}, "expected a method of pairs"),
        ("dpoo", {}, "did you mean 'dpo'"),
        ("dpo", {"bta": 0.2}, "did you mean 'beta'"),
        ("dpo", {"extra": {"oracel": ()}}, "extra has 'oracel': expected oracle"),
        ("dpo", {"chosen_mask": torch.ones(2, 4, dtype=torch.bool)}, r"shape \(2, 4\), logps .* \(2, 5\)"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(method, changes, words):
    given = tensors(random_pair([5, 3], [4, 6], hidden=8), resolve("dpo", {}))
    with pytest.raises(UserError, match=words):
        otpo.loss(method, **given | changes)


@pytest.mark.parametrize("argument", ["chosen_hidden", "rejected_hidden", "chosen_logps", "ref_rejected_logps"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_of_numbers_that_are_not_finite_is_refused(argument, number):
    given = tensors(random_pair([5, 3], [4, 6], hidden=8), resolve("otpo", {}))
    tensor = given[argument].clone()
    tensor[1, 2] = number
    side = argument.replace("ref_", "").split("_")[0]
    with pytest.raises(UserError, match=f"expected finite numbers.*found NaN.*, {side} completion, pair 1 .*float32"):
        otpo.loss("otpo", **given | {argument: tensor})


def test_numbers_that_are_not_finite_in_padding_do_not_count():
    given = tensors(random_pair([5, 3], [4, 6], hidden=8), resolve("otpo", {}))
    expected = otpo.loss("otpo", **given).losses
    padded = {
        f"{side}_hidden": given[f"{side}_hidden"].masked_fill(~given[f"{side}_mask"][..., None], math.nan)
        for side in ("chosen", "rejected")
    }
    torch.testing.assert_close(otpo.loss("otpo", **given | padded).losses, expected)


def test_as_many_chosen_as_rejected():
    given = tensors(random_pair([5, 3], [4, 6]), resolve("dpo", {}))
    one = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    mixed = {key: (one if "chosen" in key else given)[key] for key in given}
    with pytest.raises(UserError, match="1 chosen completions and 2 rejected"):
        otpo.loss("dpo", **mixed)


def test_lines_are_few_and_remarks_are_whole():
    written: list[str] = []
    show = Lines(written.append)
    for done in range(1, 1001):
        show("train dpo", done, 1000, f"loss {done}")
    show("train dpo", 1000, 1000, "loss 1000")
    show("note", 0, 0, "[read] this")
    assert written == ["train dpo: 1/1,000  loss 1", "train dpo: 1,000/1,000  loss 1000", "note: [read] this"]

"""Training through real Ray Train: worker counts, accumulation, export, checkpoints and resuming.

Two worker groups serve the whole file: one of two workers, then one of one worker that resumes what the first left.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.training import losses, metrics, pairs_of, settings, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from otpo.data.collate import collate_pairs
from otpo.errors import WorkError
from otpo.identity import model_fingerprint
from otpo.methods.spec import MethodSpec
from otpo.models.checkpoint import complete_checkpoints, read_state
from otpo.models.policy import PolicyModel
from otpo.training.objectives.pair import preference_losses
from otpo.training.step import evaluate
from pipeline.progress import silent
from pipeline.recipe import ModelConfig, Recipe, make_recipe
from pipeline.run.run import run
from pipeline.train.job import TrainJob
from pipeline.train.launcher import fit, make_job
from pipeline.train.tokens import Tokens, prepare_tokens

pytestmark = pytest.mark.usefixtures("ray_cluster")

METHODS = {
    "dpo": {"eval_every": 10},
    "accumulated": {"method": "dpo", "micro_batch_size": 1},
    "compiled": {"method": "dpo", "torch_compile": True},
    "otpo": {"micro_batch_size": 3, "save_every": 5, "keep_checkpoints": 2, "eval_every": 5, "async_save": True},
    "sampo": {},
    "best": {
        "method": "dpo", "learning_rate": 0.02, "lr_scheduler": "constant", "warmup_ratio": 0, "weight_decay": 0.1,
        "eval_every": 1, "best_metric": "eval_loss", "early_stopping_patience": 3, "save_every": 1,
        "keep_checkpoints": 1, "async_save": True,
    },
    "bf16": {"method": "otpo", "dtype": "bf16"},
}  # fmt: skip


LABELS = ["base", *(name for name in METHODS if name != "compiled")]


@dataclass
class Trained:
    recipe: Recipe
    folder: Path
    start: Path
    tokens: Tokens
    jobs: dict[str, TrainJob]

    def label(self, name: str) -> Path:
        return self.folder / "models" / name


def train(folder: Path, start: Path, labels: list[str], *, workers: int, change=lambda jobs: jobs) -> Trained:
    tree = settings(folder, start, methods=METHODS, train={"workers": workers, "max_failures": 0})
    tree["base"] = {"data": tree["data"]["path"], "max_steps": 20, "learning_rate": 1e-3, "max_failures": 0}
    recipe = make_recipe(tree)
    base = prepare_tokens(recipe, folder, model=str(start), source=tree["base"]["data"], supervised=True)
    pairs = prepare_tokens(recipe, folder, model=str(start), source=tree["data"]["path"], supervised=False)
    model = ModelConfig(path=str(start))
    jobs = {
        label: make_job(
            recipe, folder, label, model=model, tokens=base if label == "base" else pairs, caches=folder / "scorers"
        )
        for label in labels
    }
    jobs = change(jobs)
    trained = Trained(recipe, folder, start, pairs, jobs)
    fit(
        list(jobs.values()), folder, name="methods", train=recipe.train, cluster=recipe.cluster, progress=silent, cpus=1
    )
    return trained


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_llama) -> Trained:
    """Everything but what compiles for minutes, by two workers."""
    return train(tmp_path_factory.mktemp("two"), tiny_llama, LABELS, workers=2)


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_llama, two) -> Trained:
    """The same by one worker; some labels are found as an interruption would have left them."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("resumed", "moved"):  # killed at step 13; a checkpoint of step 15 was being written
        shutil.copytree(two.label("otpo"), folder / "models" / name)
        shutil.rmtree(folder / "models" / name / "model")
        (folder / "models" / name / "checkpoints" / "step-000015" / "complete.json").unlink()
        lines = (two.label("otpo") / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "models" / name / "metrics.jsonl").write_text("".join(lines[:15]) + '{"step": 14, "lo')
    (folder / "models" / "finished" / "model").mkdir(parents=True)

    def change(jobs: dict[str, TrainJob]) -> dict[str, TrainJob]:
        again = {
            name: replace(jobs["otpo"], label=name, out=str(folder / "models" / name))
            for name in ("resumed", "finished", "moved")
        }
        again["moved"] = replace(again["moved"], model_fingerprint="another")
        return jobs | again

    with pytest.raises(WorkError, match="its reference has changed"):
        train(folder, tiny_llama, ["base", "dpo", "otpo", "sampo", "bf16"], workers=1, change=change)
    return replace(two, folder=folder)


def spec_of(trained: Trained, label: str) -> MethodSpec:
    return trained.recipe.method(label)


def evaluation_of(trained: Trained, label: str, model: Path) -> dict[str, float]:
    """What an evaluation of the label must say of a model folder, computed without Ray and FSDP."""
    assert trained.tokens.validation is not None
    pairs = pairs_of(trained.tokens.validation)
    policy, reference = (PolicyModel(AutoModelForCausalLM.from_pretrained(m)).eval() for m in (model, trained.start))
    spec = spec_of(trained, label)
    found = preference_losses(
        policy, spec, lambda batch: {"reference": reference(batch)[0]}, seed=trained.recipe.train.seed
    )
    with torch.no_grad():
        return evaluate([collate_pairs(pairs)], found, denominator=len(pairs))


@pytest.mark.parametrize("label", ["base", "dpo", "otpo", "sampo"])
def test_two_workers_give_the_losses_of_one(two, one, label):
    expected = losses(one.label(label))
    assert len(expected) == 20 and expected[-1] < expected[0] - 0.05
    assert losses(two.label(label)) == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(metrics(two.label(label))[0], metrics(one.label(label))[0], strict=True):
        same = {k: v for k, v in ours.items() if k not in ("seconds", "tokens_per_second")}
        assert same == pytest.approx({k: theirs[k] for k in same}, rel=1e-3, abs=1e-4)


def test_accumulation_of_four_gives_the_losses_of_one(two):
    """The first label met an empty cache of the reference and the second a full one: that changes nothing either."""
    assert losses(two.label("accumulated")) == pytest.approx(losses(two.label("dpo")), abs=1e-5)


@pytest.mark.slow
def test_compiling_changes_no_loss(two, tmp_path, tiny_llama):
    compiled = train(tmp_path, tiny_llama, ["compiled"], workers=2)
    assert losses(compiled.label("compiled")) == pytest.approx(losses(two.label("dpo")), abs=1e-5)


@pytest.mark.parametrize("label", ["dpo", "otpo", "sampo"])
def test_the_first_loss_is_ln_2(two, one, label):
    for trained in (two, one):
        assert losses(trained.label(label))[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("label", LABELS)
def test_every_training_leaves_what_it_checked_before_the_first_step(two, label):
    found = json.loads((two.label(label) / "start_check.json").read_text())
    tolerance = 0.01 if label == "bf16" else 1e-5
    assert (found["forward"]["layout"], found["forward"]["head"], found["fallback"]) == ("flat", "fused", "")
    assert found["forward"]["difference"]["worst"] < tolerance and found["repeated"] < 1e-6
    if label != "base":
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-4) and found["cached"]["worst"] < tolerance
        assert "expected 0.6931 = ln 2" in found["line"]


def test_bf16_learns_what_fp32_does_and_keeps_the_precision_of_its_start(two, one):
    exact = losses(two.label("otpo"))
    for trained in (two, one):
        found = losses(trained.label("bf16"))
        assert found[0] == pytest.approx(math.log(2), abs=0.02)
        assert found == pytest.approx(exact, abs=0.02)
    assert exact[-1] < exact[0] - 0.05, "else what does not learn would pass"
    assert AutoModelForCausalLM.from_pretrained(two.label("bf16") / "model", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("label", ["dpo", "otpo"])
def test_the_export_is_the_trained_model(two, label):
    _, evaluations = metrics(two.label(label))
    assert evaluations[-1]["step"] == 20
    found = evaluation_of(two, label, two.label(label) / "model")
    logged = {k: v for k, v in evaluations[-1].items() if k != "step"}
    assert found == pytest.approx(logged, rel=2e-5, abs=2e-5)
    assert found["eval_loss"] != pytest.approx(math.log(2), abs=1e-3), "it has moved"


def test_every_weight_of_the_model_was_trained(two):
    """Embeddings, final norm and head too, which FSDP2 keeps in its root."""
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(p).named_parameters())
        for p in (two.start, two.label("dpo") / "model")
    )
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_export_is_a_whole_folder(two):
    folder = two.label("otpo") / "model"
    tokenizer, start = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(two.start)
    assert tokenizer.chat_template == start.chat_template and tokenizer.get_vocab() == start.get_vocab()
    assert sorted(p.suffix for p in folder.iterdir() if "model" in p.name) == [".safetensors"]
    card = (folder / "README.md").read_text()
    for expected in ("OTPO", "https://", str(two.start), '"reg": 0.1', '"learning_rate": 0.001', "60 of 60 rows"):
        assert expected in card
    assert not list(two.folder.rglob("*.partial*"))


def test_keep_checkpoints_keeps_the_newest(two):
    kept = complete_checkpoints(two.label("otpo") / "checkpoints")
    assert [p.name for p in kept] == ["step-000010", "step-000015"]
    assert not (two.label("dpo") / "checkpoints").exists()


def test_early_stopping_exports_the_best_step(two):
    lines, evaluations = metrics(two.label("best"))
    by_step = {line["step"]: line["eval_loss"] for line in evaluations}
    best = min(by_step, key=lambda step: by_step[step])
    assert len(lines) == best + 3 < 20, "three evaluations without a better one, then no more steps"
    found = evaluation_of(two, "best", two.label("best") / "model")["eval_loss"]
    assert found == pytest.approx(by_step[best], rel=1e-4) and found < by_step[best + 3] - 1e-3
    kept = {p.name for p in complete_checkpoints(two.label("best") / "checkpoints")}
    assert kept == {f"step-{best:06d}", f"step-{best + 3:06d}"}, "the newest and the best"


def test_a_resumed_run_goes_the_way_of_an_undisturbed_one(two, one):
    """Two workers until step 10, one from there; the unfinished checkpoint of step 15 is not looked at."""
    assert losses(one.label("resumed")) == pytest.approx(losses(two.label("otpo")), abs=1e-5)
    assert losses(one.label("resumed"))[:10] == losses(two.label("otpo"))[:10], "the lines until the checkpoint stay"
    steps = [line["step"] for line in metrics(one.label("resumed"))[1]]
    assert steps == [5, 10, 15, 20], "evaluations are neither lost nor repeated"
    states = [read_state(p) for p in complete_checkpoints(one.label("resumed") / "checkpoints")]
    assert [(s["step"], s["world"]) for s in states] == [(10, 2), (15, 1)]
    assert {s["reference"] for s in states} == {model_fingerprint(two.start)}


def test_resuming_under_the_same_precision_is_exact_to_rounding(two, one):
    first, second = (
        AutoModelForCausalLM.from_pretrained(p / "model").state_dict()
        for p in (two.label("otpo"), one.label("resumed"))
    )
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_changed_reference_is_refused_and_nothing_is_touched(one):
    folder = one.label("moved")
    assert not (folder / "model").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 16


def test_what_is_finished_is_not_done_again(one):
    assert [p.name for p in one.label("finished").iterdir()] == ["model"]


def test_all_methods_share_one_pass_of_the_reference(two):
    """One folder for fp32, one for bf16; two parts a pass, one of each rank."""
    folders = list((two.folder / "scorers").iterdir())
    assert len(folders) == 2
    assert all(len(list(folder.glob("part-*.safetensors"))) == 2 for folder in folders)


def test_metrics_have_what_a_page_plots(two):
    line = metrics(two.label("otpo"))[0][-1]
    expected = {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "rewards/chosen",
        "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
        "weights/entropy_chosen", "weights/effective_tokens_chosen", "lengths/chosen",
    }  # fmt: skip
    assert expected <= set(line) and json.dumps(line)
    assert line["epoch"] == pytest.approx(20 * 8 / 48, abs=1e-3)


@pytest.mark.slow
def test_the_first_loss_on_all_real_pairs_is_ln_2(tmp_path, tiny_llama, shared_data):
    """One step over every pair of a real file: each method starts at ln 2 for each pair, not only on average."""
    source = str(shared_data / "preferences" / "instruction-data-with-preference.json")
    tree = settings(
        tmp_path, tiny_llama, methods={"dpo": {}, "otpo": {}, "sampo": {}}, data={"path": source, "validation": 0}
    )
    tree["train"] |= {"max_steps": 2, "global_batch_size": 1100, "micro_batch_size": 10, "warmup_ratio": 0.5}
    recipe = make_recipe(tree)
    tokens = prepare_tokens(recipe, tmp_path, model=str(tiny_llama), source=source, supervised=False)
    assert tokens.n_train > 1000 and tokens.n_train + sum(map(len, tokens.report.problems.values())) == 1100
    jobs = [
        make_job(recipe, tmp_path, label, model=recipe.model, tokens=tokens, caches=tmp_path / "scorers")
        for label in recipe.methods
    ]
    fit(jobs, tmp_path, name="methods", train=recipe.train, cluster=recipe.cluster, progress=silent, cpus=1)
    for label in recipe.methods:
        first, second = metrics(tmp_path / "models" / label)[0]
        # the first step warms up at rate 0, so that the second meets the start again, on other micro-batches
        assert first["learning_rate"] == 0
        assert [first["loss"], second["loss"]] == pytest.approx([math.log(2)] * 2, abs=1e-5)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_numbers_that_are_not_finite_name_label_step_row_and_side(tmp_path, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = json.loads(write_pairs(tmp_path / "pairs.json", n=12).read_text())
    rows[7]["rejected"] += " ~"
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~").input_ids[-1]] = math.nan
    start = tmp_path / "start"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    train = {"workers": 2, "global_batch_size": 12, "max_steps": 3}
    recipe = make_recipe(settings(tmp_path, start, methods={"mine": {"method": "otpo"}}, train=train))
    with pytest.raises(WorkError, match=r"^mine, step 1: .*data row 7: .*rejected completion") as error:
        run(recipe, tmp_path / "run", world=None, progress=lambda *_: None, until="train")
    assert "hidden states, rejected completion" in str(error.value) and "chosen completion" not in str(error.value)
    assert not (tmp_path / "run" / "models" / "mine" / "model").exists()

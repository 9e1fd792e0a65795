"""Plans of whole recipes: what is chosen, what is advised, what it costs; and operations as torch counts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training import settings, write_pairs
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from jobs.cli import app
from otpo.data.collate import collate_pairs
from otpo.data.token_file import load_tokens, save_tokens
from otpo.errors import UserError
from otpo.models import attention
from otpo.models.adapters import add_adapters
from otpo.models.policy import PolicyModel
from otpo.records import TokenPair
from pipeline.plan import Lengths, Machine, assumed, gpu_machine, measured, plan, shape_of
from pipeline.plan.estimate import Settings
from pipeline.plan.fitted import fitted
from pipeline.plan.machine import GIB
from pipeline.plan.serving import serving
from pipeline.plan.speed import forward_flops, model_flops
from pipeline.recipe import Recipe, load_recipe, make_recipe
from pipeline.train.job import TrainJob
from pipeline.train.launcher import worker_environment

LLAMA3 = {"vocab_size": 128256, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with nothing but the configs of Llama 3's sizes."""
    found = {}
    for name, sizes in SHAPES.items():
        found[name] = tmp_path_factory.mktemp(name)
        AutoConfig.for_model("llama", **LLAMA3, **sizes, num_key_value_heads=8).save_pretrained(found[name])
    return found


def recipe_of(model: Path, *overrides: str) -> Recipe:
    return load_recipe("llama3_8b_otpo", [f"model.path={model}", *overrides])


def planned(model: Path, nodes: int, per_node: int, *overrides: str, **more):
    recipe = recipe_of(model, *overrides)
    lora = recipe.model.lora.model_dump() if recipe.model.lora else None
    return plan(recipe, shape_of(model, lora), gpu_machine("H100", nodes=nodes, per_node=per_node, **more))


def test_70b_is_told_what_it_takes(models: dict[str, Path]) -> None:
    """All 70 billion weights do not fit 8 or 16 GPUs of 80 GB, unless 8-bit states let them fit 16; adapters fit 8."""
    for nodes in (1, 2):
        made = planned(models["70b"], nodes, 8)
        assert made.chosen is None and not made.asked_fits
        assert [line.split(":")[0] for line in made.advice] == [
            *(["train.optimizer=adamw_8bit"] if nodes == 2 else []), "more GPUs, 4 nodes of 8 H100s", "model.lora={}",
        ]  # fmt: skip
        assert "it may not fit" in made.line and "model.lora={}" in made.line
    # what is advised does fit
    lighter = planned(models["70b"], 2, 8, "train.optimizer=adamw_8bit")
    for made in (lighter, planned(models["70b"], 4, 8), planned(models["70b"], 1, 8, "model.lora={}")):
        assert made.chosen is not None and made.chosen.total <= 79 * GIB
    # 16 B for each parameter, sharded, is a lower bound
    assert planned(models["70b"], 4, 8).chosen.total > 16 * 70.5e9 / 32


def test_the_fastest_settings_that_fit_are_chosen(models: dict[str, Path]) -> None:
    made = planned(models["8b"], 1, 4, "train.activation_checkpointing=false", "train.micro_batch_size=32")
    assert not made.asked_fits and made.chosen.settings.activation_checkpointing
    assert made.chosen.micro_batches == 1  # more would keep 30 GiB of gradients whole on each GPU
    assert made.advice[0].startswith("train.activation_checkpointing=true train.micro_batch_tokens=")
    # with adapters there is room for activations, and repeating them would take longer
    lora = planned(models["8b"], 1, 8, "model.lora={}")
    assert lora.asked_fits and not lora.chosen.settings.activation_checkpointing
    assert lora.chosen.step_seconds < lora.asked.step_seconds
    # advice that is followed fits
    changes = made.advice[0].split(":")[0].split()
    assert planned(models["8b"], 1, 4, "train.activation_checkpointing=false", *changes).asked_fits


def test_advice_names_all_that_it_takes(models: dict[str, Path]) -> None:
    """Neither two GPUs nor adapters hold the activations of micro-batches of 16,384 tokens."""
    kept = "train.activation_checkpointing=false"
    made = planned(models["8b"], 1, 1, kept)
    more, lora = (line.split(": ")[0] for line in made.advice)
    assert more.startswith("more GPUs, 2 nodes of 1 H100 with train.activation_checkpointing=true train.micro_batch")
    assert planned(models["8b"], 2, 1, kept, *more.split(" with ")[1].split()).asked_fits
    assert lora.startswith("model.lora={} train.micro_batch_tokens=")
    assert planned(models["8b"], 1, 1, kept, *lora.split()).asked_fits


def test_activations_are_computed_again_where_a_gpu_would_not_hold_them(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """By default: with all weights of 8B on four GPUs. Adapters leave room for 8,192 tokens; on CPUs, never."""
    open_ = ("train.activation_checkpointing=auto", "train.micro_batch_size=16")
    made = planned(models["8b"], 1, 4, *open_)
    assert made.asked_fits and made.asked.settings.activation_checkpointing
    assert not planned(models["8b"], 1, 4, "train.activation_checkpointing=false", *open_[1:]).asked_fits
    lora = planned(models["8b"], 1, 8, "model.lora={}", *open_)
    assert lora.asked_fits and lora.asked.settings == Settings(8192, False, 16)
    larger = planned(models["8b"], 1, 8, "model.lora={}", "train.micro_batch_tokens=16384", *open_)
    assert larger.asked_fits and larger.asked.settings == Settings(16384, True, 16)
    assert lora.asked.step_seconds < larger.asked.step_seconds
    cpus = plan(recipe_of(models["8b"], *open_), shape_of(models["8b"]), Machine(None, 2, 2, 2**30))
    assert not cpus.asked_fits and not cpus.asked.settings.activation_checkpointing
    # what a job is started with, by the lengths of its own rows
    save_tokens(tmp_path / "long", [TokenPair(i, [3] * 400, [5] * 1600, [7] * 1600) for i in range(9)])
    save_tokens(tmp_path / "short", [TokenPair(i, [3] * 4, [5] * 4, [7] * 4) for i in range(9)])
    recipe, machine = recipe_of(models["8b"], *open_), gpu_machine("H100", nodes=1, per_node=4)
    job = TrainJob(
        label="dpo", model=str(models["8b"]), model_fingerprint="", attn_implementation="sdpa",
        tokens=str(tmp_path / "long"), validation_tokens=None, out="", events="", total_steps=1,
        train=recipe.train.model_dump(), method=recipe.method("dpo").settings, frozen_models={}, caches="",
        tokens_hash="", card="",
    )  # fmt: skip
    short = replace(job, tokens=str(tmp_path / "short"))
    fixed = replace(job, train=job.train | {"activation_checkpointing": False})
    found = [
        [fitted(each, where).train[key] for key in ("activation_checkpointing", "micro_batch_tokens")]
        for each, where in ((job, machine), (short, machine), (job, None), (fixed, machine))
    ]
    assert found == [[True, made.asked.settings.micro_batch_tokens], [False, 16384], [False, None], [False, None]]


def test_memory_of_gpu_workers_grows_in_segments_unless_the_environment_says_otherwise(monkeypatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert worker_environment(on_gpu=True) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert "PYTORCH_ALLOC_CONF" not in worker_environment(on_gpu=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert worker_environment(on_gpu=True) == {}


def test_gpus_keep_no_unsharded_gradients_between_micro_batches(models: dict[str, Path]) -> None:
    several = planned(models["8b"], 1, 8, "train.micro_batch_size=2")
    assert several.asked.micro_batches == 8 and "gradients between micro-batches" not in several.asked.parts


def test_8_bit_states_take_a_quarter_and_let_a_model_fit(models: dict[str, Path]) -> None:
    """All weights of 8B take 18 bytes each on one GPU, 12 with 8-bit states: a GPU of 141 GB, not one of 80 GB."""

    def on(gpu: str, model: str, nodes: int, per_node: int, *overrides: str):
        return plan(
            recipe_of(models[model], *overrides),
            shape_of(models[model]),
            gpu_machine(gpu, nodes=nodes, per_node=per_node),
        )

    lighter = "train.optimizer=adamw_8bit"
    for gpu, fits in (("H100", False), ("H200", True)):
        exact, found = on(gpu, "8b", 1, 1), on(gpu, "8b", 1, 1, lighter)
        weights = found.shape.parameters
        saved = exact.asked.parts["optimizer"] - found.asked.parts["optimizer"]
        assert saved == pytest.approx((8 - 2 - 8 / 256) * weights, abs=1) and saved > 44 * GIB
        assert exact.chosen is None and (found.chosen is not None) is fits
        assert exact.checkpoint_bytes == 12 * weights
        assert found.checkpoint_bytes == pytest.approx((4 + 2 + 8 / 256) * weights, abs=1)
    assert exact.advice[0].startswith(f"{lighter}:") and exact.advice[1].startswith("more GPUs")
    assert float(exact.advice[0].split()[1]) == pytest.approx(found.chosen.total / GIB, abs=1)
    # what torch cannot copy is not advised
    beside = on("H200", "8b", 1, 1, "train.async_save=true")
    assert not any(lighter in line for line in beside.advice)


def test_a_live_reference_and_kept_states_take_memory(models: dict[str, Path]) -> None:
    def of(method: str) -> dict[str, int]:
        recipe = recipe_of(models["8b"]).model_copy(update={"methods": {"x": {"method": method}}})
        made = plan(recipe, shape_of(models["8b"]), gpu_machine("H100", nodes=1, per_node=8))
        return made.asked.parts

    dpo, otpo, tdpo = of("dpo"), of("otpo"), of("tdpo2")
    assert "reference" not in dpo and tdpo["reference"] > 4 * 8.03e9 / 8
    assert otpo["activations"] > dpo["activations"] and otpo["token weights"] > 0 and "token weights" not in dpo


def test_hours_and_money_follow_from_steps(models: dict[str, Path]) -> None:
    never = ("train.save_every=null", "train.save_minutes=null")
    made = planned(models["8b"], 1, 8, *never, usd=3.0)
    assert made.steps == 2 * -(-(61135 - 256) // 128)  # two methods
    steps = made.steps * made.asked.step_seconds / 3600
    assert steps < made.hours < 1.3 * steps  # and the reference's pass
    assert made.usd == pytest.approx(3.0 * 8 * made.hours)
    slower = planned(models["8b"], 1, 8, *never, utilisation=0.20)
    assert slower.hours == pytest.approx(2 * made.hours, rel=0.01)
    assert made.checkpoint_bytes == 12 * made.shape.parameters and made.export_bytes == 2 * made.shape.parameters
    saves = planned(models["8b"], 1, 8, "train.save_every=50")
    assert (saves.hours - made.hours) * 3600 == pytest.approx(2 * (476 // 50) * made.checkpoint_seconds)
    by_time = planned(models["8b"], 1, 8, "train.save_every=null")
    saved = (by_time.hours - made.hours) * 3600 / made.checkpoint_seconds
    assert saved == pytest.approx(2 * int(steps / 2 * 3600 / max(600, 20 * made.checkpoint_seconds)), abs=1e-6)


def test_an_engine_that_a_gpu_cannot_hold_is_told(models: dict[str, Path]) -> None:
    machine = gpu_machine("H100", nodes=1, per_node=8)
    large, small = (serving(recipe_of(models[name]), shape_of(models[name]), machine) for name in ("70b", "8b"))
    assert large.cache < 0 and large.fitting == 4 and small.cache > 0
    # two models and the base; alpaca_eval's own references are what they are compared with
    assert small.outputs == 3 * 805 and small.calls == 3 * 805
    assert small.usd == pytest.approx(small.calls * (1200 * 10 + 30) / 1e6)
    both = serving(recipe_of(models["8b"], "judge.both_orders=true"), shape_of(models["8b"]), machine)
    assert both.calls == 2 * small.calls


def test_on_cpus_the_memory_of_all_workers_counts(models: dict[str, Path]) -> None:
    recipe = recipe_of(models["8b"])
    made = plan(recipe, shape_of(models["8b"]), Machine(None, 2, 2, 64 * GIB))
    assert made.hours is None and not made.asked_fits and " of 64 GiB in 2 workers at the peak" in made.line
    assert plan(recipe, shape_of(models["8b"]), Machine(None, 2, 2, 1024 * GIB)).asked_fits


PAIRS = [TokenPair(i, [5] * p, [6] * c, [7] * r) for i, (p, c, r) in enumerate([(20, 40, 30), (12, 50, 8)])]


@pytest.mark.parametrize("lora", [None, {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "target_modules": "all-linear"}])
def test_operations_are_those_that_torch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora) -> None:
    """Attention aside, whose causal half a counter of whole products does not see."""
    monkeypatch.setattr(attention, "uses_cpu_kernels", lambda tensor: False)
    config = AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_config(config)
    model, batch = PolicyModel(add_adapters(lm, lora, seed=0) if lora else lm).train(), collate_pairs(PAIRS)
    save_tokens(tmp_path / "tokens", PAIRS)
    lengths = replace(measured(load_tokens(tmp_path / "tokens"), "here"), square=0.0)
    shape = shape_of(tmp_path)
    with FlopCounterMode(display=False) as forward:
        logps = model(batch)[0]
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()

    def products(counter: FlopCounterMode) -> int:
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    rows = len(PAIRS)
    assert rows * sum(forward_flops(shape, lengths)) == pytest.approx(products(forward), rel=0.02)
    both = rows * model_flops(shape, lengths, adapters=lora is not None)
    assert both == pytest.approx(products(forward) + products(backward), rel=0.03)


def test_lengths_are_measured_on_token_ids(tmp_path: Path) -> None:
    save_tokens(tmp_path / "tokens", PAIRS)
    found = measured(load_tokens(tmp_path / "tokens"), "here")
    assert found == Lengths(2, 2, 16.0, 32.0, 90, (60**2 + 50**2 + 62**2 + 20**2) / 4, "2 rows of here")
    assert found.row(shared=True) == 80 and found.row(shared=False) == found.counted == 96


def test_assumed_lengths_are_cut_as_the_recipe_cuts(models: dict[str, Path]) -> None:
    short = assumed(recipe_of(models["8b"], "data.max_length=256"), rows=1000)
    assert (short.prompt, short.completion, short.rows) == (128, 128, 744)
    assert short.longest == 2 * 256 - 128 and "assumed" in short.source


def otpo(*words: str):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def test_the_command_prints_the_plan(models: dict[str, Path]) -> None:
    shown = otpo("llama3_8b_otpo", f"model.path={models['70b']}", "--gpu", "h100", "--nodes", 2, "--gpus-per-node", 8)
    assert shown.exit_code == 0, shown.output
    for words in ("70.55 B parameters", "2 nodes of 8 H100s", "to make it fit, 1: train.optimizer=adamw_8bit", "USD",
                  "set generate.tensor_parallel_size=4", "judge: 2,415 calls", "assumed:"):  # fmt: skip
        assert words in shown.output
    row = otpo("llama3_8b_otpo", f"model.path={models['8b']}", "--gpu", "H100", "--table").output
    assert row.startswith("| 4 H100s | yes | ") and row.count("|") == 11


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--gpu", "GTX"], "expected one of B200, H200, H100"),
        (["--gpu", "H100", "--nodes", "0"], "--nodes must be at least 1"),
        (["--gpu", "H100", "--gpus-per-node", "0"], "--gpus-per-node must be at least 1"),
        (["--utilisation", "30"], "a share of the GPU's peak"),
        (["--gpu", "H100", "model.path=/nowhere/at-all"], "model.path: there is no folder '/nowhere/at-all' here"),
        (["--gpu", "H100", "model.path=s3://bucket/model"], "and that is an address"),
        (["--gpu", "H100", "train.use_gpu=false"], "the recipe trains on CPUs"),
        (["train.use_gpu=auto", "model.lora={}", "model.quantization=4bit"], "which needs a CUDA GPU"),
    ],
)
def test_what_cannot_be_planned_is_refused(models: dict[str, Path], words: list[str], refusal: str) -> None:
    shown = otpo("llama3_8b_otpo", f"model.path={models['8b']}", *words)
    assert isinstance(shown.exception, UserError) and refusal in str(shown.exception)


def test_a_recipe_without_methods_is_not_planned(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings(tmp_path, tiny_llama, methods={})))
    shown = otpo(tmp_path / "recipe.yaml")
    assert isinstance(shown.exception, UserError) and "methods is empty" in str(shown.exception)


def test_lengths_of_a_local_file_are_measured(tmp_path: Path, tiny_llama: Path) -> None:
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    write_pairs(tmp_path / "pairs.json", n=60)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    shown = otpo(tmp_path / "recipe.yaml", "train.epochs=2", "train.max_steps=null")
    assert shown.exit_code == 0, shown.output
    assert "60 rows of" in shown.output and "CPU workers" in shown.output
    assert make_recipe(tree).train.workers == 2 and "in 2 workers at the peak" in shown.output


def test_lengths_of_a_local_mix_are_measured(tmp_path: Path, tiny_llama: Path) -> None:
    for name, count in (("one", 60), ("two", 30)):
        write_pairs(tmp_path / f"{name}.json", n=count)
    sets = {name: {"path": str(tmp_path / f"{name}.json")} for name in ("one", "two")}
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    tree["data"] = {"datasets": sets, "validation": 0, "max_length": tree["data"].get("max_length", 64)}

    def planned_rows() -> str:
        (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
        shown = otpo(tmp_path / "recipe.yaml", "train.epochs=2", "train.max_steps=null")
        assert shown.exit_code == 0, shown.output
        return " ".join(shown.output.split())

    assert "90 rows of 2 data sets" in planned_rows()
    sets["one"]["limit"] = 10
    assert "40 rows of 2 data sets" in planned_rows()
    sets["one"]["path"] = "owner/name"
    said = planned_rows()
    assert "assumed to be like UltraFeedback" in said and "data.datasets.one is not here to be measured" in said


def test_a_run_tells_its_plan_before_it_trains(tmp_path: Path, tiny_llama: Path, ray_cluster: None) -> None:
    from pipeline.run.planned import say_plan
    from pipeline.run.run import open_context

    said: list[tuple[str, str]] = []
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods={"dpo": {}, "otpo": {}}))
    run = open_context(
        recipe, tmp_path / "run", world=None, redo=False, progress=lambda what, *rest: said.append((what, rest[-1]))
    )
    say_plan(run, ["dpo", "otpo"], run.sources.start, run.sources.tokens(), recipe.train)
    ((_, line),) = [each for each in said if each[0] == "plan"]
    shape = shape_of(tiny_llama)
    assert 2 * 16 * shape.parameters / 2 < float(line.split()[0]) * GIB and "GiB in 2 workers at the peak" in line
    assert torch.cuda.is_available() or "training" not in line

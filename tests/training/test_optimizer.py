"""AdamW with 8-bit states trains like AdamW, is resumed exactly, and its states have the planned bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.small_lm import small_lm
from support.steps import go, weights
from support.training import losses, settings
from torch.distributed.tensor import DTensor

from otpo.data.collate import collate_pairs
from otpo.errors import UserError, WorkError
from otpo.methods.spec import resolve
from otpo.models.checkpoint import load_checkpoint, save_checkpoint
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute, mesh_of
from otpo.records import TokenPair
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import STATE_BYTES, adamw, check_optimizer, set_learning_rate
from otpo.training.step import optimisation_step
from pipeline.progress import silent
from pipeline.recipe import ModelConfig, make_recipe
from pipeline.train.launcher import fit, make_job
from pipeline.train.tokens import prepare_tokens

LR = 1e-5
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "initializer_range": 0.05}  # fmt: skip

torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture
def eagerly():
    """The optimizer's kernels as they are: to compile them takes a CPU half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def start(mesh, name="adamw_8bit", **changes):
    model = distribute(PolicyModel(small_lm(**SIZES | changes)), mesh, dtype=torch.float32)
    return model, adamw(model, lr=LR, weight_decay=0.0, name=name)


def local(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def moments(optimizer) -> list[torch.Tensor]:
    return [local(state[name]) for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def kept_bytes(optimizer) -> int:
    """Bytes of the states, tables of codes included."""
    parts = []
    for moment in moments(optimizer):
        inner = moment.__tensor_flatten__()[0] if hasattr(moment, "codes") else None
        parts += [moment] if inner is None else [getattr(moment, name) for name in inner]
    return sum(part.nbytes for part in parts)


def course(mesh, name: str) -> tuple[list[float], torch.Tensor]:
    """Losses of 30 steps, each on other pairs, and how far all weights have moved by then."""
    model, optimizer = start(mesh, name)
    before, random = weights(model), Random(0)
    found = preference_losses(model, resolve("simpo", {}), lambda batch: {}, seed=0)
    losses = []
    for _ in range(30):
        ids = [[random.randrange(3, 64) for _ in range(6)] for _ in range(12)]
        batch = collate_pairs([TokenPair(row, *ids[3 * row : 3 * row + 3]) for row in range(4)])
        figures = optimisation_step(model, optimizer, [batch], found, denominator=4, max_grad_norm=1.0, lr=LR)
        losses.append(figures["loss"])
    return losses, torch.cat([(weight - before[name]).flatten() for name, weight in weights(model).items()])


@torchao
def test_it_trains_like_adamw(mesh, eagerly):
    """To a twentieth of what moves, by the same gradients of changing signs; with beta_1 = 0.8 it would be a fifth."""
    (exact, moved), (found, other) = course(mesh, "adamw"), course(mesh, "adamw_8bit")
    apart = max(abs(a - b) for a, b in zip(exact, found, strict=True))
    relative = float((other - moved).norm() / moved.norm())
    print(f"losses at most {apart:.1e} apart, movement {relative:.1%}")
    assert 0.01 < relative < 0.1 and 0 < apart < 1e-3


@torchao
def test_states_are_codes_of_8_bits_with_a_scale_for_each_block(mesh, eagerly):
    model, optimizer = start(mesh)
    go(model, optimizer, 2, lr=LR)
    for weight in (p for p in model.parameters() if p.numel() >= 4096):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[weight][name]
            assert moment.codes.dtype == torch.uint8 and moment.codes.shape == weight.shape
            assert moment.scale.numel() == weight.numel() // 256 and moment.scale.dtype == torch.float32
    norm = next(p for p in model.parameters() if p.numel() < 4096)
    assert (
        optimizer.state[norm]["exp_avg"].dtype == torch.float32
        and type(optimizer.state[norm]["exp_avg"]) is torch.Tensor
    )
    # a moment is the exact one to half a step of its codes, at most 1/14 of the value and 1/256 of its block's largest
    plain = torch.optim.AdamW([weight := torch.nn.Parameter(torch.zeros(64, 256))], lr=LR)
    from torchao.optim import AdamW8bit

    rounded = AdamW8bit([other := torch.nn.Parameter(torch.zeros(64, 256))], lr=LR)
    weight.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    other.grad = weight.grad.clone()
    plain.step(), rounded.step()
    for name in ("exp_avg", "exp_avg_sq"):
        true, found = plain.state[weight][name], rounded.state[other][name].dequantize()
        bound = torch.maximum(true.abs() / 14, true.abs().amax(1, keepdim=True) / 256)
        assert 0 < ((true - found).abs() / bound).max() <= 1


@torchao
def test_states_have_the_planned_bytes(mesh, eagerly):
    """Beside them norms in float32, and the tables of the 256 codes of each weight's two moments."""
    model, optimizer = start(mesh, vocab_size=512)
    go(model, optimizer, lr=LR)
    sizes = [p.numel() for p in model.parameters()]
    small = sum(n for n in sizes if n < 4096)
    tables = 2 * 256 * 4 * sum(n >= 4096 for n in sizes)
    planned = STATE_BYTES["adamw_8bit"] * sum(sizes)
    print(f"planned {planned:,.0f} B, kept {kept_bytes(optimizer):,}: {planned / kept_bytes(optimizer) - 1:+.2%}")
    assert kept_bytes(optimizer) == planned + (8 - STATE_BYTES["adamw_8bit"]) * small + tables
    assert kept_bytes(optimizer) == pytest.approx(planned, rel=0.04), "less, the larger a model's weights are"
    exact, plain = start(mesh, "adamw", vocab_size=512)
    go(exact, plain, lr=LR)
    assert kept_bytes(plain) == STATE_BYTES["adamw"] * sum(sizes)


@torchao
def test_a_loaded_checkpoint_goes_on_exactly_at_the_rate_of_its_step(mesh, tmp_path, eagerly):
    """The learning rate is a tensor that a checkpoint brings too: the next step must not keep it."""
    model, optimizer = start(mesh)
    go(model, optimizer, 3, lr=LR)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    expected, after = go(model, optimizer, 3, lr=LR / 3), weights(model)
    other, fresh = start(mesh)
    load_checkpoint(path, other, fresh)
    assert go(other, fresh, 3, lr=LR / 3) == expected
    assert all(torch.equal(weight, after[name]) for name, weight in weights(other).items())
    assert all(type(a) is type(b) for a, b in zip(moments(fresh), moments(optimizer), strict=True))


@torchao
def test_the_learning_rate_is_that_of_the_schedule(mesh, eagerly):
    """Without a rate nothing moves; at twice the rate a first step moves every weight twice as far."""
    moved = []
    for lr in (0.0, LR, 2 * LR):
        model, optimizer = start(mesh)
        before = weights(model)["lm.lm_head.weight"]
        go(model, optimizer, lr=lr)
        moved.append(weights(model)["lm.lm_head.weight"] - before)
    assert not moved[0].any()
    torch.testing.assert_close(moved[2], 2 * moved[1], rtol=0, atol=1e-7)
    assert moved[1].abs().max() == pytest.approx(LR, rel=0.01), "AdamW's first step is the rate itself"
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=LR)
    set_learning_rate(plain, 0.5)
    assert plain.param_groups[0]["lr"] == 0.5 and isinstance(plain.param_groups[0]["lr"], float)


@torchao
def test_gradients_are_clipped_before_they_become_states(mesh, eagerly):
    model, optimizer = start(mesh)
    go(model, optimizer, lr=LR)  # to a norm of 1
    first = {name: state["exp_avg"] for (name, _), state in zip(_grouped(model), optimizer.state.values(), strict=True)}
    squares = sum((m.dequantize() if hasattr(m, "codes") else m).square().sum() for m in first.values())
    assert float(squares.sqrt()) == pytest.approx(1 - 0.9, rel=0.01)


def _grouped(model):
    """Names of weights in the order of the optimizer's groups: matrices, then the others."""
    named = list(model.named_parameters())
    return [each for each in named if each[1].dim() > 1] + [each for each in named if each[1].dim() <= 1]


def test_adamw_is_torchs_own_fused_one(mesh):
    """The default is untouched: the same optimizer, its learning rate a number."""
    model, optimizer = start(mesh, "adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] and isinstance(group["lr"], float) for group in optimizer.param_groups)
    go(model, optimizer, 3, lr=LR)
    plain = distribute(PolicyModel(small_lm(**SIZES)), mesh, dtype=torch.float32)
    named = _grouped(plain)
    other = torch.optim.AdamW([weight for _, weight in named], lr=LR, weight_decay=0.0, fused=True)
    go(plain, other, 3, lr=LR)
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(model).items())


def test_what_is_missing_is_named_with_the_remedy(monkeypatch):
    check_optimizer("adamw", gpu=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torchao.*pip install torchao.*train.optimizer=adamw"):
        check_optimizer("adamw_8bit", gpu=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_optimizer("adamw_8bit", gpu=True)
    with pytest.raises(UserError, match=r"train.optimizer.*C\+\+ compiler"):
        check_optimizer("adamw_8bit", gpu=False)


@torchao
@pytest.mark.slow
def test_compiled_kernels_compute_the_same():
    """A GPU compiles them, and so does a CPU; here for one shape of a weight."""
    found = []
    for stance in ("default", "force_eager"):
        torch.manual_seed(0)
        model = torch.nn.Linear(256, 64, bias=False)
        optimizer = adamw(model, lr=LR, weight_decay=0.1, name="adamw_8bit")
        with torch.compiler.set_stance(stance):
            for step in range(3):
                model.weight.grad, version = torch.randn(64, 256), model.weight._version
                set_learning_rate(optimizer, LR * (step + 1))
                optimizer.step()
                assert model.weight._version > version, "else the next pass would compute with the weights before"
        found.append(model.weight.detach().clone())
    assert not torch.equal(found[0], torch.zeros(64, 256))
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)


@torchao
def test_a_library_that_transformers_loads_is_not_heard():
    """On a CPU torchao warns of its kernels for GPUs."""
    command = [sys.executable, "-c", "import otpo, torchao"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout == shown.stderr == ""


def _rank(rank: int, nodes: list[list[int]], folder: str, part: str) -> None:
    """A rank that trains and saves, or resumes. The first writes its losses and how its states are kept."""
    world = sum(len(ranks) for ranks in nodes)
    store = dist.FileStore(f"{folder}/store-{part}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    model, optimizer = start(mesh_of("cpu", nodes), **json.loads(Path(folder, "sizes").read_text()))
    out: dict = {}
    if part == "save":
        out["before"] = go(model, optimizer, 3, lr=LR)
        save_checkpoint(Path(folder), model, optimizer, {"step": 3, "world": world})
    else:
        try:
            load_checkpoint(Path(folder, "step-000003"), model, optimizer)
        except WorkError as error:
            out["error"] = str(error)
    if "error" not in out:
        out["after"] = [loss / world for loss in go(model, optimizer, 3, lr=LR)]  # each rank has all rows
    out["codes"] = sum(hasattr(moment, "codes") for moment in moments(optimizer))
    out["bytes"] = kept_bytes(optimizer)
    if rank == 0:
        Path(folder, f"{part}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


def _group(folder: Path, nodes: list[list[int]], part: str) -> dict:
    mp.spawn(_rank, (nodes, str(folder), part), nprocs=sum(len(ranks) for ranks in nodes))
    return json.loads((folder / f"{part}.json").read_text())


@torchao
@pytest.mark.slow
@pytest.mark.parametrize("nodes", [[[0, 1]], [[0], [1]]], ids=["full", "hybrid"])
def test_two_ranks_hold_half_of_the_states_and_go_on_exactly(tmp_path, nodes):
    (tmp_path / "sizes").write_text("{}")
    saved = _group(tmp_path, nodes, "save")
    resumed = _group(tmp_path, nodes, "load")
    assert resumed["after"] == saved["after"] and resumed["codes"] == saved["codes"] > 0
    weights = sum(p.numel() for p in small_lm(**SIZES).parameters())
    share = len(nodes[0])
    assert saved["bytes"] == pytest.approx(STATE_BYTES["adamw_8bit"] * weights / share, rel=0.1)
    alone = _group(tmp_path, [[0]], "alone")
    assert alone["after"] == pytest.approx(saved["after"], rel=1e-3)


@torchao
@pytest.mark.slow
def test_blocks_that_would_be_cut_are_told_in_words(tmp_path):
    """64 rows of 128 values over 3 ranks: 22 rows are no whole number of blocks."""
    (tmp_path / "sizes").write_text(json.dumps({"hidden_size": 128, "vocab_size": 150, "num_attention_heads": 2}))
    _group(tmp_path, [[0, 1]], "save")
    found = _group(tmp_path, [[0, 1, 2]], "load")
    assert "cannot be divided over 3 workers" in found["error"] and "that wrote it (2)" in found["error"]


@torchao
@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_exactly(ray_cluster, tmp_path, tiny_llama):
    """By two workers of Ray; the checkpoint of step 15 was being written."""
    labels = {"dpo": {"optimizer": "adamw_8bit", "save_every": 5}, "plain": {"method": "dpo"}}
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods=labels))
    data = recipe.data.path
    pairs = prepare_tokens(recipe, tmp_path, model=str(tiny_llama), source=data, supervised=False)
    made = {"model": ModelConfig(path=str(tiny_llama)), "tokens": pairs, "caches": tmp_path / "scorers"}
    jobs = [make_job(recipe, tmp_path, label, **made) for label in labels]

    def train(jobs):
        fit(jobs, tmp_path, name="m", train=recipe.train, cluster=recipe.cluster, progress=silent, cpus=1)

    train(jobs)
    whole, again = tmp_path / "models" / "dpo", tmp_path / "models" / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    (again / "checkpoints" / "step-000015" / "complete.json").unlink()
    train([replace(jobs[0], label="again", out=str(again))])
    assert losses(again) == losses(whole)
    apart = [abs(a - b) for a, b in zip(losses(whole), losses(tmp_path / "models" / "plain"), strict=True)]
    assert 0 < max(apart) < 0.01

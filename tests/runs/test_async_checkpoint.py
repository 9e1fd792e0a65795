"""Checkpoints written beside training: what they hold, and what a kill or a full disk in the middle leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.small_lm import small_lm
from support.steps import go, weights

from otpo.models.checkpoint import (
    MARK,
    CheckpointWriter,
    check_whole,
    complete_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute, mesh_of
from pipeline.train.faults.policy import FAILURE_FILE, writing_failures

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}  # 23 million weights


def trained(mesh, **changes):
    model = distribute(PolicyModel(small_lm(**changes)), mesh, dtype=torch.float32)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def test_it_holds_the_state_of_the_step_that_it_was_begun_after(mesh, tmp_path):
    """Training goes on meanwhile; weights, both moments and the number of steps are those of the call."""
    model, optimizer = trained(mesh)
    writer = CheckpointWriter(background=True)
    go(model, optimizer, 3)
    saved = weights(model)
    writer.save(tmp_path, model, optimizer, {"step": 3})
    later = go(model, optimizer, 3)
    path = writer.wait()
    assert path == tmp_path / "step-000003" and writer.wait() is None
    assert check_whole(path) == [] and complete_checkpoints(tmp_path) == [path]
    other, fresh = trained(mesh)
    assert load_checkpoint(path, other, fresh) == {"step": 3}
    assert all(torch.equal(weight, saved[name]) for name, weight in weights(other).items())
    assert go(other, fresh, 3) == later


def test_it_holds_what_one_that_training_waits_for_does(mesh, tmp_path):
    model, optimizer = trained(mesh)
    go(model, optimizer, 2)
    there = save_checkpoint(tmp_path / "waited", model, optimizer, {"step": 2})
    writer = CheckpointWriter(background=True)
    writer.save(tmp_path / "beside", model, optimizer, {"step": 2})
    beside = writer.wait()
    names = lambda path: sorted(file.name for file in path.iterdir())  # noqa: E731
    assert names(beside) == names(there) == [".metadata", "__0_0.distcp", MARK]
    states = []
    for path in (there, beside):
        other, fresh = trained(mesh)
        load_checkpoint(path, other, fresh)
        states.append(
            weights(other) | {f"{n} {k}": v for n, s in enumerate(fresh.state.values()) for k, v in s.items()}
        )
    assert states[0].keys() == states[1].keys() and len(states[0]) == 4 * len(weights(model))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_only_one_is_written_at_a_time(mesh, tmp_path):
    model, optimizer = trained(mesh)
    writer = CheckpointWriter(background=True)
    for step in (1, 2, 3):
        go(model, optimizer)
        writer.save(tmp_path, model, optimizer, {"step": step})
        assert len(complete_checkpoints(tmp_path)) >= step - 1, "the one before is complete"
    writer.wait()
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"step-00000{step}" for step in (1, 2, 3)]


# ---- a full disk ----


def sentence(folder: Path, fails) -> str:
    """What a worker tells of an error."""
    folder.mkdir()
    with pytest.raises(OSError, match="No space left"), writing_failures(folder / FAILURE_FILE):
        fails()
    kind, told = json.loads((folder / FAILURE_FILE).read_text())
    assert kind == "WorkError"
    return told


def test_a_full_disk_is_told_in_the_same_sentence(mesh, tmp_path, small_disk):
    """At the next step, not at the next checkpoint; the mark is not written."""
    model, optimizer = trained(mesh, hidden_size=256)
    go(model, optimizer)

    def beside() -> None:
        writer = CheckpointWriter(background=True)
        writer.save(small, model, optimizer, {"step": 1})
        until = time.monotonic() + 60
        while time.monotonic() < until:
            writer.check()

    small = small_disk("256k")
    told = sentence(tmp_path / "waited", lambda: save_checkpoint(small, model, optimizer, {"step": 1}))
    assert sentence(tmp_path / "beside", beside) == told
    assert "The disk is full" in told and "train.keep_checkpoints" in told
    assert complete_checkpoints(small) == []


# ---- a kill ----


def _train(rank: int, world: int, folder: str, dies: bool) -> None:
    """Two steps, a checkpoint after each; or what follows the newest checkpoint that is whole."""
    store = dist.FileStore(f"{folder}/store-{dies}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    model, optimizer = trained(mesh_of("cpu", [range(world)]), **WIDE)
    checkpoints, writer = Path(folder, "checkpoints"), CheckpointWriter(background=True)
    path, _ = newest_whole_checkpoint(checkpoints)
    step = load_checkpoint(path, model, optimizer)["step"] if path else 0
    while step < 3:
        loss = go(model, optimizer, lr=1e-4)
        step += 1
        if rank == 0:
            Path(folder, f"loss-{step}-{dies}.json").write_text(json.dumps(loss))
        if dies and step < 3:
            writer.save(checkpoints, model, optimizer, {"step": step})
    writer.wait()
    dist.destroy_process_group()


def _run(world: int, folder: Path, *, dies: bool) -> list[mp.Process]:
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_train, args=(rank, world, str(folder), dies)) for rank in range(world)]
    for each in ranks:
        each.start()
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_in_the_middle_of_a_write_leaves_the_one_before(tmp_path, world):
    """SIGKILL of every rank while shards of step 2 are being written: training goes on from step 1, with the losses
    that it had."""
    ranks = _run(world, tmp_path, dies=True)
    unfinished, until = tmp_path / "checkpoints" / "step-000002", time.monotonic() + 120
    while not list(unfinished.glob("__0_*")):
        assert time.monotonic() < until and all(each.is_alive() for each in ranks)
    for each in ranks:
        each.kill()
    for each in ranks:
        each.join()
    assert [each.exitcode for each in ranks] == [-9] * world
    assert not (unfinished / MARK).exists() and list(unfinished.glob("__0_*"))
    assert complete_checkpoints(tmp_path / "checkpoints") == [tmp_path / "checkpoints" / "step-000001"]
    before = json.loads((tmp_path / "loss-2-True.json").read_text())
    for each in (again := _run(world, tmp_path, dies=False)):
        each.join()
    assert [each.exitcode for each in again] == [0] * world
    assert not (tmp_path / "loss-1-False.json").exists(), "it did not begin anew"
    assert json.loads((tmp_path / "loss-2-False.json").read_text()) == pytest.approx(before, abs=1e-6)

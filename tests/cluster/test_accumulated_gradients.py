"""What gradients keep between the micro-batches of a step: nothing whole, where each is reduced at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.small_lm import PAIRS, small_lm
from torch.distributed.fsdp import FSDPModule

from otpo.data.collate import collate_pairs
from otpo.methods.spec import resolve
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute, mesh_of
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import adamw
from otpo.training.step import optimisation_step


def kept_whole(model: torch.nn.Module) -> int:
    """Bytes of gradients of whole parameters that FSDP holds on this rank."""
    total = 0
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for each in group.fsdp_params if group else ():
            held = [each.unsharded_accumulated_grad, getattr(getattr(each, "_unsharded_param", None), "grad", None)]
            total += sum(grad.numel() * grad.element_size() for grad in held if grad is not None)
    return total


def train(rank: int, world: int, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    lm = small_lm()
    parameters = sum(weight.numel() for weight in lm.parameters())
    found = {}
    for name, reduce_each in (("each", True), ("once", False)):
        model = distribute(PolicyModel(lm if reduce_each else small_lm()), mesh_of("cpu", [range(world)]), dtype=dtype)
        batches, kept = [collate_pairs(PAIRS)] * 3, []
        with torch.no_grad():
            reference = model(batches[0])[0]
        losses = preference_losses(model, resolve("dpo", {}), lambda batch: {"reference": reference}, seed=0)  # noqa: B023

        def looked_at(batch):
            kept.append(kept_whole(model) / parameters)  # noqa: B023
            return losses(batch)  # noqa: B023

        optimisation_step(
            model, adamw(model, lr=1e-3, weight_decay=0.0), batches, looked_at, denominator=3.0 * len(PAIRS),
            max_grad_norm=1.0, lr=1e-3, reduce_each=reduce_each,
        )  # fmt: skip
        found[name] = kept
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_whole_gradient_waits_for_the_next_micro_batch(tmp_path, world, dtype):
    """On GPUs each micro-batch is reduced; reduced once a step, every rank holds 4 bytes of each parameter."""
    mp.spawn(train, (world, str(tmp_path), dtype), nprocs=world)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["each"] == [0.0, 0.0, 0.0]
    assert found["once"][0] == 0.0 and found["once"][1:] == pytest.approx([4.0, 4.0], rel=0.01)

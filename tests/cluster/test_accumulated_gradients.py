"""What gradients keep between the micro-batches of a step: nothing whole, where each is reduced at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.small_lm import PAIRS, small_lm
from torch.distributed.device_mesh import DeviceMesh
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


def kept_at_each(mesh: DeviceMesh, dtype: torch.dtype, *, reduce_each: bool) -> list[float]:
    """Bytes of whole gradients, a parameter, that wait when each of a step's three micro-batches begins."""
    lm = small_lm()
    parameters = sum(weight.numel() for weight in lm.parameters())
    model = distribute(PolicyModel(lm), mesh, dtype=dtype)
    batch, kept = collate_pairs(PAIRS), []
    with torch.no_grad():
        reference = model(batch)[0]
    losses = preference_losses(model, resolve("dpo", {}), lambda batch: {"reference": reference}, seed=0)

    def looked_at(batch):
        kept.append(kept_whole(model) / parameters)
        return losses(batch)

    optimisation_step(
        model, adamw(model, lr=1e-3, weight_decay=0.0), [batch] * 3, looked_at, denominator=3.0 * len(PAIRS),
        max_grad_norm=1.0, lr=1e-3, reduce_each=reduce_each,
    )  # fmt: skip
    return kept


def train(rank: int, world: int, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    mesh = mesh_of("cpu", [range(world)])
    found = {name: kept_at_each(mesh, dtype, reduce_each=each) for name, each in (("each", True), ("once", False))}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_no_whole_gradient_waits_for_the_next_micro_batch(tmp_path, world, dtype):
    """On GPUs each micro-batch is reduced; reduced once a step, every rank holds 4 bytes of each parameter."""
    mp.spawn(train, (world, str(tmp_path), dtype), nprocs=world)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["each"] == [0.0, 0.0, 0.0]
    assert found["once"][0] == 0.0 and found["once"][1:] == pytest.approx([4.0, 4.0], rel=0.01)

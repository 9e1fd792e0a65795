"""The weights of a trained model as they are saved, gathered from its ranks a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from otpo.models.adapters import has_adapters, merged_weights
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.models.sharding import decoder_layers
from otpo.ranks import rank

ADAPTED = ".base_layer"  # what peft adds to the name of a weight that has an adapter
BESIDE = re.compile(r"\.(?:base_layer|lora_)")


@torch.no_grad()
def gathered_weights(
    model: PolicyModel | RewardModel, dtype: torch.dtype, others: Mapping[str, torch.dtype] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The weights of a model by transformers' names, part by part, on rank 0's CPU. A layer is one part.

    Weights that are another's are left out. Adapters are merged into the weights that they were trained beside, which
    keep their precision: the sum is made in float32 and rounded once.

    Args:
        dtype: to round to, where there are no adapters.
        others: weights that are rounded to another precision.

    Yields:
        The weights of one part; nothing on other ranks, which must go over all parts too.
    """
    lm, adapted, others = model.lm, has_adapters(model.lm), others or {}
    copies = copied_weights(lm)
    for names in _parts(model):
        if adapted:
            with _whole(lm, names) as tensors:
                found: dict[str, Tensor | None] = {**merged_weights(lm, tensors)}
        else:
            found = {
                name: _on_first(_rounded(lm.get_parameter_or_buffer(name).detach(), others.get(name, dtype)))
                for name in names
                if name not in copies
            }
        yield {
            name.replace(ADAPTED, ""): tensor.cpu()
            for name, tensor in found.items()
            if tensor is not None and name not in copies
        }


def _on_first(tensor: Tensor) -> Tensor | None:
    """A whole tensor on rank 0, None on others. All ranks must call it.

    The parts arrive in their place: `full_tensor` would hold the whole twice, on every rank.
    """
    first = rank() == 0
    if not isinstance(tensor, DTensor):
        return tensor if first else None
    mesh = tensor.device_mesh.mesh
    local, ranks = tensor.to_local(), mesh.reshape(-1, mesh.shape[-1])[0].tolist()  # of rank 0's node, if it has all
    if not first:
        if local.numel() and rank() in ranks:
            dist.send(local.contiguous(), 0)
        return None
    if len(ranks) == 1:
        return local
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=local.device)
    # there are fewer parts than ranks where there are few rows
    for source, part in zip(ranks, whole.chunk(len(ranks)), strict=False):
        if source == 0:
            part.copy_(local)
        else:
            dist.recv(part, source)
    return whole


def copied_weights(lm: PreTrainedModel) -> set[str]:
    """Names of weights that are another's, by their storage. transformers ties them again when it loads the others."""
    sources = set(lm.all_tied_weights_keys.values())
    uses: dict[int, list[str]] = {}
    for name, weight in lm.named_parameters(remove_duplicate=False):
        uses.setdefault(id(weight), []).append(name)
    kept = {next((name for name in names if name in sources), names[0]) for names in uses.values()}
    return {name for names in uses.values() for name in names} - kept


def _parts(model: PolicyModel | RewardModel) -> list[list[str]]:
    """Names of all weights, those of a layer together, and of what is outside the layers those of a module.

    transformers splits and joins weights when it saves them, but none of different layers.
    """
    lm, layers = model.lm, set(decoder_layers(model))
    places = [f"{name}." for name, module in lm.named_modules() if module in layers]
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        name = name.removeprefix("lm.")
        module = BESIDE.split(name)[0] if BESIDE.search(name) else name.rpartition(".")[0]
        parts.setdefault(next((place for place in places if name.startswith(place)), module), []).append(name)
    return list(parts.values())


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # numbers of experts and the like are no weights, and have no other precision
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _whole(lm: PreTrainedModel, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Put whole weights in the place of sharded ones while the body runs, on rank 0. Others get none."""
    sharded = {name: lm.get_parameter_or_buffer(name) for name in names}
    gathered = {name: _on_first(tensor.detach()) for name, tensor in sharded.items()}
    found = {
        name: nn.Parameter(tensor, requires_grad=False) if isinstance(sharded[name], nn.Parameter) else tensor
        for name, tensor in gathered.items()
        if tensor is not None
    }
    for name, tensor in found.items():
        _put(lm, name, tensor)
    try:
        yield found
    finally:
        for name, tensor in sharded.items():
            _put(lm, name, tensor)


def _put(lm: PreTrainedModel, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(lm.get_submodule(path), attribute, tensor)

"""A model whose weights are read once it is sharded, so that no GPU ever holds it whole.

transformers builds it on the meta device and checks names and shapes of its files there; buffers that are in no file
are computed. After sharding, each rank reads its own slices of the safetensors files. Where transformers converts
weights while it loads them, or they lie in other files, rank 0 loads the model on the CPU and sends each rank its part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.utils import cached_file

from otpo.models.disk.stored import Place, model_places, same_bytes
from otpo.ranks import from_rank_0, rank

ON_META: dict[str, Any] = {"device_map": {"": "meta"}}
"""Options of `from_pretrained` that leave the weights in their files."""
WAITING = "weights_to_read"  # attribute of a deferred model


@dataclass(frozen=True)
class Use:
    """A use of a weight: where it stands in the model, and its name there."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> Tensor:
        """What stands there now."""
        return getattr(self.module, self.attribute)


@dataclass(frozen=True)
class Deferred:
    """Weights that are not read yet.

    Attributes:
        uses: of all weights; a tied one has several.
        places: name -> where a weight lies; empty where rank 0 sends them.
        whole: the loaded model on rank 0, where it sends them.
        new: names of weights that are in no file and begin at zero.
    """

    uses: tuple[Use, ...]
    places: dict[str, Place]
    whole: PreTrainedModel | None
    new: frozenset[str]


def defer(
    lm: PreTrainedModel, path: str | Path, load: Callable[[], PreTrainedModel], *, new: Collection[str] = ()
) -> None:
    """Prepare a model that was loaded with `ON_META`, to be sharded and then given to `read_weights`.

    Its attribute `weights_sent` says why rank 0 sends the weights, and is empty where each rank reads its own. All
    ranks must call it; rank 0 alone looks at the files.

    Args:
        load: gives the same model with its weights, on the CPU.
        new: names of weights that are in no file and begin at zero.
    """
    _compute_buffers(lm)
    uses = tuple(_use(lm, name) for name in lm.state_dict())
    found: Any = None
    whole = None
    if rank() == 0:
        ties = lm.all_tied_weights_keys
        stored = model_places(Path(str(cached_file(str(path), "config.json"))).parent)
        if why := _why_sent(lm, uses, stored, new):
            whole = load()
            found = ({}, why, [copy for copy, source in ties.items() if _is_one(whole, copy, source)])
        else:
            found = (stored, "", [copy for copy, source in ties.items() if _are_equal(stored, copy, source)])
    places, why, copies = from_rank_0(found)
    for copy, source in list(lm.all_tied_weights_keys.items()):
        if copy in copies:
            use = _use(lm, copy)
            setattr(use.module, use.attribute, lm.get_parameter(source))
        else:
            del lm.all_tied_weights_keys[copy]
    model: Any = lm
    model.weights_sent = why
    setattr(model, WAITING, Deferred(uses, places, whole, frozenset(new)))


def is_deferred(lm: PreTrainedModel) -> bool:
    """Whether a model waits for `read_weights`."""
    return hasattr(lm, WAITING)


@torch.no_grad()
def read_weights(lm: PreTrainedModel, device: torch.device | str) -> None:
    """Give a deferred model its weights, in the precision and the shards of what stands in their place.

    A rank holds no more than its shards and one weight. All ranks must call it.
    """
    deferred: Deferred = getattr(lm, WAITING)
    delattr(lm, WAITING)
    weights: dict[int, list[Use]] = {}
    for use in deferred.uses:
        weights.setdefault(id(use.tensor), []).append(use)
    for uses in weights.values():
        like = uses[0].tensor
        part = _part(deferred, [use.name for use in uses], like, device)
        if isinstance(like, nn.Parameter):
            part = nn.Parameter(part, requires_grad=like.requires_grad)
        for use in uses:
            setattr(use.module, use.attribute, part)


def _part(deferred: Deferred, names: list[str], like: Tensor, device: torch.device | str) -> Tensor:
    """This rank's part of the weight with these names; `like` is its stand-in, sharded or not."""
    if deferred.new.intersection(names):
        return torch.zeros_like(like, device=device)
    if deferred.places:
        return _read(deferred.places, names, like, device)
    if deferred.whole is not None:
        whole = deferred.whole.get_parameter_or_buffer(names[0]).to(device=device, dtype=like.dtype).contiguous()
    else:
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    if dist.is_initialized():
        dist.broadcast(whole, 0)
    return whole


def _read(places: dict[str, Place], names: list[str], like: Tensor, device: torch.device | str) -> Tensor:
    name = next(name for name in names if name in places)
    shape, offsets = tuple(like.shape), (0,) * like.dim()
    if isinstance(like, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    # not mapped: a mapped file would be counted as this process's memory, and is slow over a network
    with safe_open(places[name].path, framework="pt", backend="pread") as file:
        stored = file.get_slice(name)[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
    part = stored.to(device=device, dtype=like.dtype)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _compute_buffers(lm: PreTrainedModel) -> None:
    """Compute the buffers that are in no file, as `from_pretrained` does for a model that it loads with its weights."""
    for name, buffer in list(lm.named_non_persistent_buffers()):
        use = _use(lm, name)
        setattr(use.module, use.attribute, torch.empty_like(buffer, device="cpu"))
    modules: list[Any] = list(lm.modules())
    for module in modules:  # all: some compute buffers of the modules inside them
        module._is_hf_initialized = False
    lm.initialize_weights()


def _why_sent(lm: PreTrainedModel, uses: Collection[Use], stored: dict[str, Place], new: Collection[str]) -> str:
    """Why a rank cannot read its slices by the names of a model's weights; empty if it can."""
    if not stored:
        return "they are not in safetensors files"
    if lm._weight_conversions:
        return "transformers converts them while it loads them"
    shapes = {id(use.tensor): tuple(use.tensor.shape) for use in uses if use.name not in new}
    found = {id(use.tensor): stored[use.name].kind[1] for use in uses if use.name in stored}
    if shapes != {key: found.get(key) for key in shapes}:
        return "their names or sizes in the files are others"
    return ""


def _is_one(lm: PreTrainedModel, copy: str, source: str) -> bool:
    return lm.get_parameter(copy) is lm.get_parameter(source)


def _are_equal(stored: dict[str, Place], copy: str, source: str) -> bool:
    """Whether a tied weight is what it is tied to: by their values, where the files hold both."""
    return copy not in stored or source not in stored or same_bytes(stored[copy], stored[source])


def _use(lm: PreTrainedModel, name: str) -> Use:
    path, _, attribute = name.rpartition(".")
    return Use(lm.get_submodule(path), attribute, name)

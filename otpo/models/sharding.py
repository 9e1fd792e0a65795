"""Float32 master weights and low-precision compute: sharded by FSDP2 over several workers, or whole on one."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from otpo.errors import UserError
from otpo.kernels.mixed_precision import compute_in
from otpo.models.disk.deferred import is_deferred, read_weights
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel

Model = TypeVar("Model", bound=PolicyModel | RewardModel)


def mesh_of(device: str, nodes: Sequence[Sequence[int]]) -> DeviceMesh:
    """The mesh to shard over: flat, or (nodes, workers of a node) for hybrid sharding. All ranks must call it.

    In the second, each node holds the whole model, sharded over its workers; only gradients travel between nodes.

    Args:
        device: "cpu" or "cuda".
        nodes: the ranks of each node, equally many; a single list shards over all of them.
    """
    if len(nodes) == 1:
        return init_device_mesh(device, (len(nodes[0]),))
    return DeviceMesh(device, [list(ranks) for ranks in nodes], mesh_dim_names=("replicate", "shard"))


def distribute(
    model: Model,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    keep_head: bool = False,
) -> Model:
    """Float32 master weights, compute in `dtype`: sharded over the workers of the mesh, or whole on a single one.

    The frozen weights beside adapters (`otpo.models.adapters`) keep the precision they were saved in.

    Args:
        keep_head: see `shard`.
    """
    if mesh.size() > 1:
        return shard(model, mesh, dtype=dtype, activation_checkpointing=activation_checkpointing, keep_head=keep_head)
    _prepare(model, mesh.device_type, activation_checkpointing)
    compute_in(dtype, _with_master_weights(model), decoder_layers(model), model.forward_methods)
    return model


def shard(
    model: Model,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    keep_head: bool = False,
) -> Model:
    """FSDP2 over the mesh (`mesh_of`): float32 master weights, compute in `dtype`, gradients reduced in float32.

    Each decoder layer is a unit of its own; embeddings, final norm and head belong to the root. Gradients come out as
    the mean over ranks: a loss divided by the global number of pairs must be multiplied by the world size.

    The frozen weights beside adapters are sharded like the others; 4-bit weights cannot be sharded and lie whole on
    every rank.

    Args:
        keep_head: keep the root's weights whole after a forward pass. For a frozen model whose head is read by the
            policy's backward pass (`LazyLogits`).
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    unsharded = {p for p in model.parameters() if not p.is_floating_point()}
    _prepare(model, mesh.device_type, activation_checkpointing)
    for layer in _units(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=unsharded)
    # Without resharding, a forward pass without a backward pass (frozen models, evaluation) would leave the root whole:
    # an optimizer or a checkpoint made then would hold the whole copies, which are never updated.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_head, ignored_params=unsharded)
    if is_deferred(model.lm):
        read_weights(model.lm, mesh.device_type)
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)
    return _with_master_weights(model)  # after sharding: an 8B model in float32 would take 32 GB on every device


def _with_master_weights(model: Model) -> Model:
    if all(p.requires_grad for p in model.parameters()):
        model.float()
    return model


def _prepare(model: PolicyModel | RewardModel, device: str, activation_checkpointing: bool) -> None:
    # loading has put quantised weights there already, and deferred ones are read there
    if all(p.is_floating_point() for p in model.parameters()) and not is_deferred(model.lm):
        model.to(device)
    if activation_checkpointing:
        checkpoint_layers(model)


def checkpoint_layers(model: PolicyModel | RewardModel) -> None:
    """Let each decoder layer keep only its inputs for backward and compute the rest again.

    transformers does so only in train mode, which would wake dropout and router jitter. A layer's hooks (FSDP2's, those
    of `otpo.kernels.mixed_precision`) run again too, so that backward finds the weights ready.

    Raises:
        UserError: no layers were found.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"train.activation_checkpointing: {type(model.lm).__name__} does not name its layers, so nothing could be"
            " computed again. Leave the key out."
        )
    kinds: dict[type, type] = {kind: _checkpointed(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = kinds[type(layer)]


def _checkpointed(kind: Any) -> type:
    """A class of layers that are computed again in backward."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(kind.__call__, self, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def decoder_layers(model: PolicyModel | RewardModel) -> list[nn.Module]:
    """The layers of a model's decoder, first to last."""
    return layers_of(model.lm)


def layers_of(lm: Any) -> list[nn.Module]:
    """As `decoder_layers`, of transformers' own model."""
    names = set(lm._no_split_modules or ())  # how transformers marks layers that stay in one piece
    # FSDP2 gives a sharded layer a class of its own, derived from the layer's
    named = [m for m in lm.modules() if names.intersection(kind.__name__ for kind in type(m).__mro__)]
    named = named or [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {part for layer in named for part in layer.modules() if part is not layer}  # some classes mark parts too
    return [layer for layer in named if layer not in inner]


def _units(model: PolicyModel | RewardModel) -> list[nn.Module]:
    """The layers that FSDP2 can shard by themselves. It would untie a weight that another part of the model shares."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    owned = {
        layer: Counter(id(p) for _, p in layer.named_parameters(remove_duplicate=False))
        for layer in decoder_layers(model)
    }
    return [layer for layer, own in owned.items() if all(uses[key] == count for key, count in own.items())]

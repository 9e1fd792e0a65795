"""Mixed precision on one worker: compute in a low precision, keep weights and gradients in float32.

What FSDP2's `MixedPrecisionPolicy` does, less what only several workers need: nothing is gathered, cut or reduced,
a weight is cast once after it changed, not in every pass, and gradients of tied weights add up in float32 too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(dtype: torch.dtype, model: nn.Module, layers: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Let a model compute with copies of its weights in `dtype`; between passes it holds the weights themselves.

    Gradients arrive at the weights themselves, added up in their own precision over backward passes and, of tied
    weights, over the places where they stand.

    Args:
        layers: parts of the model that backward may enter by themselves (activation checkpointing).
        methods: names of the model's methods that use its weights, beside `forward`.
    """
    taken: set[tuple[nn.Module, str]] = set()
    copies: dict[nn.Parameter, _Copy] = {}
    for unit in (*layers, model):  # the model last: its own part is what no layer holds
        places = []
        for module in unit.modules():
            for name, weight in module.named_parameters(recurse=False):
                if (module, name) not in taken and weight.is_floating_point() and weight.dtype != dtype:
                    taken.add((module, name))
                    if weight not in copies:  # tied weights share one
                        copies[weight] = _Copy(weight, dtype)
                    places.append(_Place(module, name, copies[weight]))
                    if isinstance(module, nn.Embedding) and weight.device.type == "cpu":
                        module.sparse = True  # a dense gradient is as large as the vocabulary, and mostly zeros
        swap = _Swap(places)
        unit.register_forward_pre_hook(lambda *_, swap=swap: swap.enter())
        unit.register_forward_hook(lambda *_, swap=swap: swap.leave(), always_call=True)
    for name in methods:
        setattr(model, name, swap.around(getattr(model, name)))


class _Copy:
    """A weight and its copy in a lower precision."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype):
        self.weight = weight
        self.low = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self.version: int | None = None
        # on a CPU fresh memory costs more than what is done to it: gradients come to the same place in every step
        self.gradient = torch.empty_like(weight) if weight.requires_grad and weight.device.type == "cpu" else None

    def refresh(self) -> None:
        if self.version != self.weight._version:
            self.low.copy_(self.weight.detach())
            self.version = self.weight._version

    def add_gradient(self, low: Tensor) -> None:
        """Take the gradient that has arrived at a stand-in, and add it to the weight's own."""
        grad, low.grad = low.grad, None
        assert grad is not None
        if self.weight.grad is not None:
            self.weight.grad += grad
        elif self.gradient is None:
            self.weight.grad = grad.to(self.weight.dtype)
        elif grad.is_sparse:
            self.weight.grad = self.gradient.zero_().add_(grad)
        else:
            self.weight.grad = self.gradient.copy_(grad)


class _Place:
    """Where a weight stands in a model, and what stands in for it while that computes.

    A tied weight has a stand-in for each of its places: autograd would add up the gradients of a single one in the low
    precision.
    """

    def __init__(self, module: nn.Module, name: str, copy: _Copy):
        self.module, self.name, self.copy = module, name, copy
        self.low = nn.Parameter(copy.low, requires_grad=copy.weight.requires_grad)
        if copy.weight.requires_grad:
            self.low.register_post_accumulate_grad_hook(copy.add_gradient)

    def enter(self) -> None:
        self.copy.refresh()
        self.low.requires_grad_(self.copy.weight.requires_grad)
        self.module._parameters[self.name] = self.low

    def leave(self) -> None:
        self.module._parameters[self.name] = self.copy.weight


class _Swap:
    """Weights of one part of a model, in whose places their copies stand while it computes."""

    def __init__(self, places: list[_Place]):
        self.places = places

    def enter(self) -> None:
        for place in self.places:
            place.enter()

    def leave(self) -> None:
        for place in self.places:
            place.leave()

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return method(*args, **kwargs)
            finally:
                self.leave()

        return call

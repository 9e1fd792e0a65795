"""Mixed precision on one worker: compute in a low precision, keep weights and gradients in float32.

What FSDP2's `MixedPrecisionPolicy` does, less what only several workers need: nothing is gathered, cut or reduced, and
a weight is cast once after it changed, not in every pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(dtype: torch.dtype, model: nn.Module, layers: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Let a model compute with copies of its weights in `dtype`; between passes it holds the weights themselves.

    Gradients arrive at the weights themselves, added up in their own precision over backward passes.

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
                    places.append((module, name, copies[weight]))
        swap = _Swap(places)
        unit.register_forward_pre_hook(lambda *_, swap=swap: swap.enter())
        unit.register_forward_hook(lambda *_, swap=swap: swap.leave(), always_call=True)
    for name in methods:
        setattr(model, name, swap.around(getattr(model, name)))


class _Copy:
    """A weight and its copy in a lower precision."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype):
        self.weight = weight
        self.low = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=weight.requires_grad)
        self.version: int | None = None
        if weight.requires_grad:
            self.low.register_post_accumulate_grad_hook(self._hand_over)

    def current(self) -> nn.Parameter:
        if self.version != self.weight._version:
            self.low.data.copy_(self.weight.detach())
            self.version = self.weight._version
        self.low.requires_grad_(self.weight.requires_grad)
        return self.low

    def _hand_over(self, low: Tensor) -> None:
        grad, low.grad = low.grad, None
        assert grad is not None
        if self.weight.grad is None:
            self.weight.grad = grad.to(self.weight.dtype)
        else:
            self.weight.grad += grad


class _Swap:
    """Weights of one part of a model, in whose places their copies stand while it computes."""

    def __init__(self, places: list[tuple[nn.Module, str, _Copy]]):
        self.places = places

    def enter(self) -> None:
        for module, name, copy in self.places:
            module._parameters[name] = copy.current()

    def leave(self) -> None:
        for module, name, copy in self.places:
            module._parameters[name] = copy.weight

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return method(*args, **kwargs)
            finally:
                self.leave()

        return call

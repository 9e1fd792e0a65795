"""Mixed precision for one worker, on a CPU or a GPU: compute in a low precision, keep weights and gradients in float32.

It does what FSDP2's `MixedPrecisionPolicy` does, without the work that only several workers need: nothing is gathered,
sharded or reduced, a weight is cast once after each update rather than in every pass, and gradients of tied weights add
up in float32 too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from otpo.kernels.cpu import uses_cpu_kernels


def compute_in(dtype: torch.dtype, model: nn.Module, layers: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Let a model compute with copies of its weights in `dtype`; outside a pass it holds the weights themselves.

    Gradients arrive at the weights themselves. They add up in the weights' own precision over backward passes and, for
    tied weights, over the modules that share them.

    Args:
        layers: parts of the model that backward may enter on its own (activation checkpointing).
        methods: names of the model's methods, beside `forward`, that use its weights.
    """
    taken: set[tuple[nn.Module, str]] = set()
    copies: dict[nn.Parameter, _Copy] = {}
    for unit in (*layers, model):  # the model last: its own part is what no layer holds
        slots = []
        for module in unit.modules():
            for name, weight in module.named_parameters(recurse=False):
                if (module, name) not in taken and weight.is_floating_point() and weight.dtype != dtype:
                    taken.add((module, name))
                    if weight not in copies:  # tied weights share one
                        copies[weight] = _Copy(weight, dtype)
                    slots.append(_Slot(module, name, copies[weight]))
                    if isinstance(module, nn.Embedding) and uses_cpu_kernels(weight):
                        module.sparse = True  # a dense gradient is as large as the vocabulary, and mostly zeros
        swap = _Swap(slots)
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
        # fresh memory costs a CPU more than the sum written to it: every step writes gradients to the same memory
        self.gradient = torch.empty_like(weight) if weight.requires_grad and uses_cpu_kernels(weight) else None

    def refresh(self) -> None:
        if self.version != self.weight._version:
            self.low.copy_(self.weight.detach())
            self.version = self.weight._version

    def add_gradient(self, low: Tensor) -> None:
        """Move the gradient that has arrived at a stand-in to the weight itself."""
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


class _Slot:
    """One use of a weight in a model, and the stand-in that takes its place while the model computes.

    A tied weight has a stand-in for each use: autograd would add up the gradients of a single one in the low precision.
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
    """Swaps the weights of one part of a model for their stand-ins while that part computes."""

    def __init__(self, slots: list[_Slot]):
        self.slots = slots

    def enter(self) -> None:
        for slot in self.slots:
            slot.enter()

    def leave(self) -> None:
        for slot in self.slots:
            slot.leave()

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return method(*args, **kwargs)
            finally:
                self.leave()

        return call

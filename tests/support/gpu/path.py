"""The way of computing that GPUs take, on a CPU: what is launched, and where the host would wait for the device."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from otpo.kernels import logprobs, mixed_precision
from otpo.kernels.cpu import buckets
from otpo.methods.weights import transport
from otpo.models import attention
from support.gpu.varlen import through_varlen

ROOT = Path(__file__).resolve().parents[3]
VIEWS = {  # they launch nothing
    "view", "_unsafe_view", "transpose", "t", "expand", "slice", "split", "split_with_sizes", "select", "detach",
    "permute", "unsqueeze", "squeeze", "as_strided", "alias", "unbind", "_reshape_alias", "diagonal", "chunk",
    "lift_fresh", "unfold", "empty", "empty_like", "new_empty", "empty_strided",
}  # fmt: skip
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Launches(TorchDispatchMode):
    """Counts operations that are dispatched, and where the host would wait for a GPU.

    Attributes:
        operations: name -> how often. waits: (what, line of ours) -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.off = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if not self.off:
            if name not in VIEWS:
                self.operations[name] += 1
            by_mask = name in INDEXING and any(
                isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
            if name in WAITING or by_mask:
                self.wait(name)
        return function(*args, **(kwargs or {}))

    def wait(self, what: str) -> None:
        """Note that the host waits here."""
        if self.off:
            return
        frames = [f for f in traceback.extract_stack() if str(ROOT) in f.filename and "tests" not in f.filename]
        line = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "autograd"
        self.waits[what, line] += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What runs meanwhile is one launch: a compiled function, a kernel."""
        self.operations["compiled"] += 1
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before


def take_gpu_path(monkeypatch, launches: Launches) -> None:
    """Compute as on a GPU: no CPU kernels, one call of attention a layer, the compiled solver."""
    for module in (attention, buckets, logprobs, mixed_precision, transport):
        monkeypatch.setattr(module, "uses_cpu_kernels", lambda tensor: False)
    through_varlen(monkeypatch, launches.uncounted)

    def iterate(*arguments):
        with launches.uncounted():
            return transport._iterate(*arguments)

    monkeypatch.setattr(transport, "_compiled_iterate", lambda: iterate)
    for name in ("tolist", "cpu", "numpy", "pin_memory"):
        monkeypatch.setattr(Tensor, name, _noting(getattr(Tensor, name), name, launches))
    made = torch.tensor

    def tensor(*args, **kwargs):
        if kwargs.get("device") is not None:
            launches.wait("torch.tensor(device=)")
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)


def _noting(method, name, launches):
    def call(self, *args, **kwargs):
        launches.wait(name)
        return method(self, *args, **kwargs)

    return call

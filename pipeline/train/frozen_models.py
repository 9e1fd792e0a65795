"""The frozen models of one job: the reference, and those that its method names (`oracle`, ...)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from otpo.dtypes import torch_dtype
from otpo.identity import model_fingerprint
from otpo.models.adapters import UnadaptedReference
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute
from otpo.ranks import barrier, from_rank_0, rank, world_size
from otpo.records import PromptCompletions
from otpo.training.objectives import CachedLogProbs
from otpo.training.objectives.base import Reference
from otpo.training.start_check import SAMPLE, check_cached, choose_rows
from pipeline.train.frozen_cache import FrozenLogProbs, cache_folder, fill_cache, one_group
from pipeline.train.job import TrainJob


class JobFrozenModels:
    """What an objective asks of frozen models (`otpo.training.objectives.FrozenModels`), on this rank.

    Args:
        policy: the trained model, before its first step: until then it is the reference.
        micro_batch_size, micro_batch_tokens: of training.
        prepare: called with each model that is loaded beside the policy, which is then used.

    Attributes:
        caches: name of a frozen model -> what `cached` has given.
        prompts: what it was asked for.
    """

    def __init__(
        self,
        job: TrainJob,
        policy: PolicyModel,
        mesh: DeviceMesh,
        *,
        micro_batch_size: int | None,
        micro_batch_tokens: int,
        prepare: Callable[[PolicyModel], object] = lambda model: None,
    ):
        self.job, self.policy, self.mesh = job, policy, mesh
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.prepare = prepare
        self.caches: dict[str, FrozenLogProbs] = {}
        self.prompts: Sequence[PromptCompletions] = []

    def cached(self, items: Sequence[PromptCompletions]) -> dict[str, CachedLogProbs]:
        """Log-probabilities of the items by each frozen model; see `FrozenModels`."""
        if not self.job.frozen_models:
            return {}
        self.prompts = items
        self.caches = {name: self._cached(path, items) for name, path in self.job.frozen_models.items()}
        return dict(self.caches)

    def live_reference(self) -> Reference:
        """The reference itself; see `FrozenModels`."""
        if self.job.lora is not None:
            return UnadaptedReference(self.policy)
        return self._load(self.job.model, keep_head=True)

    def _cached(self, path: str, items: Sequence[PromptCompletions]) -> FrozenLogProbs:
        is_start = path == self.job.model
        fingerprint = self.job.model_fingerprint
        if not is_start:  # a label that an earlier job trained has a fingerprint only now
            fingerprint = from_rank_0(model_fingerprint(path) if rank() == 0 else "")
        elif self.job.quantization != "none":
            fingerprint += f"-{self.job.quantization}"
        folder = cache_folder(
            Path(self.job.caches),
            model=fingerprint,
            dtype=self.job.train["dtype"],
            tokens=self.job.tokens_hash,
        )
        cache = FrozenLogProbs(folder)
        missing = from_rank_0(cache.missing(items))
        if is_start and not len(missing):  # the start's check compares it with what is trained
            return cache
        model = self.policy if is_start else self._load(path)
        with one_group(folder) if len(missing) else nullcontext():
            cache = FrozenLogProbs(folder)
            self._check(cache, model, items, from_rank_0(cache.missing(items)))
            fill_cache(
                folder,
                model,
                items,
                micro_batch_size=self.micro_batch_size,
                micro_batch_tokens=self.micro_batch_tokens,
                rank=rank(),
                world=world_size(),
            )
            barrier()
        return FrozenLogProbs(folder)

    def _check(
        self, cache: FrozenLogProbs, model: PolicyModel, items: Sequence[PromptCompletions], missing: np.ndarray
    ) -> None:
        """Compare a few of the rows that a cache holds already with the model that they are taken for."""
        known = np.setdiff1d(np.arange(len(items)), missing, assume_unique=True)[:SAMPLE]
        if len(known):
            rows = choose_rows([items[index] for index in known], self.mesh.device_type)
            check_cached(model, cache, rows, torch_dtype(self.job.train["dtype"]), where=str(cache.folder))

    def _load(self, path: str, *, keep_head: bool = False) -> PolicyModel:
        """A frozen model beside the policy."""
        lm = load_causal_lm(path, attn_implementation=self.job.attn_implementation, deferred=self.mesh.size() > 1)
        dtype = torch_dtype(self.job.train["dtype"])
        model = distribute(PolicyModel(lm), self.mesh, dtype=dtype, keep_head=keep_head)
        model.requires_grad_(False).eval()
        self.prepare(model)
        return model

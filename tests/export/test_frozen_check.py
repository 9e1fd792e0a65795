"""A cache of a frozen model's log-probabilities is used only for the model that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.small_lm import PAIRS, small_lm
from torch.distributed.device_mesh import init_device_mesh

from otpo.errors import UserError
from otpo.identity import model_fingerprint
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.training.objectives.pair import pair_prompts
from pipeline.train.frozen_cache import FrozenLogProbs, cache_folder, fill_cache
from pipeline.train.frozen_models import JobFrozenModels
from pipeline.train.job import TrainJob

ITEMS = list(pair_prompts(PAIRS))


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(folder: Path, seed: int) -> Path:
    lm = small_lm()
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    lm.save_pretrained(folder)
    return folder


def frozen_models(folder: Path, start: Path, oracle: Path, dtype: str) -> JobFrozenModels:
    job = TrainJob(
        label="tgdpo", model=str(start), model_fingerprint=model_fingerprint(start), attn_implementation="sdpa",
        tokens="", validation_tokens=None, out=str(folder), events="", train={"dtype": dtype, "micro_batch_size": 2},
        total_steps=1, method=None, frozen_models={"reference": str(start), "oracle": str(oracle)},
        caches=str(folder / "scorers"), tokens_hash="t", card="",
    )  # fmt: skip
    return JobFrozenModels(
        job,
        PolicyModel(load_causal_lm(start)).eval(),
        init_device_mesh("cpu", (1,)),
        micro_batch_size=2,
        micro_batch_tokens=4096,
    )


def fill(folder: Path, named: Path, model: Path, dtype: str, items=ITEMS) -> Path:
    """Write log-probabilities of `model` into the cache of `named`."""
    cache = cache_folder(folder / "scorers", model=model_fingerprint(named), dtype=dtype, tokens="t")
    fill_cache(
        cache,
        PolicyModel(load_causal_lm(model)).eval(),
        items,
        micro_batch_size=2,
        micro_batch_tokens=None,
        rank=0,
        world=1,
    )
    return cache


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("known", [1, 3])
def test_another_models_cache_is_refused_whole_or_in_part(tmp_path, dtype, known):
    start, oracle, other = (saved(tmp_path / name, seed) for seed, name in enumerate(("start", "oracle", "other")))
    cache = fill(tmp_path, oracle, other, dtype, ITEMS[:known])
    with pytest.raises(UserError, match=rf"{cache} are not those of {oracle}.*delete that folder") as refusal:
        frozen_models(tmp_path, start, oracle, dtype).cached(ITEMS)
    assert "differs by up to" in str(refusal.value)
    assert set(FrozenLogProbs(cache).rows) == {item.key for item in ITEMS[:known]}, "nothing was added to it"


@pytest.mark.parametrize("name", ["start", "oracle"])
def test_a_part_of_the_right_cache_is_completed(tmp_path, name):
    start, oracle = (saved(tmp_path / each, seed) for seed, each in enumerate(("start", "oracle")))
    fill(tmp_path, tmp_path / name, tmp_path / name, "fp32", ITEMS[:2])
    found = frozen_models(tmp_path, start, oracle, "fp32").cached(ITEMS)
    whole = fill(tmp_path / "again", tmp_path / name, tmp_path / name, "fp32")
    ours = found["reference" if name == "start" else "oracle"]
    for key, row in FrozenLogProbs(whole).rows.items():
        for index, logps in enumerate(row):
            assert ours.rows[key][index] == pytest.approx(logps, abs=1e-5)


def test_a_part_of_the_starts_cache_is_checked_before_rows_are_added(tmp_path):
    start, other = (saved(tmp_path / name, seed) for seed, name in enumerate(("start", "other")))
    fill(tmp_path, start, other, "fp32", ITEMS[:1])
    with pytest.raises(UserError, match=rf"are not those of {start}"):
        frozen_models(tmp_path, start, other, "fp32").cached(ITEMS)

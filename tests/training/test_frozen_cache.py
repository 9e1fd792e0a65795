"""The cache of frozen models' log-probabilities."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.small_lm import PAIRS, small_lm
from support.training import pairs_of, settings

from otpo.data.collate import collate_completions, collate_pairs
from otpo.models.policy import PolicyModel
from otpo.records import PromptCompletions, TokenCompletion, TokenPair
from otpo.training.objectives.pair import cached_pairs, pair_prompts
from pipeline.recipe import make_recipe
from pipeline.train import frozen_cache
from pipeline.train.frozen_cache import FrozenLogProbs, cache_folder, fill_cache, one_group
from pipeline.train.tokens import prepare_tokens

MANY = [TokenPair(row, p.prompt_ids, p.chosen_ids, [*p.rejected_ids, row % 50]) for row in range(23) for p in PAIRS[:1]]


@pytest.fixture(scope="module")
def model() -> PolicyModel:
    return PolicyModel(small_lm())


def fill(folder: Path, model, pairs, rank=0, world=1, size=2):
    return fill_cache(
        folder, model, list(pair_prompts(pairs)), micro_batch_size=size, micro_batch_tokens=None, rank=rank, world=world
    )


def beside(cache: FrozenLogProbs, batch) -> torch.Tensor:
    return cached_pairs({"reference": cache}, batch)["reference"]


def test_the_cache_gives_what_the_model_says_in_any_batch(tmp_path, model):
    fill(tmp_path, model, PAIRS)
    cache = FrozenLogProbs(tmp_path)
    for members in (PAIRS, PAIRS[::-1], PAIRS[1:2], [PAIRS[2], PAIRS[0]]):
        batch = collate_pairs(members)
        with torch.no_grad():
            torch.testing.assert_close(beside(cache, batch), model(batch)[0], rtol=1e-5, atol=1e-5)


def test_padding_is_zero(tmp_path, model):
    cache = fill(tmp_path, model, PAIRS)
    batch = collate_pairs([replace(PAIRS[0], row=-1), *PAIRS[1:]])
    values = beside(cache, batch)
    assert (values[[0, 3]] == 0).all() and (values[~batch.mask] == 0).all() and (values[1, :1] != 0).all()


def test_a_prompt_may_have_any_number_of_completions(tmp_path, model):
    completions = ([8, 9, 10], [13], [22, 23, 24, 25])
    items = [PromptCompletions(key, [5, 6, key], completions) for key in range(5)]
    cache = fill_cache(tmp_path, model, items, micro_batch_size=1, micro_batch_tokens=None, rank=0, world=1)
    for which, ids in enumerate(completions):
        batch = collate_completions([TokenCompletion(key, [5, 6, key], ids) for key in (3, 0)])
        for found in (cache, FrozenLogProbs(tmp_path)):
            with torch.no_grad():
                torch.testing.assert_close(
                    found.logprobs([3, 0], which, batch.mask), model(batch)[0], rtol=1e-5, atol=1e-5
                )


def test_parts_have_the_documented_format(tmp_path):
    """Caches outlive versions of this code."""
    arrays = {
        "rows": np.array([7, 4], np.int64),
        "lengths": np.array([[2, 1], [1, 3]], np.int64),
        "logps": -np.arange(1, 8, dtype=np.float32),
    }
    save_file(arrays, tmp_path / "part-a.safetensors")
    cache, mask = FrozenLogProbs(tmp_path), torch.ones(1, 3)
    assert cache.logprobs([4, 7], 0, mask).tolist() == [[-4, 0, 0], [-1, -2, 0]]
    assert cache.logprobs([4, 7], 1, mask).tolist() == [[-5, -6, -7], [-3, 0, 0]]


def test_ranks_share_the_work(tmp_path, model):
    for rank in range(3):
        folder = tmp_path / str(rank)
        fill(folder, model, MANY, rank=rank, world=3)
    rows = [set(FrozenLogProbs(tmp_path / str(rank)).rows) for rank in range(3)]
    assert set.union(*rows) == set(range(23)) and sum(map(len, rows)) == 23
    assert max(map(len, rows)) <= 8


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, model, monkeypatch):
    monkeypatch.setattr(frozen_cache, "PART_BATCHES", 2)
    passes = []

    class Dies(torch.nn.Module):
        def __init__(self, after):
            super().__init__()
            self.inner, self.left = model, after

        def forward(self, batch):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            passes.append(batch.rows[: len(batch.rows) // 2].tolist())
            return self.inner(batch)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Dies(5), MANY)
    kept = set(FrozenLogProbs(tmp_path).rows)
    assert len(kept) == 16, "two parts of two batches of four; the fifth batch is lost"
    passes.clear()
    fill(tmp_path, Dies(99), MANY)
    assert sorted(row for rows in passes for row in rows) == sorted(set(range(23)) - kept)
    assert set(FrozenLogProbs(tmp_path).rows) == set(range(23))
    passes.clear()
    fill(tmp_path, Dies(0), MANY)
    assert not passes, "a full cache runs no model"


def test_a_torn_file_is_not_a_part(tmp_path, model):
    fill(tmp_path, model, PAIRS)
    (tmp_path / ".part-torn.safetensors").write_bytes(b"half")
    assert set(FrozenLogProbs(tmp_path).rows) == {0, 1, 2}


def test_a_cache_belongs_to_a_model_a_precision_and_the_token_ids(tmp_path, tiny_llama):
    keys = [
        cache_folder(tmp_path, model=m, dtype=d, tokens=t) for m in "ab" for d in ("fp32", "bf16") for t in ("1", "2")
    ]
    assert len(set(keys)) == 8

    def tokens(*changes):
        tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
        for section, key, value in changes:
            tree[section] = tree[section] | {key: value}
        return prepare_tokens(
            make_recipe(tree), tmp_path / "run", model=str(tiny_llama), source=tree["data"]["path"], supervised=False
        )

    first = tokens()
    assert tokens(("train", "seed", 9)).hash == first.hash, "another split is scored by the same pass"
    assert tokens(("data", "max_length", 24)).hash != first.hash, "cut answers are other answers"
    assert tokens(("data", "template", "chat")).hash != first.hash
    assert tokens(("data", "limit", 30)).hash != first.hash
    again = pairs_of(tokens(("train", "seed", 9)).train)
    assert [p.row for p in again] != [p.row for p in pairs_of(first.train)], "the seed moves the split"


HOLD = """
import sys, time
from pathlib import Path
from pipeline.lock.lock import one_writer
with one_writer(Path(sys.argv[1]), otherwise="-"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_group_waits_until_the_first_has_filled_or_died(tmp_path, model):
    root = Path(__file__).resolve().parents[2]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    done = threading.Event()

    def second() -> None:
        with one_group(tmp_path):
            fill(tmp_path, model, PAIRS)
        done.set()

    waiting = threading.Thread(target=second, daemon=True)
    waiting.start()
    assert not done.wait(2.0) and not list(tmp_path.glob("part-*"))
    holder.kill()  # not a word of farewell: the claim stays behind
    holder.wait()
    assert done.wait(60) and len(FrozenLogProbs(tmp_path).rows) == len(PAIRS)
    assert not list(tmp_path.glob("*.lock"))

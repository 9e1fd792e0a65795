"""Twenty steps of TRL's own trainers and of ours on the same tokens in the same order; then ours in other layouts.

Everything is float32 on the CPU. The pairs are real ones where they are at hand (`shared_data`), and small made ones
everywhere. Real rows whose tokens merge across the end of the prompt (3 of 1,094) are left out: TRL cuts their prompts,
we do not. Both sides start from the same random Llama and take the same AdamW, schedule and clipping. TRL pads each
sequence; ours shares prompts and cuts a batch into micro-batches by length, as a training worker does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracles.trl_side import CLIP, PEAK, STEPS, Curve, pair_ids, train_with_trl
from support.random_pairs import spec_of
from support.training import write_pairs
from torch import Tensor

from otpo.data.collate import collate_completions, collate_pairs
from otpo.data.convert import convert
from otpo.data.encoder import MERGED_BOUNDARY
from otpo.data.load import load_rows
from otpo.data.micro_batches import micro_batches
from otpo.data.tokens import load_tokenizer, tokenize_pairs
from otpo.data.unpaired import UnpairedBatch, collate_unpaired, mismatched, split_pairs, unpaired_prompts
from otpo.methods.losses import pair_loss
from otpo.methods.losses.reference_free import chosen_nll
from otpo.methods.weights import token_weights
from otpo.models.fresh import fresh, make_model
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel, pair_logprobs
from otpo.records import LossOutput, SequenceBatch, TokenCompletion, TokenPair
from otpo.training.objectives.pair import cached_pairs, pair_prompts, preference_losses
from otpo.training.objectives.unpaired import cached_unpaired, unpaired_losses
from otpo.training.schedule import learning_rate
from otpo.training.step import optimisation_step
from pipeline.train.frozen_cache import FrozenLogProbs, fill_cache

Item = TokenPair | TokenCompletion


@dataclass(frozen=True)
class Corpus:
    """Pairs as text and as token ids, in one order; the folder of the model to start from; pairs a step."""

    rows: list[dict[str, Any]]
    pairs: list[TokenPair]
    start: Path
    batch: int

    def first(self, batch: int) -> Corpus:
        """As many as a smaller batch needs."""
        return Corpus(self.rows[: STEPS * batch], self.pairs[: STEPS * batch], self.start, batch)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["made", pytest.param("real", marks=pytest.mark.slow)])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "made":
        data = write_pairs(folder / "pairs.json", n=80)
        rows = [row | {"prompt": row["prompt"] + "\n"} for row in json.loads(data.read_text())]
        data.write_text(json.dumps(rows))
    else:
        data = request.getfixturevalue("shared_data") / "preferences" / "instruction-data-with-preference.json"
    start = fresh(data, folder / "start", vocab_size=1024, hidden=64, layers=2, heads=2, kv_heads=1)
    examples, _ = convert(load_rows(data), pairs=True)
    pairs, report = tokenize_pairs(load_rows(data), load_tokenizer(start))
    usable = [pair for pair in pairs if pair.row not in report.notes.get(MERGED_BOUNDARY, [])]
    batch = {"made": 4, "real": len(usable) // STEPS}[request.param]
    pairs = usable[:: len(usable) // (STEPS * batch)][: STEPS * batch]
    texts = {e.row: {"prompt": e.prompt, "chosen": e.completions[0], "rejected": e.completions[1]} for e in examples}
    return Corpus([texts[pair.row] for pair in pairs], pairs, start, batch)


# ---- curves ----


def train(
    policy: PolicyModel,
    losses: Any,
    items: Sequence[Item],
    collate: Callable[..., SequenceBatch],
    *,
    batch: int,
    micro: int = 16,
    steps: int = STEPS,
    gradients: list[Tensor] | None = None,
) -> Curve:
    """The curve of our loop. Micro-batches go by length; each step's (clipped) gradient is added to `gradients`."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    if gradients is not None:
        optimizer.register_step_pre_hook(lambda *_: gradients.append(flat(p.grad for p in policy.parameters())))
    lines = []
    for step in range(steps):
        members = items[step * batch : (step + 1) * batch]
        groups = micro_batches([item.tokens for item in members], size=micro, rank=0, world=1)
        batches = [collate([members[i] for i in group]) for group in groups]
        lr = learning_rate(step, STEPS, PEAK, scheduler="linear", warmup_ratio=0.1)
        lines.append(
            optimisation_step(policy, optimizer, batches, losses, denominator=len(members), max_grad_norm=CLIP, lr=lr)
        )
    return Curve([line["loss"] for line in lines], [line["grad_norm"] for line in lines])


def load(start: Path, attention: str = "sdpa") -> PolicyModel:
    return PolicyModel(load_causal_lm(start, attn_implementation=attention)).eval()


def assert_same(ours: Curve, theirs: Curve, *, moved: float) -> None:
    """The losses and gradient norms of each step to 1e-4. `moved`: how far the losses spread at least, so that it is
    learning that is compared.
    """
    assert len(theirs.losses) == len(theirs.norms) == STEPS
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)
    assert max(ours.losses) - min(ours.losses) > moved
    assert max(ours.norms) > CLIP, "some gradients are clipped"


def assert_same_tokens(pairs: Sequence[TokenPair], tokenised: Sequence[dict[str, Any]]) -> None:
    assert [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs] == pair_ids(tokenised)


# ours and its hyperparameters; TRL's trainer and its settings; how far the losses move at least
SIMPO = {"beta": 2.0, "gamma_beta_ratio": 0.25}
TRL_SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], float]] = {
    "dpo": ({"beta": 0.1}, "dpo", {"loss_type": "sigmoid", "beta": 0.1}, 0.05),
    "ipo": ({"beta": 0.5}, "dpo", {"loss_type": "ipo", "beta": 0.5}, 0.1),
    "simpo": (SIMPO, "cpo", TRL_SIMPO, 0.05),
    "alphapo": (SIMPO | {"alphapo_alpha": 0.25}, "cpo", TRL_SIMPO | {"alpha": 0.25}, 0.1),
    "cpo": ({"beta": 0.1, "cpo_alpha": 0.0}, "cpo", {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0}, 0.1),
}


@pytest.mark.parametrize("method", CASES)
def test_pair_methods(method: str, corpus: Corpus, tmp_path: Path) -> None:
    """DPO and IPO against DPOTrainer with its live reference; SimPO, AlphaPO and CPO's preference term against
    CPOTrainer. TRL takes each batch whole.
    """
    settings, kind, theirs, moved = CASES[method]
    size = corpus.batch
    curve, tokenised = train_with_trl(kind, corpus.start, corpus.rows, tmp_path, batch=size, micro=size, **theirs)
    assert_same_tokens(corpus.pairs, tokenised)
    policy, frozen = load(corpus.start), load(corpus.start)
    losses = preference_losses(policy, spec_of(method, **settings), lambda b: {"reference": live(frozen, b)}, seed=0)
    assert_same(train(policy, losses, corpus.pairs, collate_pairs, batch=size), curve, moved=moved)


def test_cpo_with_its_likelihood(corpus: Corpus, tmp_path: Path) -> None:
    """TRL takes the mean likelihood over the tokens of a micro-batch, ours over each completion's: the same where TRL's
    micro-batches are single pairs.
    """
    few = corpus.first(4)
    curve, tokenised = train_with_trl(
        "cpo", few.start, few.rows, tmp_path, batch=4, micro=1, loss_type="sigmoid", beta=0.1, cpo_alpha=1.0
    )
    assert_same_tokens(few.pairs, tokenised)
    policy = load(few.start)
    losses = preference_losses(policy, spec_of("cpo", beta=0.1, cpo_alpha=1.0), lambda _: {}, seed=0)
    assert_same(train(policy, losses, few.pairs, collate_pairs, batch=4), curve, moved=0.3)


def test_orpo_where_the_prompt_is_one_token(corpus: Corpus, tmp_path: Path) -> None:
    """TRL's likelihood is of prompt and chosen completion, ours of the completion: the same where the prompt is BOS
    alone, which nothing predicts. Single pairs as for CPO.
    """
    few = corpus.first(4)
    rows = [row | {"prompt": ""} for row in few.rows]
    pairs, _ = tokenize_pairs(rows, load_tokenizer(few.start))
    assert {len(pair.prompt_ids) for pair in pairs} == {1}
    curve, tokenised = train_with_trl("orpo", few.start, rows, tmp_path, batch=4, micro=1, beta=0.3)
    assert_same_tokens(pairs, tokenised)
    policy = load(few.start)
    losses = preference_losses(policy, spec_of("orpo", orpo_lambda=0.3), lambda _: {}, seed=0)
    assert_same(train(policy, losses, pairs, collate_pairs, batch=4), curve, moved=0.3)


def test_orpo_with_prompts(corpus: Corpus, tmp_path: Path) -> None:
    """The prompts back in: our odds-ratio term beside the likelihood of prompt and completion, in place of ours."""
    few, spec = corpus.first(4), spec_of("orpo", orpo_lambda=0.3)
    curve, tokenised = train_with_trl("orpo", few.start, few.rows, tmp_path, batch=4, micro=1, beta=0.3)
    assert_same_tokens(few.pairs, tokenised)
    policy, by_row = load(few.start), {pair.row: pair for pair in few.pairs}

    def losses(batch: SequenceBatch) -> LossOutput:
        logprobs, states = policy(batch)
        pairs = pair_logprobs(logprobs, states, batch, {})
        odds = pair_loss(spec, pairs, token_weights(spec, pairs, seed=0)).losses - chosen_nll(pairs)
        members = [by_row[row] for row in pairs.chosen.rows.tolist()]
        whole = collate_completions(
            [TokenCompletion(p.row, p.prompt_ids[:1], p.prompt_ids[1:] + p.chosen_ids) for p in members]
        )
        return LossOutput(odds - policy(whole)[0].sum(-1) / whole.mask.sum(-1))

    assert_same(train(policy, losses, few.pairs, collate_pairs, batch=4), curve, moved=0.3)


def test_kto(corpus: Corpus, tmp_path: Path) -> None:
    """With TRL's own pairing (completions rolled by one inside its batch) our KL term is TRL's, as TRL takes each batch
    whole. Each pair is two labelled completions, one after the other.
    """
    size = 2 * corpus.batch
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in corpus.rows
        for side in ("chosen", "rejected")
    ]
    curve, tokenised = train_with_trl("kto", corpus.start, rows, tmp_path, batch=size, micro=size, beta=0.1)
    split = split_pairs(corpus.pairs)
    assert [(item.prompt_ids, item.completion_ids, item.label) for item in split] == [
        (row["prompt_ids"], row["completion_ids"], row["label"]) for row in tokenised
    ]
    items = [
        TokenCompletion(item.row, item.prompt_ids, item.completion_ids, item.label, row["KL_completion_ids"])
        for item, row in zip(split, tokenised, strict=True)
    ]
    policy, frozen = load(corpus.start), load(corpus.start)
    losses = unpaired_losses(
        policy, spec_of("kto", beta=0.1), lambda batch: (live(frozen, batch), live(frozen, batch.mismatched))
    )
    assert_same(train(policy, losses, items, collate_unpaired, batch=size), curve, moved=0.01)


# ---- layouts ----


@torch.no_grad()
def live(frozen: PolicyModel, batch: SequenceBatch) -> Tensor:
    return frozen(batch)[0]


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    """Copies of tensors as one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


@dataclass(frozen=True)
class Trained:
    """The losses and gradients of five steps, and how far they took the parameters."""

    losses: list[float]
    gradients: list[Tensor]
    moved: Tensor


def run(
    method: str, corpus: Corpus, *, attention: str = "sdpa", micro: int = 1000, cache: Path | None = None
) -> Trained:
    """Train against a reference that is another random model, live or from a cache in a folder."""
    policy, frozen = load(corpus.start, attention), load(corpus.start, attention)
    other = make_model(load_tokenizer(corpus.start), hidden=64, layers=2, heads=2, kv_heads=1, seed=1)
    frozen.lm.load_state_dict(other.state_dict())
    items: Sequence[Any] = corpus.pairs[: 5 * corpus.batch]
    if method == "kto":
        items = mismatched(split_pairs(items), seed=0)
    if cache is not None:
        prompts = list(unpaired_prompts(items) if method == "kto" else pair_prompts(items))
        fill_cache(cache, frozen, prompts, micro_batch_size=3, micro_batch_tokens=None, rank=0, world=1)
    cached = FrozenLogProbs(cache) if cache is not None else None

    def of_pairs(batch: SequenceBatch) -> dict[str, Tensor]:
        return {"reference": live(frozen, batch)} if cached is None else cached_pairs({"reference": cached}, batch)

    def of_completions(batch: UnpairedBatch) -> tuple[Tensor, Tensor]:
        if cached is None:
            return live(frozen, batch), live(frozen, batch.mismatched)
        return cached_unpaired(cached, batch)

    spec, start, gradients = spec_of(method), flat(policy.parameters()), []
    size = len(items) // 5
    if method == "kto":
        losses, collate = unpaired_losses(policy, spec, of_completions), collate_unpaired
    else:
        losses, collate = preference_losses(policy, spec, of_pairs, seed=0), collate_pairs
    curve = train(policy, losses, items, collate, batch=size, micro=micro, steps=5, gradients=gradients)
    return Trained(curve.losses, gradients, flat(policy.parameters()) - start)


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"attention": "eager"},
    "alone": {"micro": 1},
    "alone, each completion after its own prompt": {"micro": 1, "attention": "eager"},
    "cached": {"cached": True},
    "cached, padded, in micro-batches": {"cached": True, "attention": "eager", "micro": 3},
}


@pytest.mark.parametrize("method", ["dpo", "ipo", "simpo", "orpo", "otpo", "kto"])
def test_layouts(method: str, corpus: Corpus, tmp_path: Path) -> None:
    """Prompts shared in one batch without padding, against every other way: the same losses and gradients to 1e-5, and
    the same five steps. Gradients and steps as vectors, relative to their length.
    """
    whole = run(method, corpus)
    assert whole.moved.abs().max() > 1e-3 and len(whole.gradients) == 5
    for name, change in LAYOUTS.items():
        cache = tmp_path / name if change.get("cached") else None
        if cache and "reference" not in spec_of(method).method.needs:
            continue
        other = run(method, corpus, cache=cache, **{key: change[key] for key in change if key != "cached"})
        assert other.losses == pytest.approx(whole.losses, rel=1e-5), name
        for step, (a, b) in enumerate(zip(whole.gradients, other.gradients, strict=True)):
            assert (a - b).norm() < 1e-5 * a.norm(), f"{name}: the gradient of step {step}"
        assert (whole.moved - other.moved).norm() < 1e-5 * whole.moved.norm(), name

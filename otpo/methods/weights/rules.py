"""Token-weight rules: how much each completion token counts in a loss.

A rule is a pure function `(pair, *, seed, **hyperparameters) -> TokenWeights`. It reads policy log-probabilities, the
frozen scorers' log-probabilities or the hidden states of `PairLogProbs`, never a model. A new rule is a function here,
or in `probability` beside it if it reads how probable models find each token, and a line in `RULES`;
`otpo.methods.registry` names it.

Shape legend: B pairs, M and N padded lengths of the chosen and rejected completions, T either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from otpo.errors import WorkError
from otpo.methods.spec import MethodSpec
from otpo.methods.weights import probability
from otpo.methods.weights.transport import SOLVERS, cost_matrix
from otpo.records import LogProbs, PairLogProbs, SequenceBatch, TokenWeights


def uniform(pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """Weight 1 for every token: the plain sum of log-probabilities (DPO)."""
    return TokenWeights(pair.chosen.mask.to(_dtype(pair)), pair.rejected.mask.to(_dtype(pair)))


def mean(pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """Weight 1 / length: the mean of log-probabilities (SimPO, averaged IPO, length-normalised DPO)."""
    chosen, rejected = (answer.mask / answer.lengths.clamp(min=1)[:, None] for answer in (pair.chosen, pair.rejected))
    return TokenWeights(chosen.to(_dtype(pair)), rejected.to(_dtype(pair)))


def ld(pair: PairLogProbs, *, seed: int = 0, ld_alpha: float) -> TokenWeights:
    """Weight 1 up to the shorter answer's length, `ld_alpha` beyond it.

    LD-DPO, https://arxiv.org/abs/2409.06411. As in TRL today the reference is weighted like the policy; LLaMA-Factory
    and earlier TRL weight the policy alone, which is not log 2 where the two are equal.
    """
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths)[:, None]
    sides = []
    for answer in (pair.chosen, pair.rejected):
        beyond = torch.arange(answer.mask.shape[1], device=answer.mask.device)[None] >= shorter
        weights = answer.mask.to(_dtype(pair))
        sides.append(torch.where(beyond, ld_alpha * weights, weights))
    chosen, rejected = sides
    return TokenWeights(chosen, rejected)


def transport_log_plan(
    pair: PairLogProbs,
    *,
    reg: float,
    reg_m: float,
    cost: str = "l2",
    normalizer: str = "official",
    solver: str = "batched",
    iterations: int = 0,
    tolerance: float = 1e-9,
) -> Tensor:
    """(B, M, N) log of the unbalanced transport plan between the answers' hidden states, mass 1 on every token.

    Another mass, such as 1 / length, would scale the plan as a whole and leave the weights as they are.

    Args:
        pair: B pairs with hidden states.
        reg, reg_m: regularisation of the plan and of its marginals.
        cost, normalizer: see `cost_matrix`.
        solver: "batched", or "pot" for POT pair after pair.
        iterations: of the solver; 0 takes as many as `tolerance` needs.
        tolerance: how much the initial error of the log-potentials shrinks.
    """
    if pair.chosen.hidden is None or pair.rejected.hidden is None:
        raise ValueError("optimal transport needs the policy's hidden states; compute the record with `hidden`")
    costs = cost_matrix(
        pair.chosen.hidden,
        pair.rejected.hidden,
        pair.chosen.mask,
        pair.rejected.mask,
        cost=cost,
        normalizer=normalizer,
    )
    a, b = (answer.mask.to(costs.dtype) for answer in (pair.chosen, pair.rejected))
    largest = math.inf if normalizer == "none" else 1.0
    return SOLVERS[solver](
        costs, a, b, reg=reg, reg_m=reg_m, iterations=iterations or None, tol=tolerance, largest_cost=largest
    )


def otpo(
    pair: PairLogProbs,
    *,
    seed: int = 0,
    reg: float,
    reg_m: float,
    cost: str = "l2",
    normalizer: str = "official",
    solver: str = "batched",
    iterations: int = 0,
    tolerance: float = 1e-9,
    layer: int = -1,
    total: str = "shorter",
) -> TokenWeights:
    """Marginals of the transport plan, rescaled so that both sides sum to the same.

    OTPO (ACL 2025, https://aclanthology.org/2025.acl-long.1035), as in the official `OTPOTrainer`. A pair with an empty
    side weighs nothing. Adds the metric `weights/transport_mass`: the plan's mass over min(m, n), the official
    `logps/scaled_coeff`.

    Args:
        pair: B pairs with hidden states.
        seed: not used.
        reg, reg_m, cost, normalizer, solver, iterations, tolerance: see `transport_log_plan`.
        layer: whose states `pair` holds; it is read where they are computed (`MethodSpec.layer`).
        total: what each side sums to: "shorter", min(m, n) of its m and n tokens, as in the official code; or "one",
            for losses of means over tokens.
    """
    log_plan = transport_log_plan(
        pair, reg=reg, reg_m=reg_m, cost=cost, normalizer=normalizer, solver=solver, iterations=iterations,
        tolerance=tolerance,
    )  # fmt: skip
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths).to(log_plan.dtype)
    log_mass = log_plan.flatten(1).logsumexp(1).masked_fill(shorter == 0, 0.0)
    scale = shorter if total == "shorter" else (shorter > 0).to(shorter)
    plan = (log_plan - log_mass[:, None, None]).exp() * scale[:, None, None]
    transported = torch.where(shorter > 0, log_mass.exp() / shorter, 0.0)
    dtype = _dtype(pair)
    return TokenWeights(plan.sum(2).to(dtype), plan.sum(1).to(dtype), {"weights/transport_mass": transported.to(dtype)})


def sampo(pair: PairLogProbs, *, seed: int = 0, expected: bool) -> TokenWeights:
    """As many tokens of the longer answer as the shorter one has, sampled without replacement.

    SamPO (EMNLP 2024, https://github.com/LuJunru/SamPO). The official code draws anew for the reference; here policy
    and reference share the draw, so that the loss is log 2 where they are equal. The draw depends on `seed` and the
    pair's data row alone, not on the batch, the padding or the device.

    Args:
        pair: B pairs.
        seed: of the draw; the caller mixes the epoch in.
        expected: take the expectation of the weights, min(m, n) / length, instead of a sample.
    """
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths)
    sides = []
    for side, answer in enumerate((pair.chosen, pair.rejected)):
        if expected:
            weights = answer.mask * (shorter / answer.lengths.clamp(min=1))[:, None]
        else:
            keys = _random_keys(answer, seed=seed, side=side).masked_fill(~answer.mask, -1)
            rank = keys.argsort(dim=-1, descending=True).argsort(dim=-1)
            weights = (rank < shorter[:, None]) & answer.mask
        sides.append(weights.to(_dtype(pair)))
    chosen, rejected = sides
    return TokenWeights(chosen, rejected)


RULES: dict[str, Callable[..., TokenWeights]] = {
    "uniform": uniform,
    "mean": mean,
    "ld": ld,
    "sampo": sampo,
    "otpo": otpo,
    "confpo": probability.confpo,
    "sepo": probability.sepo,
    "tgdpo": probability.tgdpo,
    "tis": probability.tis,
}


def token_weights(spec: MethodSpec, pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """The weights of `spec`'s rule with `spec`'s hyperparameters, and figures about them as metrics."""
    rule = RULES[spec.method.weights]
    weights = rule(pair, seed=seed, **spec.arguments(rule))
    return TokenWeights(weights.chosen, weights.rejected, _figures(pair, weights) | weights.metrics)


def shared_prefix_gradient(weights: TokenWeights, batch: SequenceBatch) -> Tensor:
    """(B,) sum of |w_chosen - w_rejected| over the tokens both answers begin with.

    These tokens are predicted from the same context, so their log-probabilities cancel in a margin where both sides
    weigh them alike (DPO: 0). What is left moves tokens that say nothing about the preference.

    Args:
        weights: of B pairs.
        batch: the 2B sequences they came from, chosen first.
    """
    (ids_c, ids_r), (mask_c, mask_r) = batch.targets.chunk(2), batch.mask.chunk(2)
    shared = ((ids_c == ids_r) & mask_c & mask_r).long().cumprod(-1)
    width = min(weights.chosen.shape[1], weights.rejected.shape[1])
    return ((weights.chosen[:, :width] - weights.rejected[:, :width]).abs() * shared[:, :width]).sum(-1)


def check_finite(pair: PairLogProbs) -> None:
    """Raises `WorkError` naming the data rows and sides whose numbers are NaN or infinite. One device sync per call."""
    check_sides({"chosen answer": pair.chosen, "rejected answer": pair.rejected})


def check_sides(sides: Mapping[str, LogProbs]) -> None:
    """As `check_finite`, of completions under the names that the message gives them, all of the same data rows."""
    flags: dict[str, Tensor] = {}
    for side, answer in sides.items():
        values = {"log-probabilities of the policy": answer.policy}
        values |= {f"log-probabilities of '{name}'": scores for name, scores in answer.frozen.items()}
        values |= {f"'{name}'": figures for name, figures in answer.vocabulary.items()}
        if answer.hidden is not None and answer.hidden.shape[1]:
            values["hidden states"] = answer.hidden.abs().amax(-1)
        for what, tensor in values.items():
            flags[f"{what}, {side}"] = (~torch.isfinite(tensor.detach()) & answer.mask).any(-1)
    bad = torch.stack(list(flags.values())).cpu()
    if bad.any():
        rows = next(iter(sides.values())).rows.tolist()
        found = [
            f"data row {rows[index]}: {what}"
            for what, per_pair in zip(flags, bad.tolist(), strict=True)
            for index, is_bad in enumerate(per_pair)
            if is_bad
        ]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise WorkError(
            f"Expected finite numbers from the models, found NaN or infinity in {'; '.join(found[:8])}{more}. "
            "Look at these rows; if they are sound, lower the learning rate or train in float32."
        )


def _dtype(pair: PairLogProbs) -> torch.dtype:
    return pair.chosen.policy.dtype


def _random_keys(answer: LogProbs, *, seed: int, side: int) -> Tensor:
    """(B, T) distinct non-negative int64 keys of each row, hashed from (seed, side, data row, position)."""
    positions = torch.arange(answer.mask.shape[1], device=answer.mask.device)
    keys = torch.full_like(answer.rows, seed)
    for value in (torch.full_like(keys, side), answer.rows):
        keys = _mix(keys ^ _mix(value))
    return (_mix(keys[:, None] ^ _mix(positions)[None, :]) << 24) | positions


def _mix(values: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 tensors (products may wrap: only the low 32 bits are kept)."""
    low = 0xFFFFFFFF
    values = (values + 0x9E3779B9) & low
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & low
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & low
    return values ^ (values >> 16)


def _figures(pair: PairLogProbs, weights: TokenWeights) -> dict[str, Tensor]:
    """(B,) figures a side: normalised entropy of |w| (1 = even, 0 = one token), effective tokens
    (sum w)^2 / sum w^2, and the smallest and largest weight of the pair (0 for an answer without tokens).
    """
    metrics: dict[str, Tensor] = {}
    lows, highs = [], []
    for name, side, mask in (
        ("chosen", weights.chosen, pair.chosen.mask),
        ("rejected", weights.rejected, pair.rejected.mask),
    ):
        total = side.abs().sum(-1)
        share = side.abs() / torch.where(total > 0, total, 1.0)[:, None]
        nats = -torch.special.xlogy(share, share).sum(-1)
        length = mask.sum(-1)
        entropy = torch.where(length > 1, nats / length.clamp(min=2).log(), (total > 0).to(nats.dtype))
        metrics[f"weights/entropy_{name}"] = entropy
        metrics[f"weights/effective_tokens_{name}"] = side.sum(-1) ** 2 / side.square().sum(-1).clamp(min=1e-30)
        if mask.shape[1]:
            lows.append(side.masked_fill(~mask, torch.inf).amin(-1))
            highs.append(side.masked_fill(~mask, -torch.inf).amax(-1))
    if lows:
        for name, extreme in (("min", torch.stack(lows).amin(0)), ("max", torch.stack(highs).amax(0))):
            metrics[f"weights/{name}"] = torch.where(torch.isinf(extreme), 0.0, extreme)
    return metrics

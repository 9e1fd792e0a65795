"""Random per-token records for the tests of weights and losses."""

import torch

from otpo.methods import FROZEN_MODELS, METHODS, WEIGHT_RULES, MethodSpec, resolve
from otpo.records import LogProbs, PairLogProbs

PAIR_METHODS = [name for name, method in METHODS.items() if method.objective == "pair"]


def spec_of(name, **settings) -> MethodSpec:
    """A method; the frozen models that it needs are called by their names."""
    method = METHODS[settings.get("method", name)]
    needed = method.loss.needs | WEIGHT_RULES[settings.get("weights", method.weight_rule.name)].needs
    return resolve(name, {model: model for model in FROZEN_MODELS if model in needed} | settings)


def random_side(lengths, width=None, *, hidden=None, seed=0, dtype=torch.float32, equal=False, first_row=0) -> LogProbs:
    """Completions of the given lengths: log-probabilities in (-3, 0), hidden states of size `hidden` if given."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    width = int(lengths.max()) if width is None else width
    mask = torch.arange(width)[None] < lengths[:, None]
    policy, reference = (
        -3 * torch.rand(len(lengths), width, generator=generator, dtype=dtype) * mask for _ in range(2)
    )
    states = torch.randn(len(lengths), width, hidden, generator=generator, dtype=dtype) if hidden else None
    others = {
        name: -3 * torch.rand(len(lengths), width, generator=generator, dtype=dtype) * mask for name in FROZEN_MODELS
    }
    squares, kl = (torch.rand(len(lengths), width, generator=generator, dtype=dtype) * mask for _ in range(2))
    vocabulary = {"log_sum_squares": -2 * squares, "reference_kl": 0 * kl if equal else kl}
    return LogProbs(
        policy=policy,
        mask=mask,
        rows=torch.arange(len(lengths)) + first_row,
        frozen={"reference": policy.clone() if equal else reference} | others,
        vocabulary=vocabulary,
        hidden=states,
    )


def random_pair(chosen, rejected, *, seed=0, widths=(None, None), **kwargs) -> PairLogProbs:
    """Pairs of completions of the given lengths; see `random_side`."""
    return PairLogProbs(
        random_side(chosen, widths[0], seed=2 * seed, **kwargs),
        random_side(rejected, widths[1], seed=2 * seed + 1, **kwargs),
    )

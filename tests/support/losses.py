"""One loss of a random pair, by a label and its settings."""

from __future__ import annotations

from otpo.methods.losses import pair_loss
from otpo.methods.weights import token_weights
from support.random_pairs import spec_of

LENGTHS = ([9, 3, 5, 12, 1], [6, 7, 5, 1, 12])  # tokens of the chosen and the rejected completions
TRL_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def run(label, pair, seed=0, **settings):
    spec = spec_of(label, **settings)
    return pair_loss(spec, pair, token_weights(spec, pair, seed=seed))

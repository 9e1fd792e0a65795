"""Losses: pure functions of per-token log-probabilities and token weights.

`pairwise` holds the losses against a reference, `reference_free` those without, `coupled` those that compare the pairs
of the global batch, `unpaired` those of single labelled completions (KTO), `reward` those of a reward model's scores. A
new loss is a function there; the row of its method in `otpo.methods.registry` names it.
"""

from otpo.methods.losses.apply import completion_loss, pair_loss

__all__ = ["completion_loss", "pair_loss"]

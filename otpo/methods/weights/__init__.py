"""Token weights: how much each completion token of a pair counts in a loss.

A weight rule is a pure function `(pair, *, seed, **hyperparameters) -> TokenWeights`. It reads the log-probabilities of
the policy and of frozen models, or the hidden states, all from `PairLogProbs`; it never calls a model. `otpo` holds the
OTPO rule, `transport` its cost matrix and solver, `length` the rules that read lengths (uniform, mean, LD-DPO, SamPO),
`probability` those that read how probable models find each token (ConfPO, SePO, TGDPO, TIS-DPO). A new rule is a
function here and a row of `otpo.methods.registry.weight_rules`.
"""

from otpo.methods.weights.apply import shared_prefix_gradient, token_weights

__all__ = ["shared_prefix_gradient", "token_weights"]

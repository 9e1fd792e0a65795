"""What is trained is chosen once: every method has an objective, and it alone knows how its rows are laid out."""

from __future__ import annotations

import math

import pytest
import torch
from support.random_pairs import spec_of
from support.small_lm import PAIRS, small_lm

from otpo.data.unpaired import mismatched, split_pairs
from otpo.methods import METHODS
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.records import TokenCompletion
from otpo.training.figures import evaluation_figures
from otpo.training.objectives import Start, objective_of
from otpo.training.objectives.pair import PairObjective
from otpo.training.objectives.reward import RewardObjective
from otpo.training.objectives.unpaired import UnpairedObjective
from otpo.training.step import evaluate
from pipeline.train.frozen_cache import FrozenLogProbs, fill_cache

KINDS = {"pair": PairObjective, "unpaired": UnpairedObjective, "reward": RewardObjective}
COMPLETIONS = [TokenCompletion(pair.row, pair.prompt_ids, pair.chosen_ids) for pair in PAIRS]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    small_lm().save_pretrained(folder)
    return Start(str(folder))


class Frozen:
    """The reference in a cache of its own, as a job has it."""

    def __init__(self, folder):
        self.folder = folder

    def cached(self, items):
        fill_cache(
            self.folder, PolicyModel(small_lm()), list(items),
            micro_batch_size=2, micro_batch_tokens=None, rank=0, world=1,
        )  # fmt: skip
        return {"reference": FrozenLogProbs(self.folder)}

    def live_reference(self):
        return PolicyModel(small_lm())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_objective_of_its_row(name):
    assert type(objective_of(spec_of(name), seed=0)) is KINDS[METHODS[name].objective]


@pytest.mark.parametrize(
    ("name", "items", "denominator", "loss"),
    [
        ("dpo", PAIRS, 3, math.log(2)),
        ("tdpo2", PAIRS, 3, math.log(2)),
        ("kto", mismatched(split_pairs(PAIRS), seed=0), 6, 0.5),
        ("reward-model", PAIRS, 3, math.log(2)),
        (None, COMPLETIONS, 9, None),
    ],
)
def test_every_objective_goes_the_same_way_from_rows_to_a_loss(start, tmp_path, name, items, denominator, loss):
    objective = objective_of(None if name is None else spec_of(name), seed=0)
    model = objective.load(start)
    losses = objective.losses(model, items, Frozen(tmp_path))
    assert objective.denominator(items) == denominator
    figures = evaluate([objective.collate(items)], losses, denominator=denominator)
    if name is not None:
        assert figures.keys() == evaluation_figures(spec_of(name)), "known before anything is trained"
    found = figures["eval_loss"]
    if loss is None:
        with torch.no_grad():
            logps, _ = model(objective.collate(items))
        loss = -logps.sum().item() / denominator
    assert found == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_figures_that_are_known_before(name):
    figures = evaluation_figures(spec_of(name), ["mine"])
    assert {"eval_loss", "eval_mine_loss", "eval_rewards/margins", "eval_mine_rewards/margins"} <= figures
    assert ("eval_weights/transport_mass" in figures) == (METHODS[name].weight_rule.name == "otpo")


def test_a_reward_model_has_scores_and_no_vocabulary(start):
    objective = objective_of(spec_of("reward-model"), seed=0)
    model = objective.load(start)
    assert type(model) is RewardModel and not isinstance(model, PolicyModel)
    batch = objective.collate(PAIRS)
    assert model.scores(batch).tolist() == [0.0] * 6
    with pytest.raises(NotImplementedError):
        model(batch)

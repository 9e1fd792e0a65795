"""Before the first step: the reference is the model, and the first loss is that of a policy that equals it."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.random_pairs import PAIR_METHODS, spec_of
from support.small_lm import PAIRS, small_lm
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM

from otpo.data.unpaired import mismatched, split_pairs, unpaired_prompts
from otpo.errors import UserError
from otpo.methods import METHODS
from otpo.models.policy import PolicyModel
from otpo.records import TokenPair
from otpo.training.objectives import objective_of
from otpo.training.objectives.pair import pair_prompts
from otpo.training.start_check import SameReference, check_cached, check_loss, choose_rows
from pipeline.run.folder import LabelFolder
from pipeline.train.frozen_cache import fill_cache
from pipeline.train.job_start import JobStart, start_line, start_notes

AGAINST_REFERENCE = [name for name in PAIR_METHODS if "reference" in METHODS[name].needs]


def filled(folder, model, prompts):
    return fill_cache(folder, model, prompts, micro_batch_size=4, micro_batch_tokens=None, rank=0, world=1)


def other_lm():
    lm = small_lm()
    lm.lm_head.weight.data *= 1.05
    return lm


class Cached:
    """Frozen models whose log-probabilities are all those of a policy; the live reference is another model."""

    def __init__(self, caches, live):
        self.caches, self.live = caches, live

    def cached(self, items):
        return self.caches

    def live_reference(self):
        return self.live


def first_loss(name, tmp_path, *, reference):
    """(loss, expected) of a method's first rows, with the frozen models filled by `reference`."""
    spec = spec_of(name)
    objective = objective_of(spec, seed=0)
    rows = PAIRS if spec.method.objective == "pair" else mismatched(split_pairs(PAIRS), seed=0)
    prompts = list((pair_prompts if spec.method.objective == "pair" else unpaired_prompts)(rows))
    policy = PolicyModel(small_lm())
    cache = filled(tmp_path, reference, prompts)
    caches = {model: cache for model in spec.method.needs if model in {"reference", "oracle", "positive", "negative"}}
    losses = objective.losses(policy, rows, Cached(caches, reference))
    batch = objective.collate(rows)
    return check_loss(policy, objective, rows, batch, losses, caches, torch.float32)


@pytest.mark.parametrize("name", [*AGAINST_REFERENCE, "kto"])
def test_the_first_loss_is_that_of_a_policy_that_equals_its_reference(tmp_path, name):
    loss, expected = first_loss(name, tmp_path, reference=PolicyModel(small_lm()))
    assert loss == pytest.approx(expected, abs=1e-4)
    golden = {"dpo": math.log(2), "otpo": math.log(2), "tdpo2": math.log(2), "ipo": 25.0, "hinge": 1.0, "kto": 0.5}
    if name in golden:
        assert expected == pytest.approx(golden[name], abs=1e-5)


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "kto"])
def test_a_first_loss_against_another_reference_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"Before the first step the loss is .* a policy that equals its reference has"):
        first_loss(name, tmp_path, reference=PolicyModel(other_lm()))


def test_the_cache_of_another_model_is_refused(tmp_path):
    model, prompts = PolicyModel(small_lm()), list(pair_prompts(PAIRS))
    own = filled(tmp_path / "own", model, prompts)
    assert check_cached(model, own, prompts, torch.float32, where="").worst < 1e-6
    stale = filled(tmp_path / "stale", PolicyModel(other_lm()), prompts)
    with pytest.raises(UserError, match=f"in {tmp_path}/stale are not those of .* delete that folder"):
        check_cached(model, stale, prompts, torch.float32, where=f"{tmp_path}/stale")


def test_a_live_reference_is_read_by_its_keys():
    model, prompts = PolicyModel(small_lm()), list(pair_prompts(PAIRS))
    live = SameReference(model, {}).cached(prompts)["reference"]
    mask = torch.ones(1, 9, dtype=torch.bool)
    found = live.logprobs([1], 1, mask)[0]
    ids = torch.tensor([*PAIRS[1].prompt_ids, *PAIRS[1].rejected_ids])
    expected = small_lm()(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found[:7], expected, atol=1e-5, rtol=1e-5)
    assert found[7:].eq(0).all()


# ---- a job ----


def start_of(tmp_path, lm, *, method="dpo"):
    spec = spec_of(method)
    policy, objective = PolicyModel(lm), objective_of(spec, seed=0)
    job = SimpleNamespace(label="mine", model="models/theirs", folder=LabelFolder(tmp_path / "models" / "mine"))
    return JobStart(job, policy, objective, PAIRS, torch.device("cpu"), dtype=torch.float32, budget=2048)


def checked(start, reference, tmp_path):
    prompts = list(pair_prompts(PAIRS))
    start.check_forward()
    caches = {"reference": filled(tmp_path / "scorers", reference, prompts)}
    losses = start.objective.losses(start.model, PAIRS, Cached(caches, reference))
    start.check_losses(losses, SimpleNamespace(caches=caches, prompts=prompts), writes=True)


def test_a_job_leaves_one_line_and_a_note_of_what_was_slower(tmp_path):
    torch.manual_seed(0)
    lm = HyperCLOVAXForCausalLM(
        HyperCLOVAXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            logits_scaling=0.125,
        )
    )  # fmt: skip
    start = start_of(tmp_path, lm)
    checked(start, start.model, tmp_path)
    assert start_line(start.job.folder).startswith("log-probabilities equal the model's own forward to ")
    (note,) = start_notes([start.job.folder])
    assert note.startswith("mine: The model's own head is run, because faster ways compute other log-probabilities (")
    assert start_notes([LabelFolder(tmp_path)]) == []


def test_a_job_whose_cache_is_of_another_model_names_label_and_folder(tmp_path):
    with pytest.raises(UserError, match=f"^mine: The cached log-probabilities in {tmp_path}/scorers are not"):
        checked(start_of(tmp_path, small_lm()), PolicyModel(other_lm()), tmp_path)


# ---- rows ----


def test_the_shortest_rows_are_checked_and_a_long_one():
    pairs = [*PAIRS, *PAIRS, TokenPair(9, [1], [2] * 40, [3])]
    assert [item.tokens for item in choose_rows(pairs, "cpu", 2048)] == [9, 9, 42]
    assert [item.tokens for item in choose_rows(pairs, "cpu", 41)] == [9, 9, 12]

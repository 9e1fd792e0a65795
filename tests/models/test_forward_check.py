"""Training computes what the model itself computes, each time again, or the model is refused."""

import pytest
import torch
from support.small_lm import PAIRS, small_lm
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconH1Config,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    RecurrentGemmaConfig,
)

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.models import attention
from otpo.models.adapters import add_adapters
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.models.sharding import distribute, shard
from otpo.training.forward_check import check_forward, check_repeats

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHER_HEADS = {
    "a factor of the decoder's": FalconH1Config(
        **SHAPE, num_key_value_heads=2, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=8, mamba_n_groups=1,
    ),
    "a factor where others have a divisor": HyperCLOVAXConfig(**SHAPE, num_key_value_heads=2, logits_scaling=0.125),
    "a soft cap of another name": RecurrentGemmaConfig(
        **SHAPE, num_key_value_heads=1, lru_width=32, attention_window_size=8, logits_soft_cap=1.0
    ),
    "layers before the head's matrix": ModernBertDecoderConfig(**SHAPE, cls_token_id=1, sep_token_id=2),
}  # fmt: skip


def made(config) -> PolicyModel:
    torch.manual_seed(0)
    return PolicyModel(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())


def by_transformers(lm, batch):
    """Log-probabilities of each completion by the model's own logits, one sequence at a time."""
    found = []
    pieces = batch.input_ids.split(batch.segments)
    for prompt, completion in batch.sequences:
        ids = torch.cat([pieces[prompt], pieces[completion]])
        logps = lm(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, ids[1:, None])[-len(pieces[completion]) :, 0])
    return torch.cat(found)


@pytest.mark.parametrize("head", OTHER_HEADS)
@torch.no_grad()
def test_a_head_that_is_more_than_one_matrix_is_run_itself(head):
    model, batch = made(OTHER_HEADS[head]), collate_pairs(PAIRS)
    truth = by_transformers(model.lm, batch)
    found = check_forward(model, batch, torch.float32)
    assert (found.layout, found.head, len(found.fallbacks)) == ("padded", "own", 1)
    torch.testing.assert_close(model(batch)[0][batch.mask], truth, atol=1e-5, rtol=1e-5)
    model.own_head = False  # what was computed without the check
    try:
        wrong = model(batch)[0][batch.mask]
    except TypeError:
        return  # this model's decoder is not found
    assert (wrong - truth).abs().max() > 0.02


def test_a_sharded_model_trains_after_a_way_that_failed(mesh):
    model, batch = made(OTHER_HEADS["layers before the head's matrix"]), collate_pairs(PAIRS)
    whole = made(OTHER_HEADS["layers before the head's matrix"])
    whole.use_own_head()
    shard(model, mesh, dtype=torch.float32)
    assert "fails" in check_forward(model, batch, torch.float32).fallbacks[0]
    for each in (model, whole):
        each(batch)[0].sum().backward()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_sound_model_keeps_the_fastest_way_and_the_random_state():
    model, batch = PolicyModel(small_lm()), collate_pairs(PAIRS)
    before = torch.get_rng_state()
    found = check_forward(model, batch, torch.float32)
    assert (found.layout, found.head, found.fallbacks) == ("flat", "fused", ())
    assert found.difference.worst < 1e-5 and found.also is not None and found.also.worst < 1e-5
    assert check_repeats(model, batch, torch.float32, found.values) == 0
    assert model.backbone.shares_prompts and not model.own_head
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_padded_batches_take_the_place_of_flat_ones_that_differ(monkeypatch):
    broken = {"flat": True}

    def without_the_prompt(*args, batch, **kwargs):
        output, weights = attention.shared_prompts_attention(*args, batch=batch, **kwargs)
        return (output * 0.5 if broken["flat"] else output), weights

    model, batch = PolicyModel(small_lm()), collate_pairs(PAIRS)
    truth = by_transformers(small_lm(), batch)
    attention.AttentionInterface.register(attention.SHARED_PROMPTS, without_the_prompt)
    try:
        assert (model(batch)[0][batch.mask] - truth).abs().max() > 0.1
        found = check_forward(model, batch, torch.float32)
    finally:
        attention.AttentionInterface.register(attention.SHARED_PROMPTS, attention.shared_prompts_attention)
    assert (found.layout, found.head) == ("padded", "fused") and found.fallbacks[0].startswith("flat batches")
    torch.testing.assert_close(model(batch)[0][batch.mask], truth, atol=1e-5, rtol=1e-5)


def test_the_models_own_head_gives_all_that_methods_read():
    fused, own, batch = PolicyModel(small_lm()), PolicyModel(small_lm()), collate_pairs(PAIRS)
    own.use_own_head()
    other = PolicyModel(small_lm(attention_bias=True))
    wanted = ("hidden", "log_sum_squares", "reference_kl")
    gradients = []
    for model in (fused, own):
        with torch.no_grad():
            reference = other.lazy_logits(batch)
        logps, extras = model(batch, wanted, reference, 1)
        last = model(batch, ("hidden",))[1]["hidden"]
        (logps.exp().sum() + extras["reference_kl"].sum()).backward()
        found = [logps, extras["log_sum_squares"], extras["reference_kl"], extras["hidden"], last]
        gradients.append([*found, *(parameter.grad for parameter in model.parameters())])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_a_reference_may_take_its_own_head():
    policy, reference, batch = PolicyModel(small_lm()), PolicyModel(small_lm(attention_bias=True)), collate_pairs(PAIRS)
    fused = policy(batch, ("reference_kl",), reference.lazy_logits(batch))[1]["reference_kl"]
    reference.use_own_head()
    own = policy(batch, ("reference_kl",), reference.lazy_logits(batch))[1]["reference_kl"]
    torch.testing.assert_close(own, fused, atol=1e-5, rtol=1e-5)


def test_a_model_without_finite_values_is_refused():
    model = PolicyModel(small_lm())
    model.lm.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        check_forward(model, collate_pairs(PAIRS), torch.float32)


def test_a_model_that_draws_random_numbers_is_refused():
    model, batch = PolicyModel(small_lm()), collate_pairs(PAIRS)
    model.lm.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + 1e-3 * torch.randn_like(out))
    with pytest.raises(UserError, match="computed twice"):
        check_repeats(model, batch, torch.float32, model(batch)[0][batch.mask])


def test_a_model_that_computes_something_else_than_before_is_refused():
    model, batch = PolicyModel(small_lm()), collate_pairs(PAIRS)
    before = check_forward(model, batch, torch.float32).values
    model.softcap = 0.5
    with pytest.raises(UserError, match="when it was loaded"):
        check_repeats(model, batch, torch.float32, before)


def test_an_encoder_that_sees_what_follows_is_refused():
    config = {**SHAPE, "num_hidden_layers": 1}
    assert check_forward(made(BertConfig(**config, is_decoder=True)), collate_pairs(PAIRS), torch.float32).head == "own"
    with pytest.raises(UserError, match="no causal language model"):
        check_forward(made(BertConfig(**config, is_decoder=False)), collate_pairs(PAIRS), torch.float32)


# ---- train mode ----

RANDOM_IN_TRAIN_MODE = {
    "functional dropout": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        dropout=0.3, init_std=0.3,
    ),
    "skipped layers": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=32,
        dropout=0.0, layerdrop=0.5, init_std=0.3,
    ),
    "a router's jitter": MixtralConfig(
        **SHAPE, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RANDOM_IN_TRAIN_MODE)
@pytest.mark.parametrize("cause", ["checkpointing", "adapters"])
def test_train_mode_wakes_nothing_that_was_not_asked_for(mesh, kind, cause):
    batch = collate_pairs(PAIRS)
    model = made(RANDOM_IN_TRAIN_MODE[kind])
    with model.backbone.padding():
        truth = by_transformers(model.lm, batch)
    if cause == "adapters":
        add_adapters(model.lm, {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}, seed=0)
    distribute(model, mesh, dtype=torch.float32, activation_checkpointing=cause == "checkpointing").train()
    for _ in range(3):  # at step 0 adapters add nothing
        torch.testing.assert_close(model(batch)[0][batch.mask], truth, atol=1e-4, rtol=1e-4)
    before = check_forward(model, batch, torch.float32).values
    assert check_repeats(model, batch, torch.float32, before) == 0
    model.lm.eval = model.lm.train  # what happened
    model.lm.train()
    drawn = [model(batch)[0][batch.mask] for _ in range(8)]
    assert any((values - drawn[0]).abs().max() > 1e-3 for values in drawn)
    with pytest.raises(UserError, match="computed twice"):
        check_repeats(model, batch, torch.float32, before)


def test_the_adapters_own_dropout_works_in_train_mode_only():
    lm, batch = made(RANDOM_IN_TRAIN_MODE["functional dropout"]).lm, collate_pairs(PAIRS)
    settings = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}
    model = PolicyModel(add_adapters(lm, settings, seed=0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    still = [model(batch)[0] for _ in range(2)]
    torch.testing.assert_close(*still, atol=0, rtol=0)
    model.train()
    assert (model(batch)[0] - still[0]).abs().max() > 1e-2
    assert check_repeats(model, batch, torch.float32, still[0][batch.mask].detach()) == 0
    torch.testing.assert_close(model.eval()(batch)[0], still[0], atol=0, rtol=0)


@pytest.mark.parametrize("way", [distribute, shard])
def test_layers_are_computed_again_in_eval_mode(mesh, way):
    plain, other, batch = PolicyModel(small_lm()), PolicyModel(small_lm()), collate_pairs(PAIRS)
    names = [name for name, _ in other.named_parameters()]
    way(other, mesh, dtype=torch.float32, activation_checkpointing=True)
    assert [name for name, _ in other.named_parameters()] == names and not other.lm.training
    calls = []
    other.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, other):
        model(batch)[0].sum().backward()
    assert len(calls) == 2  # in the forward pass, and again in backward
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        gradient = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        torch.testing.assert_close(gradient, theirs.grad)


# ---- reward models ----


def reward_model(**changes) -> RewardModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=1)
    config.update({"num_labels": 1} | changes)
    lm = LlamaForSequenceClassification._from_config(config, attn_implementation="sdpa").eval()
    torch.nn.init.zeros_(lm.score.weight)  # as a new one
    return RewardModel(lm)


@torch.no_grad()
def test_a_reward_model_scores_as_transformers_does():
    found = check_forward(reward_model(), collate_pairs(PAIRS), torch.float32)
    assert found.layout == "flat" and found.difference.worst < 1e-5
    # one completion at a time
    assert check_forward(reward_model(pad_token_id=None), collate_pairs(PAIRS), torch.float32).difference.worst < 1e-5


def test_a_reward_model_that_transformers_would_read_elsewhere_is_refused():
    ends = PAIRS[0].chosen_ids[-1]
    with pytest.raises(UserError, match=f"end in token {ends}, which is also the padding token"):
        check_forward(reward_model(pad_token_id=ends), collate_pairs(PAIRS), torch.float32)

"""Per-token log-probabilities against full logits, transformers and autograd in float64."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support.small_lm import PAIRS, small_lm

import otpo.kernels.logprobs
from otpo.data.collate import collate_completions, collate_pairs
from otpo.errors import UserError
from otpo.kernels.logprobs import LazyLogits
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel, pair_logprobs
from otpo.records import TokenCompletion


def head(n, size, vocabulary, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    targets = torch.randint(vocabulary, (n,), generator=generator)
    return draw(n, size), draw(vocabulary, size), draw(vocabulary), targets, draw(n).abs() + 0.1


def fused_logprobs(hidden, weight, targets, **head):
    return LazyLogits(hidden, weight, **head).logprobs(targets)[0]


def small_chunks(patch, rows, vocabulary):
    patch.setitem(otpo.kernels.logprobs.CHUNK_LOGITS, "cpu", rows * vocabulary)
    patch.setattr(otpo.kernels.logprobs, "TILE_LOGITS", max(1, rows // 2) * vocabulary)


def from_full_logits(hidden, weight, targets, bias, scale, softcap):
    logits = (torch.nn.functional.linear(hidden, weight, bias) * scale).to(
        torch.promote_types(hidden.dtype, torch.float32)
    )
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def values_and_gradients(function, tensors, coefficients):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    values = function(*leaves)
    (values * coefficients.to(values.dtype)).sum().backward()
    return values.detach().double(), [leaf.grad.double() for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("chunk", [1, 3, 2**22], ids=lambda rows: f"chunk{rows}")
@pytest.mark.parametrize(("bias", "scale", "softcap"), list(itertools.product([False, True], [1.0, 0.25], [None, 4.0])))
def test_values_and_gradients_equal_full_logits_in_float64(monkeypatch, chunk, bias, scale, softcap):
    hidden, weight, b, targets, coefficients = head(11, 8, 37)
    small_chunks(monkeypatch, chunk, 37)
    expected, wanted = values_and_gradients(
        lambda h, w, c=None: from_full_logits(h, w, targets, c, scale, softcap),
        [hidden, weight] + [b] * bias,
        coefficients,
    )
    found, gradients = values_and_gradients(
        lambda h, w, c=None: fused_logprobs(h, w, targets, bias=c, scale=scale, softcap=softcap),
        [hidden.float(), weight.float()] + [b.float()] * bias,
        coefficients,
    )
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    for gradient, oracle in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=2e-5, atol=5e-6)


@given(n=st.integers(1, 40), vocabulary=st.integers(2, 50), rows=st.integers(1, 45), seed=st.integers(0, 10**6))
@examples(max_examples=40)
def test_chunking_changes_nothing(n, vocabulary, rows, seed):
    hidden, weight, bias, targets, coefficients = head(n, 4, vocabulary, torch.float32, seed)
    whole = values_and_gradients(
        lambda h, w, b: fused_logprobs(h, w, targets, bias=b), [hidden, weight, bias], coefficients
    )
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, rows, vocabulary)
        parts = values_and_gradients(
            lambda h, w, b: fused_logprobs(h, w, targets, bias=b), [hidden, weight, bias], coefficients
        )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("chunk", [1, 3, 2**22], ids=lambda rows: f"chunk{rows}")
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, 4.0)])
def test_figures_of_the_vocabulary_equal_full_distributions_in_float64(
    monkeypatch, chunk, bias, scale, softcap, padding
):
    monkeypatch.setattr(
        otpo.kernels.logprobs, "bucket_size", lambda count, like: count + padding
    )  # as a CPU does it in bfloat16
    hidden, weight, b, targets, coefficients = head(11, 8, 37)
    frozen_hidden, frozen_weight, frozen_bias, _, of_kl = head(11, 8, 37, seed=1)
    small_chunks(monkeypatch, chunk, 37)

    def distribution(h, w, c):
        logits = torch.nn.functional.linear(h, w, c) * scale
        return (softcap * torch.tanh(logits / softcap) if softcap else logits).log_softmax(-1)

    def by_hand(h, w, c=None):
        log_p = distribution(h, w, c)
        log_q = distribution(frozen_hidden, frozen_weight, frozen_bias if bias else None)
        kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        return torch.stack([log_p.gather(-1, targets[:, None])[:, 0], kl, log_p.exp().square().sum(-1).log().detach()])

    def ours(h, w, c=None):
        reference = LazyLogits(
            frozen_hidden.float(), frozen_weight.float(), frozen_bias.float() if bias else None, scale, softcap
        )
        lazy = LazyLogits(h, w, c, scale, softcap)
        logps, squares, kl = lazy.logprobs(targets, squares=True, reference=reference)
        assert not squares.requires_grad
        return torch.stack([logps, kl, squares])

    factors = torch.stack([coefficients, of_kl, coefficients])
    expected, wanted = values_and_gradients(by_hand, [hidden, weight] + [b] * bias, factors)
    found, gradients = values_and_gradients(ours, [hidden.float(), weight.float()] + [b.float()] * bias, factors)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    for gradient, oracle in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=2e-5, atol=1e-5)


def test_a_model_does_not_diverge_from_itself_and_does_from_another():
    batch = collate_pairs(PAIRS)
    model, other = PolicyModel(small_lm()), PolicyModel(small_lm())
    with torch.no_grad():
        other.lm.lm_head.weight += 0.1 * torch.randn_like(other.lm.lm_head.weight)
        _, itself = model(batch, {"reference_kl"}, model.lazy_logits(batch))
    _, extras = model(batch, {"reference_kl"}, other.lazy_logits(batch))
    assert itself["reference_kl"].abs().max() < 1e-5
    assert (extras["reference_kl"][batch.mask] > 1e-4).all() and (extras["reference_kl"][~batch.mask] == 0).all()


def test_bf16_gradients_are_as_good_as_autograds():
    hidden, weight, _, targets, coefficients = head(64, 32, 211, torch.bfloat16)
    _, exact = values_and_gradients(
        lambda h, w: from_full_logits(h, w, targets, None, 1.0, None),
        [hidden.double(), weight.double()],
        coefficients,
    )
    _, autograd = values_and_gradients(
        lambda h, w: from_full_logits(h, w, targets, None, 1.0, None), [hidden, weight], coefficients
    )
    _, ours = values_and_gradients(lambda h, w: fused_logprobs(h, w, targets), [hidden, weight], coefficients)
    for found, theirs, oracle in zip(ours, autograd, exact, strict=True):
        assert (found - oracle).norm() <= 1.2 * (theirs - oracle).norm()


def test_no_targets_give_no_values_and_zero_gradients():
    hidden, weight, _, targets, _ = head(0, 8, 37, torch.float32)
    weight.requires_grad_()
    fused_logprobs(hidden, weight, targets).sum().backward()
    assert weight.grad.abs().sum() == 0


def test_gradient_only_where_it_is_asked_for():
    hidden, weight, _, targets, _ = head(5, 8, 37, torch.float32)
    hidden.requires_grad_()
    fused_logprobs(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_chunk_holds_few_logits_at_a_time(monkeypatch):
    """Products of a chunk, and of these a tile in float32: never (N, V)."""
    products, tiles = [], []
    of_products, of_logits = LazyLogits.products, otpo.kernels.logprobs._logits
    monkeypatch.setitem(otpo.kernels.logprobs.CHUNK_LOGITS, "cpu", 1000)
    monkeypatch.setattr(otpo.kernels.logprobs, "TILE_LOGITS", 300)
    monkeypatch.setattr(LazyLogits, "products", lambda *a: products.append((o := of_products(*a)).numel()) or o)
    monkeypatch.setattr(otpo.kernels.logprobs, "_logits", lambda *a: tiles.append((o := of_logits(*a)).numel()) or o)
    hidden, weight, _, targets, _ = head(300, 4, 100, torch.float32)
    hidden.requires_grad_()
    fused_logprobs(hidden, weight, targets).sum().backward()
    assert max(products) <= 1000 and max(tiles) <= 300
    assert sum(tiles) == 2 * 300 * 100 + 300, "once forward, once backward, and there the targets' once more"
    assert sum(products) == 2 * 300 * 100 - 1000 * otpo.kernels.logprobs.KEPT_CHUNKS, (
        "the last chunks are kept for backward"
    )


def by_transformers(lm, ids, completion):
    """(log-probabilities, hidden states at the predicting positions) of one unpadded sequence."""
    out = lm(torch.tensor([ids]), output_hidden_states=True)
    places = torch.arange(len(ids) - len(completion) - 1, len(ids) - 1)
    logps = out.logits[0, places].float().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
    return logps, out.hidden_states[-1][0, places]


@pytest.mark.parametrize("tied", [True, False])
def test_forward_equals_transformers(tied):
    lm = small_lm(tie_word_embeddings=tied)
    batch = collate_pairs(PAIRS)
    logps, extras = PolicyModel(small_lm(tie_word_embeddings=tied))(batch, {"hidden"})
    hidden = extras["hidden"]
    assert hidden is not None and not hidden.requires_grad
    sequences = [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]
    for index, (prompt, completion) in enumerate(sequences):
        expected, states = by_transformers(lm, prompt + completion, completion)
        torch.testing.assert_close(logps[index, : len(completion)], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden[index, : len(completion)], states, rtol=1e-5, atol=1e-5)
        assert (logps[index, len(completion) :] == 0).all() and (hidden[index, len(completion) :] == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_transformers(tied):
    ours, theirs = small_lm(tie_word_embeddings=tied), small_lm(tie_word_embeddings=tied)
    weights = torch.rand(6, 7, generator=torch.Generator().manual_seed(1))
    logps, _ = PolicyModel(ours)(collate_pairs(PAIRS))
    (logps * weights).sum().backward()
    sequences = [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]
    sum(
        (by_transformers(theirs, prompt + completion, completion)[0] * weights[index, : len(completion)]).sum()
        for index, (prompt, completion) in enumerate(sequences)
    ).backward()
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_company_does_not_matter():
    model = PolicyModel(small_lm())
    with torch.no_grad():
        together = model(collate_pairs(PAIRS), {"hidden"})
        for index, pair in enumerate(PAIRS):
            logps, extras = model(collate_pairs([pair]), {"hidden"})
            for side, completion in ((0, pair.chosen_ids), (1, pair.rejected_ids)):
                n = len(completion)
                torch.testing.assert_close(logps[side, :n], together[0][index + 3 * side, :n], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(
                    extras["hidden"][side, :n], together[1]["hidden"][index + 3 * side, :n], rtol=1e-5, atol=1e-5
                )


def test_pairs_are_cut_into_sides():
    batch = collate_pairs(PAIRS)
    logps, extras = PolicyModel(small_lm())(batch, {"hidden", "log_sum_squares"})
    reference = torch.arange(logps.numel()).view_as(logps).float()
    pairs = pair_logprobs(logps, extras, batch, {"reference": reference})
    assert pairs.chosen.lengths.tolist() == [5, 1, 3] and pairs.rejected.lengths.tolist() == [2, 7, 3]
    assert pairs.chosen.policy.shape == (3, 5) and pairs.rejected.policy.shape == (3, 7)
    assert torch.equal(pairs.rejected.frozen_logps("reference"), reference[3:])
    assert torch.equal(pairs.rejected.vocabulary["log_sum_squares"], extras["log_sum_squares"][3:])
    assert torch.equal(pairs.chosen.hidden, extras["hidden"][:3, :5]) and pairs.rejected.rows.tolist() == [0, 1, 2]


def test_completions_have_the_same_log_probabilities_as_in_pairs():
    model = PolicyModel(small_lm())
    items = [TokenCompletion(p.row, p.prompt_ids, p.chosen_ids) for p in PAIRS]
    logps, _ = model(collate_completions(items))
    pairs, _ = model(collate_pairs(PAIRS))
    torch.testing.assert_close(logps, pairs[:3, : logps.shape[1]], rtol=1e-5, atol=1e-5)


def test_dropout_is_off_when_the_model_trains(tmp_path: Path):
    small_lm(attention_dropout=0.5).save_pretrained(tmp_path)
    model = PolicyModel(load_causal_lm(tmp_path)).train()
    batch = collate_pairs(PAIRS)
    torch.testing.assert_close(model(batch)[0], model(batch)[0], rtol=0, atol=0)
    torch.testing.assert_close(model(batch)[0], model.eval()(batch)[0], rtol=1e-6, atol=1e-6)


def test_what_is_no_model_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="expected a model of transformers"):
        load_causal_lm(tmp_path)

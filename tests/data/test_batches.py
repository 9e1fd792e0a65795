"""Collation, the sampler, the validation split and the token file."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from otpo.data.collate import collate_completions, collate_pairs, padded
from otpo.data.sampler import next_indices, split_validation
from otpo.data.token_file import load_tokens, save_tokens, tokens_hash
from otpo.errors import UserError
from otpo.records import TokenCompletion, TokenPair

IDS = st.lists(st.integers(1, 128_255), min_size=1, max_size=9)
PAIRS = st.lists(st.builds(TokenPair, st.integers(0, 10**6), IDS, IDS, IDS), min_size=1, max_size=6)
COMPLETIONS = st.lists(
    st.builds(TokenCompletion, st.integers(0, 10**6), IDS, IDS, st.sampled_from([None, True, False])), min_size=1
)
MATCHED = st.lists(st.builds(TokenCompletion, st.integers(0, 10**6), IDS, IDS, st.booleans(), IDS), min_size=1)


@given(PAIRS)
def test_laid_out_pairs_hold_exactly_the_pairs(pairs):
    batch = collate_pairs(pairs)
    sides = [(p, p.chosen_ids) for p in pairs] + [(p, p.rejected_ids) for p in pairs]
    assert len(batch.input_ids) == sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    pieces, places = batch.input_ids.split(batch.segments), batch.position_ids.split(batch.segments)
    for s, (pair, answer) in enumerate(sides):
        prompt, completion = batch.sequences[s]
        assert batch.rows[s] == pair.row and batch.lengths[s] == len(pair.prompt_ids) + len(answer)
        assert torch.cat([pieces[prompt], pieces[completion]]).tolist() == pair.prompt_ids + answer
        assert torch.cat([places[prompt], places[completion]]).tolist() == list(range(batch.lengths[s]))
        assert batch.targets[s][batch.mask[s]].tolist() == answer
        assert batch.mask[s, : len(answer)].all() and not batch.mask[s, len(answer) :].any()
        # The token after a predicting position is the target; the first is predicted by the prompt's last token.
        predicting = batch.positions[s][batch.mask[s]]
        assert batch.input_ids[predicting[1:] + 1].tolist() == answer[1:]
        assert predicting[0] == sum(batch.segments[: prompt + 1]) - 1
        assert not batch.positions[s][~batch.mask[s]].any() and not batch.targets[s][~batch.mask[s]].any()


@given(PAIRS)
def test_padded_sequences_hold_the_same(pairs):
    batch = collate_pairs(pairs)
    ids, attention_mask, positions = padded(batch)
    for s, answer in enumerate([p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]):
        pair, length = pairs[s % len(pairs)], batch.lengths[s]
        assert ids[s, :length].tolist() == pair.prompt_ids + answer
        assert attention_mask[s].tolist() == [1] * length + [0] * (ids.shape[1] - length)
        assert ids[s, positions[s][batch.mask[s]] + 1].tolist() == answer
        assert positions[s, 0] == len(pair.prompt_ids) - 1 and not positions[s][~batch.mask[s]].any()
    assert ids.shape[1] == max(batch.lengths)


def test_log_probabilities_of_a_batch_are_those_of_transformers_own_loss(tiny_llama):
    """The positions are right if a real model's loss with -100 on the prompt comes out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    items = [TokenCompletion(0, [1, 9, 30], [40, 41, 3]), TokenCompletion(1, [1, 5], [60, 61, 62, 63, 3])]
    batch = collate_completions(items)
    with torch.no_grad():
        ids, attention_mask, positions = padded(batch)
        logits = model(ids, attention_mask=attention_mask).logits
        picked = logits[torch.arange(2)[:, None], positions].log_softmax(-1)
        ours = (picked.gather(-1, batch.targets[..., None]).squeeze(-1) * batch.mask).sum(-1)
        for item, found in zip(items, ours, strict=True):
            ids = torch.tensor([item.prompt_ids + item.completion_ids])
            labels = ids.clone()
            labels[:, : len(item.prompt_ids)] = -100
            loss = model(ids, labels=labels).loss  # the mean over the completion
            torch.testing.assert_close(-loss * len(item.completion_ids), found, rtol=1e-5, atol=1e-5)


def test_a_sequence_without_prompt_or_answer_is_refused():
    for prompt, answer in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="row 7: a sequence needs a prompt"):
            collate_completions([TokenCompletion(7, prompt, answer)])


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 200), st.integers(0, 100), st.integers(0, 100))
def test_the_order_is_the_same_wherever_it_is_resumed(n, seed, consumed, first, second):
    whole = next_indices(n, seed=seed, consumed=consumed, count=first + second)
    assert len(whole) == first + second
    assert whole == (
        next_indices(n, seed=seed, consumed=consumed, count=first)
        + next_indices(n, seed=seed, consumed=consumed + first, count=second)
    )


@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(next_indices(n, seed=seed, consumed=epoch * n, count=n)) == list(range(n))


def test_seeds_and_epochs_give_different_uniform_orders():
    orders = {
        tuple(next_indices(50, seed=seed, consumed=epoch * 50, count=50)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100
    firsts = np.bincount([next_indices(8, seed=seed, consumed=0, count=1)[0] for seed in range(4000)], minlength=8)
    assert ((firsts - 500) ** 2 / 500).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_the_order_is_pinned():
    """A run resumed under another version must go on in the same order."""
    assert next_indices(8, seed=42, consumed=0, count=16) == [0, 1, 4, 2, 6, 5, 7, 3, 7, 3, 4, 2, 5, 6, 0, 1]


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        next_indices(0, seed=0, consumed=0, count=1)


def pairs_of(prompts):
    return [TokenPair(row, [1, prompt], [row + 5], [3]) for row, prompt in enumerate(prompts)]


@given(st.lists(st.integers(0, 30), min_size=8, max_size=60), st.integers(0, 99), st.integers(1, 5))
def test_the_split_keeps_prompts_together(prompts, seed, count):
    items = pairs_of(prompts)
    try:
        train, validation = split_validation(items, count=count, seed=seed)
    except UserError:
        sizes = [prompts.count(prompt) for prompt in set(prompts)]
        assert min(sizes) > count or len(sizes) == 1
        return
    assert 0 < len(validation) <= count
    assert sorted(item.row for item in train + validation) == list(range(len(items)))
    assert not {item.prompt_ids[1] for item in train} & {item.prompt_ids[1] for item in validation}
    assert split_validation(items, count=count, seed=seed) == (train, validation)


def test_the_split_takes_a_fraction_by_seed():
    items = pairs_of(range(100))
    train, validation = split_validation(items, fraction=0.1, seed=0)
    assert (len(train), len(validation)) == (90, 10)
    assert validation != split_validation(items, fraction=0.1, seed=1)[1]
    with pytest.raises(UserError, match="1 different prompts"):
        split_validation(pairs_of([4] * 10), fraction=0.5, seed=0)
    with pytest.raises(ValueError, match="either fraction or count"):
        split_validation(items, seed=0)


@given(PAIRS | COMPLETIONS | MATCHED)
def test_a_token_file_gives_back_what_was_saved(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("tokens") / "new" / "tokens.safetensors"
    save_tokens(path, items)
    stored = load_tokens(path)
    assert list(stored) == items and stored[-1] == items[-1] and stored[: len(items) : 2] == items[::2]
    assert tokens_hash(stored) == tokens_hash(items)
    assert [file.name for file in path.parent.iterdir()] == ["tokens.safetensors"]
    assert load_file(path)["ids"].dtype == np.int32
    with pytest.raises(IndexError):
        stored[len(items)]


def test_the_hash_sees_every_change():
    pair = TokenPair(0, [1, 2], [3, 4], [5])
    changes = [
        {"row": 1},
        {"prompt_ids": [1], "chosen_ids": [2, 3, 4]},
        {"chosen_ids": [3], "rejected_ids": [4, 5]},
        {"chosen_ids": [4, 3]},
        {"rejected_ids": [6]},
    ]
    lists = [[pair], [pair, pair], *([dataclasses.replace(pair, **change)] for change in changes)]
    lists += [[TokenCompletion(0, [1, 2], [3], label)] for label in (None, True, False)]
    lists += [[TokenCompletion(0, [1, 2], [3], True, ids)] for ids in ([4], [5])]
    hashes = [tokens_hash(items) for items in lists]
    assert all(a != b for a, b in itertools.combinations(hashes, 2))
    assert hashes == [tokens_hash(items) for items in lists]


def test_a_file_that_is_no_token_file_is_one_clear_error(tmp_path, tiny_llama):
    (tmp_path / "broken").write_bytes(b"\x08")
    for path in (tmp_path / "missing", tmp_path / "broken", tiny_llama / "model.safetensors"):
        with pytest.raises(UserError, match="expected a file of token ids"):
            load_tokens(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "tokens.safetensors"
    items = [TokenPair(0, [1], [2], [3])]
    save_tokens(path, items)
    with pytest.raises(OverflowError):
        save_tokens(path, [TokenPair(0, [2**31], [2], [3])])
    assert list(load_tokens(path)) == items and len(list(tmp_path.iterdir())) == 1

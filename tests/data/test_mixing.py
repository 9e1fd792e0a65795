"""Mixes of data sets: how many rows an epoch takes of each, in which order, and which are held out."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from otpo.data.sampler import held_out, next_indices, shares, spread
from otpo.data.token_file import Joined, Prompts, column, load_tokens, save_tokens
from otpo.errors import UserError
from otpo.records import PromptCompletions, TokenCompletion, TokenPair

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def test_fractions_are_shares_of_an_epoch():
    assert shares([100, 100], None, repeat=False) == [100, 100]
    assert shares([1000, 100], [0.7, 0.3], repeat=False) == [233, 100], "the smaller set is used up, the larger cut"
    assert shares([1000, 100], [7, 3], repeat=False) == [233, 100], "fractions are normalised, as TRL does"
    assert shares([1000, 100], [0.7, 0.3], repeat=True) == [1000, 429], (
        "the larger set is used up, the smaller repeated"
    )


@given(SIZES, st.data())
def test_no_row_twice_or_every_row_once(sizes, data):
    fractions = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    cut, repeated = (shares(sizes, fractions, repeat=repeat) for repeat in (False, True))
    assert all(1 <= taken <= size for taken, size in zip(cut, sizes, strict=True))
    assert any(taken == size for taken, size in zip(cut, sizes, strict=True)), "one set is used up"
    assert all(taken >= size for taken, size in zip(repeated, sizes, strict=True))
    for counts in (cut, repeated):
        wanted = np.array(fractions) / sum(fractions) * sum(counts)
        assert (abs(np.array(counts) - wanted) <= 1 + len(sizes)).all()


def test_a_cut_set_is_spread_over_its_rows():
    found = spread(1000, 100)
    assert len(set(found)) == 100 and (np.diff(found) > 0).all()
    assert 40 <= (found < 500).sum() <= 60, "not the first rows of a sorted file"


@given(SIZES, st.data(), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_of_a_mix_takes_its_counts(sizes, data, seed, epoch):
    taken = [data.draw(st.integers(size, 4 * size)) for size in sizes]
    takes, total = tuple(zip(sizes, taken, strict=True)), sum(taken)
    found = next_indices(sum(sizes), seed=seed, consumed=epoch * total, count=total, takes=takes)
    times, start = Counter(found), 0
    for size, wanted in takes:
        counts = [times[index] for index in range(start, start + size)]
        assert sum(counts) == wanted and max(counts) - min(counts) <= 1
        start += size


def test_what_comes_once_more_changes_with_the_epoch():
    takes = ((100, 150),)
    epochs = [Counter(next_indices(100, seed=0, consumed=150 * e, count=150, takes=takes)) for e in range(2)]
    again = [{index for index, times in epoch.items() if times == 2} for epoch in epochs]
    assert len(again[0]) == len(again[1]) == 50 and 10 <= len(again[0] & again[1]) <= 40


@given(st.integers(0, 99), st.integers(0, 200), st.integers(0, 60), st.integers(0, 60))
def test_a_mix_goes_on_where_it_was_interrupted(seed, consumed, first, second):
    takes = ((7, 16), (20, 20))
    whole = next_indices(27, seed=seed, consumed=consumed, count=first + second, takes=takes)
    parts = [(consumed, first), (consumed + first, second)]
    assert whole == [i for c, n in parts for i in next_indices(27, seed=seed, consumed=c, count=n, takes=takes)]


def test_a_mix_where_every_row_comes_once_has_the_order_of_one_set():
    alone = next_indices(30, seed=5, consumed=11, count=70)
    assert next_indices(30, seed=5, consumed=11, count=70, takes=((10, 10), (20, 20))) == alone


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=20, max_size=80), st.integers(0, 99))
def test_each_set_gives_its_share_to_validation_and_no_prompt_is_on_both_sides(rows, seed):
    prompts, sets = (np.array(values) for values in zip(*rows, strict=True))
    sizes = np.bincount(sets)
    try:
        held = held_out(prompts, fraction=0.5, seed=seed, sets=sets)
    except UserError:
        assert len(set(prompts)) < 8, "few prompts with many rows each"
        return
    assert not set(prompts[held]) & set(prompts[~held]), "also where a prompt is in several sets"
    assert (np.bincount(sets[held], minlength=len(sizes)) <= np.round(sizes * 0.5)).all()
    assert (held_out(prompts * 7 - 3, fraction=0.5, seed=seed, sets=sets) == held).all(), "only equality matters"


def test_shares_of_the_validation_part_are_those_of_the_rows():
    sets = np.repeat([0, 1, 2], [1000, 200, 100])
    for wanted in ({"fraction": 0.1}, {"count": 130}):
        held = held_out(np.arange(1300), **wanted, seed=1, sets=sets)
        assert np.bincount(sets[held]).tolist() == [100, 20, 10]


# ---- what frozen models are asked ----


def test_columns_of_files_are_those_of_their_items(tmp_path):
    pairs = [TokenPair(7, [1, 2], [3], [4, 5]), TokenPair(9, [1], [2, 3], [4])]
    rows = [TokenCompletion(3, [1], [2], label, [5, 6]) for label in (True, None, False)]
    for number, items in enumerate((pairs, rows)):
        save_tokens(tmp_path / str(number), items)
        stored = load_tokens(tmp_path / str(number))
        joined = Joined(stored, [], items)
        assert list(joined) == items + items == [joined[i] for i in range(len(joined))] == joined[:]
        asked = Prompts(joined, lambda item: PromptCompletions(item.row, item.prompt_ids, ()), column(joined, "row"))
        for found in (stored, joined, asked):
            again = 1 if found is stored else 2
            assert column(found, "tokens").tolist() == again * [item.tokens for item in items]
        assert column(asked, "key").tolist() == 2 * [item.row for item in items]
        assert [prompt.prompt_ids for prompt in asked] == 2 * [item.prompt_ids for item in items]
    assert column(Joined(load_tokens(tmp_path / "1")), "label").tolist() == [1, -1, 0]
    assert len(set(load_tokens(tmp_path / "1").prompts())) == 1

"""Attention over sequences that share their prompts, against torch's own attention of each sequence alone."""

import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu.exact import error, one_by_one
from torch.utils._python_dispatch import TorchDispatchMode

from otpo.kernels.cpu import attention as cpu_attention
from otpo.kernels.cpu.attention import blocked_attention, plan_of
from otpo.models import attention
from otpo.models.attention import shared_prompts_attention
from otpo.records import SequenceBatch

PAIRS = ((5, 3, 7), (2, 9, 1))


@pytest.fixture(autouse=True)
def fresh():
    plan_of.cache_clear()
    yield
    plan_of.cache_clear()


def lay_out(families):
    """Segments and sequences of families (prompt, completion, ...), first completions first."""
    firsts = list(itertools.accumulate((len(family) for family in families), initial=0))
    sequences = [
        (first, first + i) for first, family in zip(firsts, families, strict=False) for i in range(1, len(family))
    ]
    return tuple(itertools.chain(*families)), tuple(sorted(sequences, key=lambda s: s[1] - s[0]))


def flat(segments, sequences):
    """What attention reads of a batch."""
    nothing = torch.empty(0)
    return SequenceBatch(
        nothing, nothing, segments, sequences, *[nothing] * 4, row_numbers=(), flat=nothing, ends=nothing
    )


def tensors(segments, *, heads=4, groups=2, size=8, dtype=torch.float64, seed=0):
    """Query, key and value as a model's layer gives them, and a gradient to pull with."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randn(1, sum(segments), n, size, generator=generator, dtype=torch.float64).to(dtype)

    return [draw(n).transpose(1, 2).requires_grad_() for n in (heads, groups, groups)], draw(heads)


def both(function, inputs, grad):
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad)]


@settings(deadline=None, max_examples=60)
@given(
    families=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4),
    block=st.integers(1, 20),
    window=st.none() | st.integers(1, 12),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    scaling=st.none() | st.floats(0.1, 2.0),
    seed=st.integers(0, 99),
)
def test_blocks_give_the_values_and_gradients_of_every_sequence_alone(families, block, window, heads, scaling, seed):
    segments, sequences = lay_out(families)
    inputs, grad = tensors(segments, heads=heads[0], groups=heads[1], seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "BLOCK", block)
        plan_of.cache_clear()
        found = both(
            lambda *qkv: shared_prompts_attention(
                None, *qkv, None, batch=flat(segments, sequences), sliding_window=window, scaling=scaling
            )[0],
            inputs,
            grad,
        )
    exact = both(lambda *qkv: one_by_one(*qkv, segments, sequences, window=window, scaling=scaling), inputs, grad)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_too_long_for_blocks_take_torchs_kernel_to_the_same_end(monkeypatch, window):
    segments, sequences = lay_out(PAIRS)
    inputs, grad = tensors(segments)

    def ours(*qkv):
        return shared_prompts_attention(None, *qkv, None, batch=flat(segments, sequences), sliding_window=window)[0]

    blocked = both(ours, inputs, grad)
    monkeypatch.setattr(attention, "LONGEST", max(p + c for p, *cs in PAIRS for c in cs) - 1)
    monkeypatch.setattr(attention, "plan_of", None)
    for found, exact in zip(both(ours, inputs, grad), blocked, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [1, 2])
def test_what_is_not_finite_stays_in_its_sequence(which):
    segments, sequences = lay_out(PAIRS)
    inputs, _ = tensors(segments)
    with torch.no_grad():
        inputs[which][0, 0, sum(segments[:2])] = torch.nan  # the first token of the first pair's second completion
        output, _ = shared_prompts_attention(None, *inputs, None, batch=flat(segments, sequences))
    spoilt = output[0].isnan().any(dim=(-1, -2)).split(segments)
    assert [bool(part.any()) for part in spoilt] == [False, False, True, False, False, False]


@pytest.mark.parametrize("longest", [attention.LONGEST, 1], ids=["blocks", "torchs-kernel"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 5.0}], ids=["plain", "window", "softcap"])
def test_padding_tokens_get_nothing_and_change_nothing(monkeypatch, longest, options):
    monkeypatch.setattr(attention, "LONGEST", longest)
    segments, sequences = lay_out(PAIRS)
    inputs, grad = tensors((*segments, 6))
    real = slice(sum(segments))

    def ours(*qkv):
        return shared_prompts_attention(None, *qkv, None, batch=flat(segments, sequences), **options)[0]

    output, *gradients = both(ours, inputs, grad)
    assert (output[:, real.stop :] == 0).all() and all((g[:, :, real.stop :] == 0).all() for g in gradients)
    alone = both(ours, [x[:, :, real].detach().requires_grad_() for x in inputs], grad[:, real])
    for found, exact in zip((output[:, real], *(g[:, :, real] for g in gradients)), alone, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    segments, sequences = lay_out(((2, 3, 1),))
    inputs, _ = tensors(segments, size=2)
    plan = plan_of(segments, sequences, tokens=sum(segments), window=None, heads=4, groups=2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda q, k, v: blocked_attention(q[0], k[0], v[0], plan, 0.7), inputs)


def blocks_of(segments, sequences):
    """Queries and keys (tokens, for one head they are rows) and bias of every block, without padding."""
    for blocks in plan_of(
        segments, sequences, tokens=sum(segments), window=None, heads=1, groups=1, dtype=torch.float32
    ).blocks:
        padded = torch.zeros(blocks.queries.shape, dtype=torch.bool)
        padded.view(-1)[blocks.padding] = True
        for queries, padding, keys, bias in zip(blocks.queries, padded, blocks.keys, blocks.bias, strict=True):
            seen = (bias[~padding] == 0).any(dim=0)  # only padded queries see padded keys
            assert bias.shape[1] - seen.sum() < cpu_attention.GRAIN, "no key but padding is computed in vain"
            yield queries[~padding], keys[seen], bias[~padding][:, seen]


def test_every_token_has_one_output_and_sees_its_own_sequence_alone():
    segments, sequences = lay_out(((300, 250, 200), (40, 50, 60), (3, 1), (45, 51, 60)))
    found = torch.zeros(sum(segments), sum(segments), dtype=torch.bool)
    queries = []
    for tokens, keys, bias in blocks_of(segments, sequences):
        queries += tokens.tolist()
        found[tokens[:, None], keys] |= bias == 0
    assert sorted(queries) == list(range(sum(segments)))
    expected = torch.zeros_like(found)
    starts = [0, *itertools.accumulate(segments)]
    for prompt, completion in sequences:
        tokens = [*range(starts[prompt], starts[prompt + 1]), *range(starts[completion], starts[completion + 1])]
        for i, token in enumerate(tokens):
            expected[token, tokens[: i + 1]] = True
    assert torch.equal(found, expected)


def test_blocks_come_in_few_sizes():
    """A product of a new size is compiled; at most six heights, and widths in steps of the grain."""
    lengths = torch.randint(1, 900, (60, 3), generator=torch.Generator().manual_seed(0)).tolist()
    segments, sequences = lay_out(lengths)
    plan = plan_of(segments, sequences, tokens=sum(segments), window=None, heads=1, groups=1, dtype=torch.float32)
    assert {blocks.bias.shape[1] for blocks in plan.blocks} <= set(range(32, 193, 32))
    assert all(blocks.bias.shape[2] % 32 == 0 for blocks in plan.blocks)
    exact = {(len(queries), len(keys)) for queries, keys, _ in blocks_of(segments, sequences)}
    assert len(plan.blocks) < len(exact) / 2


def test_bf16_is_as_exact_as_a_softmax_in_bf16_allows():
    segments, sequences = lay_out(((256, 280, 200),))
    exact_inputs, grad = tensors(segments, size=64)
    exact = both(lambda *qkv: one_by_one(*qkv, segments, sequences), exact_inputs, grad)
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact_inputs]
    grad = grad.bfloat16()

    def ours(*qkv):
        return shared_prompts_attention(None, *qkv, None, batch=flat(segments, sequences))[0]

    for found, true in zip(both(ours, inputs, grad), exact, strict=True):
        assert error(found, true) < 0.01


class Alive(TorchDispatchMode):
    """How many results of softmax are alive at a time, at most."""

    def __init__(self):
        super().__init__()
        self.results, self.most = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.results.add(out)
            self.most = max(self.most, len(self.results))
        return out


@pytest.mark.parametrize(("trained", "most"), [(True, 9), (False, 2)])
def test_probabilities_are_kept_only_for_backward(trained, most):
    segments, sequences = lay_out(((500, 400, 300),))
    assert len(list(blocks_of(segments, sequences))) == 8
    inputs, _ = tensors(segments, size=8, dtype=torch.float32)
    with Alive() as alive, torch.set_grad_enabled(trained):
        output, _ = shared_prompts_attention(None, *inputs, None, batch=flat(segments, sequences))
    assert output.requires_grad == trained and alive.most <= most and (alive.most > 2) == trained

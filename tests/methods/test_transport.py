"""The transport against POT as the official OTPO trainer runs it, and against the problem's optimality conditions."""

import json
import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import make
from support.oracles.official_otpo import official_weights
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from otpo.errors import UserError
from otpo.methods.iterations import iterations_for
from otpo.methods.weights.otpo import otpo
from otpo.methods.weights.transport import COST_OFFSET, cost_matrix, sinkhorn_pot, sinkhorn_unbalanced
from otpo.records import LogProbs, PairLogProbs

PAPER_SETTINGS = [(1.0, 0.2), (0.1, 0.2)]
SHAPE = dict(vocab_size=260, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=24),
}


def random_model(kind, states):
    """A random model. Its states' costs are "large" (divided by their maximum), "small" (below 1, so not divided) or
    "aligned": all states share a direction, so that their norms and not their distances are the largest.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    if states == "small":
        model.model.norm.weight.data.mul_(0.02)
    if states == "aligned":
        model.model.embed_tokens.weight.data += 0.1
    return model


def hidden_record(model, prompts, chosen, rejected):
    """The official view (padded predicting states and masks) and our record of the same pairs."""
    sequences = [p + a for p, a in zip(prompts + prompts, chosen + rejected, strict=True)]
    starts = [len(p) for p in prompts] * 2
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    attention = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    with torch.no_grad():
        states = model(ids, attention_mask=attention, output_hidden_states=True).hidden_states[-1][:, :-1]
    position = torch.arange(width - 1)
    ends = map(len, sequences)
    full_mask = torch.stack([(position >= s - 1) & (position < e - 1) for s, e in zip(starts, ends, strict=True)])
    sides = []
    for half in (slice(0, len(prompts)), slice(len(prompts), None)):
        length = full_mask[half].sum(1)
        mask = torch.arange(int(length.max()))[None] < length[:, None]
        hidden = torch.full((*mask.shape, states.shape[-1]), 7.0)  # what stands in the padding must not matter
        hidden[mask] = states[half][full_mask[half]]
        sides.append(LogProbs(torch.zeros(mask.shape), mask, torch.arange(len(prompts)), hidden=hidden))
    return states, full_mask, PairLogProbs(*sides)


def assert_official(model, prompts, chosen, rejected, reg, reg_m):
    states, full_mask, pair = hidden_record(model, prompts, chosen, rejected)
    weights = otpo(pair, reg=reg, reg_m=reg_m)
    count = len(prompts)
    for index in range(count):
        expected = official_weights(
            states[index], states[count + index], full_mask[index], full_mask[count + index], reg, reg_m
        )
        got_c = weights.chosen[index][pair.chosen.mask[index]].double()
        got_r = weights.rejected[index][pair.rejected.mask[index]].double()
        torch.testing.assert_close(got_c, expected[0][full_mask[index]], atol=1e-5, rtol=0)
        torch.testing.assert_close(got_r, expected[1][full_mask[count + index]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("reg", "reg_m"), PAPER_SETTINGS)
@pytest.mark.parametrize("states", ["large", "small", "aligned"])
def test_weights_are_those_of_the_official_algorithm(kind, reg, reg_m, states):
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(1, 260, (n,), generator=generator).tolist()

    prompts = [ids(9), ids(4), ids(12), ids(6)]
    chosen = [ids(20), ids(33), ids(1), ids(17)]
    # A shared beginning, an unrelated completion, a long one against one token, and a paraphrase of the same tokens.
    rejected = [chosen[0][:8] + ids(22), ids(11), ids(25), chosen[3][3:] + ids(2)]
    assert_official(random_model(kind, states), prompts, chosen, rejected, reg, reg_m)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("reg", "reg_m"), PAPER_SETTINGS)
def test_weights_on_real_pairs_are_those_of_the_official_algorithm(kind, reg, reg_m, shared_data):
    rows = json.loads((shared_data / "preferences" / "instruction-data-with-preference.json").read_text())[:8]
    prompts, chosen, rejected = (
        [list(row[key].encode())[:120] for row in rows] for key in ("instruction", "chosen", "rejected")
    )
    assert_official(random_model(kind, "aligned"), prompts, chosen, rejected, reg, reg_m)


def residual(log_plan, cost, a, b, reg, reg_m):
    """Largest violation of the optimality condition reg log G + C + reg_m (log(G1 / a) + log(G^T 1 / b)) = 0."""
    rows = log_plan.logsumexp(2, keepdim=True) - a.log()[:, :, None]
    columns = log_plan.logsumexp(1, keepdim=True) - b.log()[:, None, :]
    valid = (a > 0)[:, :, None] & (b > 0)[:, None, :]
    return (reg * log_plan + cost + reg_m * (rows + columns))[valid].abs().max().item()


sizes = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(
    sizes,
    sizes,
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.03, 0.1, 1.0, 10.0]),
    st.sampled_from([0.05, 0.2, 1.0]),
    st.sampled_from([1.0, math.inf]),
)
def test_plan_meets_the_optimality_conditions(m, n, seed, reg, reg_m, largest_cost):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(3, m, n, generator=generator, dtype=torch.float64)
    a = 0.1 + torch.rand(3, m, generator=generator, dtype=torch.float64)
    b = 0.1 + torch.rand(3, n, generator=generator, dtype=torch.float64)
    plan = sinkhorn_unbalanced(cost, a, b, reg=reg, reg_m=reg_m, largest_cost=largest_cost)
    assert residual(plan, cost, a, b, reg, reg_m) < 1e-7 * max(1, reg)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("largest_cost", [1.0, math.inf])
def test_batched_solver_agrees_with_pot(reg, largest_cost):
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4, n, 32, generator=generator) for n in (13, 21))
    q[:, :6] = p[:, :6] + 1e-3 * torch.randn(4, 6, 32, generator=generator)
    mask_p = torch.arange(13)[None] < torch.tensor([13, 7, 1, 9])[:, None]
    mask_q = torch.arange(21)[None] < torch.tensor([5, 21, 14, 1])[:, None]
    cost = cost_matrix(p, q, mask_p, mask_q)
    ours = sinkhorn_unbalanced(cost, mask_p.double(), mask_q.double(), reg=reg, reg_m=0.2, largest_cost=largest_cost)
    pots = sinkhorn_pot(cost, mask_p.double(), mask_q.double(), reg=reg, reg_m=0.2, iterations=500)
    torch.testing.assert_close(ours.exp(), pots.exp(), atol=1e-8, rtol=1e-6)


def test_iterations_reach_the_tolerance():
    assert iterations_for(1e-9, 1.0, 0.2) == 6
    assert iterations_for(1e-9, 0.1, 0.2) == 26
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(1, 30, 20, generator=generator, dtype=torch.float64)
    a, b = torch.ones(1, 30), torch.ones(1, 20)
    for reg in (1.0, 0.1, 0.03, 0.01):
        plan = sinkhorn_unbalanced(cost, a, b, reg=reg, reg_m=0.2)
        exact = sinkhorn_unbalanced(cost, a, b, reg=reg, reg_m=0.2, iterations=500)
        assert (plan - exact).abs().max() < 1e-7


def test_plan_of_one_token_against_one_in_closed_form():
    """Both marginals are the plan g: (reg + 2 reg_m) log g = -C."""
    cost = torch.tensor([[[0.7]]], dtype=torch.float64)
    one = torch.ones(1, 1)
    assert sinkhorn_unbalanced(cost, one, one, reg=0.1, reg_m=0.2).item() == pytest.approx(-0.7 / 0.5, abs=1e-8)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4])
@pytest.mark.parametrize("reg", [0.003, 0.1, 1e4])
def test_extreme_costs_stay_finite_and_optimal(scale, reg):
    generator = torch.Generator().manual_seed(0)
    cost = scale * torch.rand(2, 6, 5, generator=generator, dtype=torch.float64)
    a, b = torch.ones(2, 6), torch.ones(2, 5)
    plan = sinkhorn_unbalanced(cost, a, b, reg=reg, reg_m=0.2)
    assert torch.isfinite(plan).all()
    assert residual(plan, cost, a, b, reg, 0.2) < 1e-7 * max(1.0, reg, scale)


@pytest.mark.parametrize("solver", [sinkhorn_unbalanced, sinkhorn_pot])
def test_empty_sides_carry_no_mass(solver):
    cost = torch.rand(3, 4, 5)
    a = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    b = torch.tensor([[0.0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    plan = solver(cost, a, b, reg=0.1, reg_m=0.2).exp()
    assert plan[:2].sum() == 0 and plan[2, 1:].sum() == 0
    assert plan[2, 0].sum() > 0 and torch.isfinite(plan).all()
    assert solver(cost[:, :0], a[:, :0], b, reg=0.1, reg_m=0.2).shape == (3, 0, 5)


@pytest.mark.parametrize("reg", [1.4e-3, 1e-3, 1e-4, 1e-6])
def test_what_pot_cannot_solve_is_refused(reg):
    """POT itself gives zeros, the plan of an earlier iteration, or NaN here."""
    cost = torch.rand(1, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = cost / cost.max()
    with pytest.raises(UserError, match=r"no plan at reg .* where costs reach 1: .* 0.0015 is .*solver: batched"):
        sinkhorn_pot(cost, torch.ones(1, 12), torch.ones(1, 9), reg=reg, reg_m=0.2, iterations=20)


def test_pot_serves_down_to_the_least_reg():
    cost = torch.rand(1, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = (cost / cost.max(), torch.ones(1, 12), torch.ones(1, 9))
    ours, pots = (solve(*given, reg=1.5e-3, reg_m=0.2) for solve in (sinkhorn_unbalanced, sinkhorn_pot))
    torch.testing.assert_close(ours.exp(), pots.exp(), atol=1e-8, rtol=1e-6)


def test_balanced_transport_carries_no_information():
    """Why the marginals are relaxed: with fixed ones the weights are these marginals whatever the tokens say."""
    cost = torch.rand(12, 7, dtype=torch.float64).numpy()
    for reg in (0.03, 0.1, 1.0):
        plan = ot.sinkhorn([1 / 12] * 12, [1 / 7] * 7, cost, reg)
        assert plan.sum(1).max() - plan.sum(1).min() < 1e-8


def masks(*lengths, width):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def test_costs_by_hand():
    p = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [9.0, 9.0]]])
    q = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    mask_p, mask_q = masks(2, width=3), masks(2, width=2)
    l2 = torch.tensor([[5.0, 4.0], [0.0, 3.0]], dtype=torch.float64)
    for kind, expected in (("l2", l2), ("sqeuclidean", l2**2)):
        raw = cost_matrix(p, q, mask_p, mask_q, cost=kind, normalizer="none")[0]
        torch.testing.assert_close(raw[:2], expected + COST_OFFSET, atol=1e-7, rtol=0)
        assert raw[2].tolist() == [0, 0]  # the masked token
        divided = cost_matrix(p, q, mask_p, mask_q, cost=kind, normalizer="valid")[0]
        torch.testing.assert_close(divided, raw / raw.max())


def test_cosine_costs():
    p, q = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    q[0, 0] = 2 * p[0, 0]
    cost = cost_matrix(p, q, masks(4, 4, width=4), masks(3, 3, width=3), cost="cosine", normalizer="none")
    expected = 1 - torch.nn.functional.cosine_similarity(p[:, :, None].double(), q[:, None].double(), dim=-1)
    torch.testing.assert_close(cost, expected + COST_OFFSET, atol=1e-7, rtol=0)


def test_official_normalizer_counts_norms_and_only_divides_above_one():
    p, q = torch.tensor([[[10.0, 0.0]]]), torch.tensor([[[10.0, 0.5]]])
    one = masks(1, width=1)
    norm = math.hypot(10, 0.5)
    official = cost_matrix(p, q, one, one)
    assert official.item() == pytest.approx((0.5 + 1e-6) / (norm + 1e-6), abs=1e-7)
    assert cost_matrix(p, q, one, one, normalizer="valid").item() == pytest.approx(0.5 + 1e-6, abs=1e-7)
    small = cost_matrix(p / 20, q / 20, one, one)
    assert small.item() == pytest.approx(0.025 + 1e-6, abs=1e-7)


def test_alike_tokens_cost_nothing_whatever_their_norm():
    """In float32 a matrix product would leave distances of about 1e-3 of the norm here."""
    p = 50 * torch.randn(1, 40, 256)
    full = masks(40, width=40)
    diagonal = cost_matrix(p, p.clone(), full, full)[0].diagonal()
    assert (diagonal < 1e-7).all()


def test_unknown_options_are_named():
    p, one = torch.randn(1, 1, 2), masks(1, width=1)
    with pytest.raises(ValueError, match="manhattan"):
        cost_matrix(p, p, one, one, cost="manhattan")
    with pytest.raises(ValueError, match="mean"):
        cost_matrix(p, p, one, one, normalizer="mean")


@pytest.mark.parametrize(("reg", "atol"), [(1.0, 1e-5), (0.1, 1e-5), (0.03, 1e-4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_by_float32_iterations_are_those_of_pot(family, dtype, reg, atol):
    """As a GPU computes them, on states of a model; both sides get the same rounded states."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (2, 48), generator=generator)
    with torch.no_grad():
        states = make(family, "sdpa").to(dtype)(ids, output_hidden_states=True).hidden_states[-1].float()
    masks = [torch.arange(48) < length for length in (48, 37)]
    costs = cost_matrix(*(states[i][None] for i in (0, 1)), *(mask[None] for mask in masks))
    masses = [mask[None].double() for mask in masks]

    def weights(log_plan):
        plan = log_plan.exp()
        return [37 * plan.sum(axis) / plan.sum() for axis in (2, 1)]

    found = weights(sinkhorn_unbalanced(costs, *masses, reg=reg, reg_m=0.2, largest_cost=1.0, precision=torch.float32))
    expected = weights(sinkhorn_pot(costs, *masses, reg=reg, reg_m=0.2))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert (expected[0].max() - expected[0].min()) > 1e-3, "not even"

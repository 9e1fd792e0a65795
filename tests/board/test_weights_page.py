"""`otpo weights`: its JSON against POT over transformers' own states, its page, and what it says of uniform weights."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from support.html_page import assert_sound
from support.oracles.official_otpo import official_weights
from support.random_pairs import random_pair
from test_report import HOSTILE, weight_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from eval.board.effective_tokens import (
    MASS,
)
from eval.board.figures import block_means, heat_image
from eval.board.weights_page import DARKEST, build_weights_page
from jobs.cli import app
from otpo.explain import COARSE, REG_MS, REGS, model_token_weights, token_weight_grid
from otpo.methods.spec import resolve
from otpo.methods.weights import token_weights
from otpo.models.fresh import make_tokenizer
from otpo.models.policy import PolicyModel
from otpo.records import TokenPair

SHAPE = dict(hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ROWS = [
    {"prompt": "Is the whale a fish?", "chosen": SENTENCES[9], "rejected": "Yes, the whale is a fish."},
    {"prompt": "When does the train leave?", "chosen": " At a quarter past nine.", "rejected": " No."},
    {"prompt": "Bicycle:", "chosen": SENTENCES[3], "rejected": SENTENCES[3].replace("old", "new") + SENTENCES[1]},
    {"prompt": "Say it in French, please.", "chosen": SENTENCES[5], "rejected": SENTENCES[0]},
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, tmp_path_factory):
    """Folder of a small random model of one architecture and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(SENTENCES, vocab_size=512)
    shape = SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape) if request.param == "llama" else Qwen3Config(**shape, head_dim=24)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    # states that share a direction, as trained models' do: norms and not distances are the costs' normaliser
    lm.get_input_embeddings().weight.data += 0.1
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(*arguments) -> None:
    """`otpo weights ...` in this process."""
    app(["weights", *map(str, arguments)], standalone_mode=False)


def predicting_states(lm, prompt: list[int], answer: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' last hidden states of one sequence alone, and where they predict a token of the answer, padded."""
    with torch.no_grad():
        states = lm(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[-1][0, :-1]
    padded, mask = torch.zeros(width, states.shape[1]), torch.zeros(width, dtype=torch.bool)
    padded[: len(states)] = states
    mask[len(prompt) - 1 : len(states)] = True
    return padded, mask


def assert_pot(folder, rows, reg, reg_m):
    """Every row's weights are those of POT over the full padded matrix of transformers' own states."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in rows:
        width = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        (states_c, mask_c), (states_r, mask_r) = (
            predicting_states(lm, row["prompt_ids"], row[f"{side}_ids"], width) for side in ("chosen", "rejected")
        )
        expected = official_weights(states_c, states_r, mask_c, mask_r, reg, reg_m)
        for side, weights, mask in zip(("chosen", "rejected"), expected, (mask_c, mask_r), strict=True):
            got = torch.tensor(row[f"{side}_weights"], dtype=torch.float64)
            assert len(got) == len(row[f"{side}_ids"])
            torch.testing.assert_close(got, weights[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("reg", "reg_m"), [(1.0, 0.2), (0.1, 0.2)])
def test_json_weights_are_those_of_pot_over_transformers_own_states(model, tmp_path, reg, reg_m):
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS))
    command(model, tmp_path / "pairs.json", f"reg={reg}", f"reg_m={reg_m}", "--out", tmp_path / "w.json")
    rows = json.loads((tmp_path / "w.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(rows) == len(ROWS)
    for row, given_row in zip(rows, ROWS, strict=True):
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"]) == given_row[side] + tokenizer.eos_token
        assert tokenizer.decode(row["prompt_ids"]) == tokenizer.bos_token + given_row["prompt"]
    assert_pot(model, rows, reg, reg_m)


@pytest.mark.parametrize(("reg", "reg_m"), [(1.0, 0.2), (0.1, 0.2)])
def test_json_weights_of_real_pairs_are_those_of_pot(model, tmp_path, shared_data, reg, reg_m):
    data = shared_data / "preferences" / "instruction-data-with-preference.json"
    options = ["--limit", 12, "--max-length", 400, "--out", tmp_path / "w.json"]
    command(model, data, f"reg={reg}", f"reg_m={reg_m}", *options)
    rows = json.loads((tmp_path / "w.json").read_text())
    assert len(rows) >= 8
    assert_pot(model, rows, reg, reg_m)


def test_the_grid_is_each_setting_by_itself_from_the_same_states():
    pair = random_pair([7, 60, 1], [9, 4, 1], hidden=16)
    cells = token_weight_grid(resolve("otpo", {"reg": 0.05, "reg_m": 0.2}), pair)
    settings = [(reg, reg_m) for reg in sorted([0.05, *REGS]) for reg_m in REG_MS]
    for index, of_pair in enumerate(cells):
        assert [(cell["reg"], cell["reg_m"]) for cell in of_pair] == settings
        assert [cell["asked"] for cell in of_pair].count(True) == 1
        for cell in of_pair:
            alone = token_weights(resolve("otpo", {"reg": cell["reg"], "reg_m": cell["reg_m"]}), pair)
            for side, weights, mask in (
                ("chosen", alone.chosen, pair.chosen.mask),
                ("rejected", alone.rejected, pair.rejected.mask),
            ):
                assert cell[f"{side}_weights"] == weights[index][mask[index]].tolist()
            assert cell["metrics"] == {name: float(values[index]) for name, values in alone.metrics.items()}
            assert cell["asked"] == ((cell["reg"], cell["reg_m"]) == (0.05, 0.2))
            plan = torch.tensor(cell["plan"])
            assert max(plan.shape) <= COARSE
            if index != 1:  # 60 tokens are more than a coarse plan has
                marginal = plan.sum(1) / cell["metrics"][MASS]
                torch.testing.assert_close(marginal, torch.tensor(cell["chosen_weights"]), atol=1e-5, rtol=0)


def test_a_pair_passes_through_the_model_once_whatever_the_grid(model):
    pairs = [TokenPair(i, [5, 6, 7], [8, 9, 10 + i], [11, 12]) for i in range(5)]
    passes = []

    def count_forward(module, *_):
        if isinstance(module, PolicyModel):
            passes.append(module)

    hook = torch.nn.modules.module.register_module_forward_hook(count_forward)
    try:
        rows = model_token_weights(str(model), pairs, resolve("otpo", {}), batch_size=2, plan=True, grid=True)
    finally:
        hook.remove()
    assert len(passes) == 3
    assert [len(row["grid"]) for row in rows] == [len(REGS) * len(REG_MS)] * 5


def test_numbers_that_are_not_finite_name_the_row(model, tmp_path):
    from otpo.errors import WorkError

    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.get_input_embeddings().weight.data[77] = math.nan
    lm.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    pairs = [TokenPair(40, [5, 6], [8, 9], [10]), TokenPair(41, [5, 6], [8, 9], [77, 11])]
    with pytest.raises(WorkError, match="data row 41: hidden states, rejected completion") as error:
        model_token_weights(str(tmp_path), pairs, resolve("otpo", {}))
    assert "row 40" not in str(error.value)


# ---- the page ----


def pixels(uri: str) -> np.ndarray:
    """(rows, columns) how dark each pixel of a picture is."""
    found = re.fullmatch(r"data:image/png;base64,([A-Za-z0-9+/=]+)", uri)
    return 1 - imread(io.BytesIO(base64.b64decode(found[1])))[..., :3].mean(-1)


def test_a_heat_image_is_the_matrix_darker_where_larger():
    values = np.array([[0.0, 0.2, 0.9], [0.5, 2.0, 1.0]])
    dark = pixels(heat_image(values, 1.0))
    assert dark.shape == values.shape
    assert (np.diff(dark.ravel()[np.argsort(values, axis=None)]) >= 0).all()
    assert dark[1, 1] == dark[1, 2] == dark.max(), "the ramp ends at 1"
    assert dark[0, 0] < 0.05 and len(np.unique(pixels(heat_image(np.full((3, 4), 0.3), 0.6)))) == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))
def test_block_means_leave_no_entry_out(m, n, most):
    values = np.random.default_rng(m * n).random((m, n))
    means = block_means(values, most)
    assert means.shape == (min(m, most), min(n, most))
    # blocks of a and b entries: their means, weighted by size, are the mean of all
    sizes = [np.diff([*(np.arange(min(k, most)) * k // min(k, most)), k]) for k in (m, n)]
    assert sizes[0] @ means @ sizes[1] == pytest.approx(values.sum())
    if m % most == n % most == 0:
        pooled = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(values)[None], (most, most))[0]
        assert means == pytest.approx(pooled.numpy())


def test_weights_page_darkens_with_weight_and_shows_the_numbers(tmp_path):
    plan = [[0.1, 0.1, 0.1, 0.0] for _ in range(5)]
    plan[3][2] = 0.9
    rows = [row | {"plan": plan} for row in weight_rows()]
    page = assert_sound(build_weights_page(rows, tmp_path / "deep" / "weights.html"))
    tokens = [a for a in page.all("span") if a.get("class") == "token"]
    # Two labels and the uniform weights, five chosen and four rejected tokens each.
    assert len(tokens) == 3 * (5 + 4)
    shade = {a["title"]: float(a["style"].split(":")[1]) for a in tokens}
    assert shade["weight 2.200"] > shade["weight 0.800"] > shade["weight 0.500"] > shade["weight 0.400"] > 0
    assert max(shade.values()) == DARKEST
    words = page.words()
    assert "2.20" in words and "<b>Lyon</b>" in words and "↵" in words
    assert "The most: 'Paris' to '<b>Lyon</b>' (0.900), 'The' to 'It' (0.100)" in words
    assert "weights/entropy 0.750" in words
    picture = next(a["aria-label"] for a in page.all("svg") if "Transport plan" in (a.get("aria-label") or ""))
    assert "5 chosen by 4 rejected tokens" in picture and "'Paris' to '<b>Lyon</b>'" in picture


def test_a_plan_names_its_tokens_unless_they_are_too_many(tmp_path):
    chosen, rejected = [f"c{i}" for i in range(80)], [HOSTILE, "$x$", "\n", " "]
    sizes = {"chosen_weights": [1.0] * 80, "rejected_weights": [1.0] * 4}
    row = weight_rows()[0] | sizes | {"chosen_tokens": chosen, "rejected_tokens": rejected, "plan": [[0.1] * 4] * 80}
    page = assert_sound(build_weights_page([row], tmp_path / "w.html"))
    named = "".join(page.text).split("Transport plan")[0].split("uniform")[-1]  # the picture's text stands last
    assert all(f"c{i}" in named for i in range(80)) and "$x$" in named and "↵" in named and "␣" in named
    assert "<script" not in (tmp_path / "w.html").read_text()
    row |= {"chosen_tokens": [*chosen, "c80"], "chosen_weights": [1.0] * 81, "plan": [[0.1] * 4] * 81}
    words = assert_sound(build_weights_page([row], tmp_path / "w.html")).words()
    assert "The axes count tokens: there are too many to name" in words
    assert "<image" in (tmp_path / "w.html").read_text(), "the plan is drawn all the same"


def test_the_page_of_transport_shows_plan_figures_and_grid(tiny_llama, tmp_path, capsys):
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS[:3]))
    command(tiny_llama, tmp_path / "pairs.json", "reg=1", "--out", tmp_path / "w.html")
    command(tiny_llama, tmp_path / "pairs.json", "reg=1", "--out", tmp_path / "w.json")
    rows = json.loads((tmp_path / "w.json").read_text())
    page = assert_sound(tmp_path / "w.html")
    words, said = page.words(), capsys.readouterr().out
    assert all("grid" not in row and "plan" not in row for row in rows)
    for row in rows:
        for side in ("chosen", "rejected"):
            effective = row["metrics"][f"weights/effective_tokens_{side}"]
            assert f"{effective:.1f} of {len(row[f'{side}_ids'])}" in words
            assert f"{row['metrics'][f'weights/entropy_{side}']:.3f}" in words
    # 98 % of effective tokens are a standard deviation of a seventh of the mean
    weighted = [np.array(row[f"{side}_weights"]) for row in rows for side in ("chosen", "rejected")]
    assert max(weights.std() / weights.mean() for weights in weighted) < 1 / 7
    assert "nearly uniform in 3 of 3 pairs" in words and said.count("nearly uniform in 3 of 3 pairs") == 2
    pictures = page.all("img")
    assert len(pictures) == 3 * 3 * len(REGS) * len(REG_MS)
    plans = [a["alt"] for a in pictures if a["alt"]]
    assert plans == [
        f"Transport plan at reg {reg:g}, reg_m {reg_m:g}" for _ in rows for reg in REGS for reg_m in REG_MS
    ]
    shapes = [pixels(a["src"]).shape for a in pictures if a["alt"]]
    lengths = [tuple(min(COARSE, len(row[f"{side}_ids"])) for side in ("chosen", "rejected")) for row in rows]
    assert shapes == [shape for shape in lengths for _ in range(len(REGS) * len(REG_MS))]
    assert sum(a.get("class") == "asked" for a in page.all("td")) == 3 and words.count("as above") == 3
    command(tiny_llama, tmp_path / "pairs.json", "reg=0.03", "reg_m=0.1", "--out", tmp_path / "sharp.html")
    assert "The weights are nearly uniform" not in assert_sound(tmp_path / "sharp.html").words()


@pytest.mark.parametrize("method", ["dpo", "sampo", "ld-dpo", "simpo", "confpo"])
def test_methods_without_transport_have_a_page_without_plan_and_grid(tiny_llama, tmp_path, method):
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS[:2]))
    command(tiny_llama, tmp_path / "pairs.json", "--method", method, "--out", tmp_path / "w.html")
    page = assert_sound(tmp_path / "w.html")
    assert not page.all("img") and not page.all("svg") and not page.all("figure")
    words = page.words()
    assert f"weighted by {method}" in words and "effective tokens" in words
    assert "reg_m" not in words and "early uniform" not in words

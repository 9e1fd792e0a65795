"""Architectures of transformers through what a run does with a model; all of them in the slow test."""

from __future__ import annotations

import pytest

from .table import PAGE, run_sweep, sweep_one, table, without_figures, written
from .tiny import names

PADDED, FLAT, OWN = "padded", "shared prompts", "padded, own head"
EXPECTED = {
    "falcon": ("equal", PADDED),  # its dropout is a module where others have a number
    "falcon_h1": ("equal", OWN),  # multiplies its logits
    "gemma2": ("equal", FLAT),  # caps its scores, which transformers' sdpa leaves out
    "gemma3": ("equal", FLAT),  # a multimodal model: its text model
    "gpt2": ("equal", PADDED),
    "llama4": ("equal", OWN),  # a multimodal model whose text model does not name its decoder
    "mamba": ("equal", PADDED),  # no attention at all
    "mixtral": ("equal", FLAT),  # jitters its router in train mode
    "modernbert-decoder": ("equal", OWN),  # takes its head for its decoder
    "opt": ("equal", PADDED),  # drops out by a function, not a module
    "qwen2_vl": ("equal", FLAT),  # a text model that is a Qwen2 by another name
    "bert": ("refused", ""),
    "bert-generation": ("refused", ""),  # reads in both directions, which only shows when it computes
    "paligemma": ("refused", ""),
    "gemma4_assistant": ("refused", ""),  # needs another model's states
    "youtu": ("refused", ""),  # clears its padding token's embedding at each load
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_equal_or_refused(mesh, name):
    row = sweep_one(name, mesh)
    assert (row.outcome, row.layout) == EXPECTED[name], row
    if row.outcome == "refused":
        assert len(row.words) > 40


@pytest.mark.slow
def test_every_architecture_is_equal_or_refused_as_the_page_says():
    rows = run_sweep(names())
    assert [row for row in rows if row.outcome == "wrong"] == []
    assert sum(row.outcome in ("equal", "refused") for row in rows) >= 75
    assert without_figures(table(rows)) == without_figures(written()), (
        f"run `python -m tests.architectures --write` to renew the table in {PAGE}"
    )

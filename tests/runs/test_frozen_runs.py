"""Frozen models that a recipe names by their folder."""

from __future__ import annotations

import shutil

import pytest
from support.training import metrics, settings

from pipeline.recipe import make_recipe
from pipeline.run.run import run
from pipeline.sweep.trial_recipes import frozen_sources


@pytest.mark.slow
def test_a_relative_folder_is_one_below_where_the_command_was_typed(tmp_path, tiny_llama, monkeypatch):
    """Workers have other working directories."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "other")
    tree = settings(
        tmp_path, tiny_llama, methods={"mine": {"method": "tgdpo", "oracle": "./other"}},
        train={"workers": 1, "max_steps": 2},
    )  # fmt: skip
    run(make_recipe(tree), tmp_path / "run", world=None, progress=lambda *_: None, until="train")
    assert len(metrics(tmp_path / "run" / "models" / "mine")[0]) == 2


def test_a_sweep_resolves_every_folder_that_it_tries(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}, "mine": {"method": "tgdpo", "oracle": "./one"}})
    tree["sweep"] = {"params": {"methods.mine.oracle": ["./two", "dpo"]}, "metric": "eval_loss"}
    assert frozen_sources(make_recipe(tree), "mine") == {"./one", "./two"}

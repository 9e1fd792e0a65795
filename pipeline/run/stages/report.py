"""Token weights, the leaderboard of everything that was judged, and the page."""

from __future__ import annotations

import json
from typing import Any

from otpo.files import write_atomically
from pipeline.judge.board import make_board
from pipeline.recipe import identity
from pipeline.run.context import RunContext
from pipeline.run.judges import judge_config
from pipeline.run.stages.generate import read_outputs


def report(run: RunContext) -> None:
    """Write weights.json, leaderboard.csv and report.html, where anything they show has changed."""
    manifest, folder = run.manifest, run.folder
    inputs = {
        "stages": dict(manifest.inputs),
        "report": identity(run.recipe)["report"],
        "name": run.recipe.name,
    }
    if not (manifest.needs("report", inputs) or manifest.did):
        return
    from eval.board.report import build

    manifest.begin("report", inputs, [folder.report])
    with manifest.doing("report", inputs, [folder.report]):
        run.progress("report", 0, 2, "token weights")
        write_weights(run)
        run.progress("report", 1, 2, "page")
        write_board(run)
        build([folder.path], folder.path, run.recipe.report.title)
        run.progress("report", 2, 2, "")


def write_weights(run: RunContext) -> None:
    """Write the token weights of the trained models on a few of the pairs."""
    recipe = run.recipe
    labels = [label for label in recipe.methods if recipe.method(label).method.weight_rule.name != "uniform"]
    if not labels or not recipe.report.weight_pairs:
        return
    import ray

    from otpo.data.token_file import load_tokens
    from otpo.explain import model_token_weights
    from pipeline.cluster.connect import connect
    from pipeline.cluster.placement import has_gpu

    connect(recipe.cluster.address)
    gpus = 1 if has_gpu() else 0
    if gpus:
        run.engines.close()
    # on the cluster, because the driver's machine may be too small for the model
    remote = ray.remote(num_cpus=0, num_gpus=gpus)(model_token_weights)
    rows: list[dict[str, Any]] = []
    for label in labels:
        tokens = load_tokens(run.manifest.tree["stages"][f"train/{label}"]["tokens"])
        items = tokens[: recipe.report.weight_pairs]
        found: Any = remote.remote(
            run.sources.model(label), items, recipe.method(label), run.sources.frozen_models(label)
        )
        rows += ray.get(found)
    write_atomically(run.folder.weights, json.dumps(rows, ensure_ascii=False))


def write_board(run: RunContext) -> None:
    """Write the leaderboard of everything that was judged, if anything was."""
    import pandas as pd

    from eval.board.leaderboard import write_leaderboard

    boards = []
    for name, task in run.sources.tasks.items():
        file = run.folder.verdicts(name)
        if file.exists():
            outputs = {label: read_outputs(run, label, name) for label in run.recipe.labels()}
            reference = json.loads(run.folder.reference(name).read_text())
            config = judge_config(run.recipe, task)
            boards.append(make_board(pd.read_parquet(file), outputs, reference, config, seed=run.recipe.report.seed))
    if boards:
        write_leaderboard(pd.concat(boards, ignore_index=True), run.folder.leaderboard)

"""What a run's page and table are made of: token weights on a few pairs, and the leaderboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.run.stages import Run


def write_weights(run: Run) -> None:
    """Token weights of the trained models on a few of the pairs, for the page."""
    labels = [label for label in run.recipe.methods if run.recipe.method(label).method.weight_rule.name != "uniform"]
    if not labels or not run.recipe.report.weight_pairs:
        return
    import ray

    from otpo.data.token_file import load_tokens
    from otpo.explain import model_token_weights
    from pipeline.cluster.connect import connect

    connect(run.recipe.cluster.address)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    if gpus:
        run.close_engines()
    # on the cluster, because the driver's machine may be too small for the model
    remote = ray.remote(num_cpus=0, num_gpus=gpus)(model_token_weights)
    rows: list[dict[str, Any]] = []
    for label in labels:
        tokens = load_tokens(run.manifest.tree["stages"][f"train/{label}"]["tokens"])
        items = tokens[: run.recipe.report.weight_pairs]
        found: Any = remote.remote(
            str(run.model_of(label)), items, run.recipe.method(label), run.frozen_models_of(label)
        )
        rows += ray.get(found)
    (run.folder / "weights.json").write_text(json.dumps(rows, ensure_ascii=False))


def write_board(run: Run) -> None:
    """The leaderboard of everything that was judged."""
    import pandas as pd

    from eval.board.leaderboard import leaderboard, write_leaderboard

    boards = []
    for name, task in run.tasks.items():
        folder, config = run.folder / "judge" / name, run.judge_config(task)
        if (folder / "verdicts.parquet").exists():
            outputs = {label: run.outputs(label, name) for label in run.recipe.labels()}
            rows = json.loads((folder / "reference.json").read_text())
            for reference, verdicts in pd.read_parquet(folder / "verdicts.parquet").groupby("reference", sort=False):
                boards.append(
                    leaderboard(
                        verdicts,
                        outputs,
                        outputs.get(str(reference), rows),
                        judge=config.model or "",
                        protocol=config.protocol,
                        calibration=Path(config.calibration) if config.calibration else None,
                        seed=run.recipe.report.seed,
                    )
                )
    if boards:
        write_leaderboard(pd.concat(boards, ignore_index=True), run.folder / "leaderboard.csv")

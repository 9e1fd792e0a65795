"""One model's outputs, verdicts and row of the board, in its own folder: of a trial, or of a milestone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from otpo.errors import WorkError
from otpo.files import Row
from pipeline.judge.board import make_board
from pipeline.judge.judging import Judge, Match, judge_task
from pipeline.milestones.judged import note_judged, read_judged
from pipeline.milestones.room import judge_gpus
from pipeline.run.context import RunContext
from pipeline.run.folder import LabelFolder
from pipeline.run.judges import answering, judge_config, judge_of, ready_judge, reference_of, reference_rows
from pipeline.run.stages.generate import generate_task

if TYPE_CHECKING:
    from eval.tasks import Task


@contextmanager
def judging_beside(run: RunContext, task: Task) -> Iterator[tuple[Judge, list[Row]]]:
    """A task's judge, and the reference's outputs: there before training begins, ready while it goes on.

    A judge that vLLM serves keeps its GPUs for the time of the body.
    """
    from pipeline.cluster.placement import live_nodes

    run.engines.leave_to_judge(judge_gpus(run.recipe, live_nodes()))
    try:
        with ready_judge(run, judge_config(run.recipe, task)) as ready, answering(run, ready) as config:
            if reference_of(run, task).label:
                folder = run.folder.label("base").generation(task.name)
                generate_task(run, run.sources.model("base"), "base", task, folder)
            yield judge_of(run, config), reference_rows(run, task)
    finally:
        run.engines.leave_to_judge(0)


def judge_milestone(
    run: RunContext,
    judge: Judge,
    folder: LabelFolder,
    step: int,
    task: Task,
    reference: list[Row],
    *,
    label: str,
    metrics: Sequence[str],
    keeps_weights: bool,
) -> dict[str, Any]:
    """Judge a milestone and note its figures in its folder; one that is judged is only read.

    Args:
        label: that it is a milestone of.
        metrics: what the figures must have.
        keeps_weights: whether something will read the model again.

    Raises:
        WorkError: too many verdicts failed for a figure.
    """
    if folder.judged.exists():
        return read_judged(folder)
    figures = judge_model(run, judge, f"{label}@{step}", folder, task, reference)
    if missing := [metric for metric in metrics if figures.get(metric) is None]:
        failed = f"{figures.get('n_failed') or 0:.0f} of {len(reference)} verdicts failed"
        raise WorkError(f"the board gives no {missing[0]} of step {step}: {failed}")
    generation = json.loads((folder.generation(task.name) / "generation.json").read_text())
    note_judged(folder, step, generation["model_sha256"], figures, keeps_weights=keeps_weights)
    return figures


def judge_model(
    run: RunContext, judge: Judge, name: str, folder: LabelFolder, task: Task, reference: list[Row]
) -> dict[str, Any]:
    """Judge a folder's model against the reference; what is there already is not done again.

    Args:
        name: of the model on the board.
        reference: the reference's outputs for the task's prompts.

    Returns:
        Its row of the board.
    """
    from eval.judge.table import write_verdicts

    outputs = generate_task(run, folder.model, name, task, folder.generation(task.name)).outputs
    if judge.rewards is not None and run.engines.on_gpu:
        run.engines.close()  # scoring wants their memory
    match = Match(name, str(reference[0].get("generator") or "the reference"), outputs, reference)
    verdicts = judge_task(judge, [match], task.name, subset=run.recipe.generate.limit is not None)
    if judge.rewards is not None:
        judge.rewards.unload()  # and the next model wants its memory
    write_verdicts(verdicts, folder.verdicts_on(task.name))
    board = make_board(verdicts, {name: outputs}, reference, judge.config, seed=run.recipe.report.seed)
    return json.loads(board.to_json(orient="records"))[0]

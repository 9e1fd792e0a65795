"""In the driver of a run: milestones of its labels judged while they train, so that the best of them can be exported.

`train: {eval_every: 20, best_metric: win_rate, best_mode: max}`
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from otpo.files import Row, write_json
from pipeline.judge.judging import Judge
from pipeline.milestones.judging import judge_milestone, judging_beside
from pipeline.milestones.room import check_judged_beside
from pipeline.run.context import RunContext
from pipeline.run.stages.generate import generation_inputs
from pipeline.run.stages.judge import judging_inputs

if TYPE_CHECKING:
    from eval.tasks import Task

LOOK_SECONDS = 0.5


def selecting_labels(run: RunContext, labels: Sequence[str]) -> list[str]:
    """Those of the labels whose best step is chosen by a judge."""
    return [label for label in labels if label != "base" and run.recipe.train_of(label).selects_by_judge]


def selecting_task(run: RunContext) -> Task:
    """The task whose outputs are judged: the first one."""
    return next(iter(run.sources.tasks.values()))


def selection_inputs(run: RunContext, label: str) -> dict[str, Any]:
    """What a label that is chosen by a judge depends on beside its training; nothing for others."""
    if not selecting_labels(run, [label]):
        return {}
    task = selecting_task(run)
    return {"selected_by": generation_inputs(run, task) | judging_inputs(run, task)}


@contextmanager
def judging_milestones(run: RunContext, labels: Sequence[str], workers: int) -> Iterator[None]:
    """Judge the milestones of labels, in a thread of this process, while the body trains them.

    Args:
        labels: those that the body trains.
        workers: of their worker group.

    Raises:
        UserError: no room for an engine beside training.
    """
    chosen = selecting_labels(run, labels)
    if not chosen:
        yield
        return
    from pipeline.cluster.placement import live_nodes

    task = selecting_task(run)
    check_judged_beside(run.recipe, live_nodes(), workers)
    run.engines.leave_training_nodes()
    for label in chosen:
        for _, folder in run.folder.label(label).milestones():
            if folder.judged.exists() and "error" in json.loads(folder.judged.read_text()):
                folder.judged.unlink()  # of an earlier command: it is asked again
    with judging_beside(run, task) as (judge, reference):
        run.engines.pool()  # before the workers take the GPUs
        stop = threading.Event()
        thread = threading.Thread(target=_serve, args=(run, judge, task, reference, chosen, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10)  # the workers have waited for it; busy only where the run is interrupted


def _serve(
    run: RunContext, judge: Judge, task: Task, reference: list[Row], labels: Sequence[str], stop: threading.Event
) -> None:
    while not stop.wait(LOOK_SECONDS):
        for label in labels:
            metric = run.recipe.train_of(label).best_metric or ""
            for step, folder in run.folder.label(label).milestones():
                if folder.model.exists() and not folder.judged.exists():
                    try:
                        judge_milestone(
                            run, judge, folder, step, task, reference,
                            label=label, metrics=[metric], keeps_weights=True,
                        )  # fmt: skip
                    except Exception as error:  # the workers end training with it; the same command judges again
                        write_json(folder.judged, {"error": f"{type(error).__name__}: {error}", "step": step})

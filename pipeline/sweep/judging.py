"""The driver's side of a judged sweep: outputs, verdicts and a row of the board for each trained trial."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otpo.errors import LastingError, UserError
from otpo.files import Row
from pipeline.judge.board import make_board
from pipeline.judge.judging import Judge
from pipeline.milestones.judging import judge_milestone, judge_model, judging_beside
from pipeline.run.context import RunContext
from pipeline.run.judges import judge_config, reference_rows
from pipeline.run.stages.generate import generate_task
from pipeline.sweep.held_out import Prompts, rows_of
from pipeline.sweep.search import LEVEL

if TYPE_CHECKING:
    from eval.tasks import Task


@dataclass(frozen=True)
class TrialJudging:
    """What judging any trial takes."""

    run: RunContext
    prompts: Prompts
    judge: Judge
    reference: list[Row]
    by_preference: bool
    keep_engine: bool

    def trial(self, name: str, against: str | None = None) -> dict[str, Any]:
        """Judge a trained trial on the trials' prompts, against the reference or (by preferences) another trial."""
        task = self.prompts.trials
        if not self.by_preference:
            return self._judge(name, task, self._reference(task))
        if against is None:
            self._outputs(name, task)  # the next trial is compared with them
            self._make_room()
            return {next(iter(self.run.recipe.sweep.objectives)): LEVEL}
        return self._judge(name, task, json.loads(self.run.folder.sweep.outputs(against, task.name).read_text()))

    def milestone(self, name: str, step: int) -> dict[str, Any]:
        """Judge a trial as it was after a step, while it trains on; notes the figures in the milestone's folder."""
        from pipeline.sweep.trials import RUNNING, read_trial

        label = self.run.folder.sweep.label(name)
        if read_trial(label).get("state") != RUNNING:
            raise LastingError("the trial was stopped before this milestone was judged")
        task = self.prompts.trials
        return judge_milestone(
            self.run, self.judge, label.milestone(step), step, task, self._reference(task),
            label=name, metrics=list(self.run.recipe.sweep.objectives), keeps_weights=False,
        )  # fmt: skip

    def winner(self, name: str) -> dict[str, Any]:
        """Judge it on the prompts that no trial was judged on."""
        assert self.prompts.fresh is not None
        return self._judge(name, self.prompts.fresh, self._reference(self.prompts.fresh))

    def _make_room(self) -> None:
        if not self.keep_engine:
            self.run.engines.close()

    def _reference(self, task: Task) -> list[Row]:
        return rows_of(self.reference, task)

    def _outputs(self, name: str, task: Task) -> list[Row]:
        folder = self.run.folder.sweep.label(name)
        return generate_task(self.run, folder.model, name, task, folder.generation(task.name)).outputs

    def _judge(self, name: str, task: Task, reference: list[Row]) -> dict[str, Any]:
        """Outputs and verdicts, written to the trial's folder; gives its row of the board."""
        row = judge_model(self.run, self.judge, name, self.run.folder.sweep.label(name), task, reference)
        self._make_room()
        return row


@contextmanager
def judging_trials(
    run: RunContext, prompts: Prompts | None, queue: Any, *, keep_engine: bool, by_preference: bool
) -> Iterator[TrialJudging | None]:
    """Judge the trials that the queue holds, in a thread of this process, while the body runs.

    Args:
        prompts: whose outputs are judged; None where nothing is.
        queue: handle of a `JudgingQueue`.
        keep_engine: whether the engine stays loaded while trials train.
        by_preference: whether trials are judged against each other.
    """
    if prompts is None:
        yield None
        return
    from pipeline.cluster.placement import has_gpu

    task = prompts.whole
    if keep_engine:
        run.engines.leave_training_nodes()
    with judging_beside(run, task) as (judge, reference):
        judging = TrialJudging(run, prompts, judge, reference, by_preference, keep_engine)
        if not keep_engine:
            run.engines.close()
        elif has_gpu():
            run.engines.pool()  # before trials scatter over the nodes: an engine's GPUs are all on one
        stop = threading.Event()
        thread = threading.Thread(target=_serve, args=(judging, queue, stop), daemon=True)
        thread.start()
        try:
            yield judging
        finally:
            stop.set()
            thread.join(timeout=10)  # idle after the last trial; busy only where the sweep is interrupted


def _serve(judging: TrialJudging, queue: Any, stop: threading.Event) -> None:
    import ray

    waiting = queue.next.remote()
    while not stop.is_set():
        ready, _ = ray.wait([waiting], timeout=0.5)
        if not ready:
            continue
        name, against, step = ray.get(waiting)
        try:
            figures = judging.trial(name, against) if step is None else judging.milestone(name, step)
        except Exception as error:  # the trial's row says so; the other trials go on
            figures = {
                "error": f"{type(error).__name__}: {error}",
                "lasting": isinstance(error, (UserError, LastingError)),
            }
        if stop.is_set():  # interrupted while it judged: the queue is gone, and nobody waits
            return
        ray.get(queue.finish.remote(name, step, figures))
        waiting = queue.next.remote()


def write_page(run: RunContext, prompts: Prompts | None, trials: list[str], held_out: list[str]) -> None:
    """Write the page over the finished trials and, where they were judged, their verdicts and leaderboard.

    Args:
        held_out: the labels that were judged on fresh prompts.
    """
    from eval.board.report import build

    folder = run.folder.sweep
    if prompts is not None:
        import pandas as pd

        from eval.board.leaderboard import write_leaderboard
        from eval.board.run_files import write_outputs
        from eval.judge.table import write_verdicts

        rows, config = reference_rows(run, prompts.whole), judge_config(run.recipe, prompts.whole)
        frames, boards = [], []
        for task, names in ((prompts.trials, trials), (prompts.fresh, held_out)):
            if task is None or not names:
                continue
            reference = rows_of(rows, task)
            files = [folder.label(name).verdicts_on(task.name) for name in names]
            verdicts = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
            outputs = {name: json.loads(folder.outputs(name, task.name).read_text()) for name in names}
            frames.append(verdicts)
            boards.append(make_board(verdicts, outputs, reference, config, seed=run.recipe.report.seed))
            write_outputs(folder.path, task.name, {}, reference)  # the others lie in the trials' folders already
        if boards:
            write_verdicts(pd.concat(frames, ignore_index=True), folder.sweep_verdicts)
            write_leaderboard(pd.concat(boards, ignore_index=True), folder.leaderboard)
    build([folder.path], folder.path)

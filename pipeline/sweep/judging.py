"""The driver's side of a judged sweep: outputs, verdicts and a row of the board for each trained trial."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otpo.files import Row
from pipeline.judge.board import make_board, write_judged
from pipeline.judge.judging import Judge, Match, judge_task
from pipeline.run.context import RunContext
from pipeline.run.judges import judge_config, ready_judge, reference_of, reference_rows, reward_template
from pipeline.run.stages.generate import generate_task

if TYPE_CHECKING:
    from eval.tasks import Task


@dataclass(frozen=True)
class TrialJudging:
    """What judging any trial takes."""

    run: RunContext
    task: Task
    judge: Judge
    reference: list[Row]

    def __call__(self, name: str) -> dict[str, Any]:
        """Outputs and verdicts of a trained trial, written to its folder; gives its row of the board."""
        from eval.judge.table import write_verdicts

        run, task, judge = self.run, self.task, self.judge
        folder = run.folder.sweep.label(name)
        outputs = generate_task(run, folder.model, name, task, folder.generation(task.name)).outputs
        if judge.rewards is not None and run.engines.on_gpu:
            run.engines.close()  # scoring wants their memory
        match = Match(name, reference_of(run, task).label or "the reference", outputs, self.reference)
        verdicts = judge_task(judge, [match], task.name, subset=run.recipe.generate.limit is not None)
        if judge.rewards is not None:
            judge.rewards.unload()  # and the next trial wants its memory
        write_verdicts(verdicts, folder.verdicts)
        board = make_board(verdicts, {name: outputs}, self.reference, judge.config, seed=run.recipe.report.seed)
        return json.loads(board.to_json(orient="records"))[0]


@contextmanager
def judging_trials(run: RunContext, task: Task | None, queue: Any, *, keep_engine: bool) -> Iterator[None]:
    """Judge the trials that the queue holds, in a thread of this process, while the body runs.

    Args:
        task: whose outputs are judged; None where nothing is.
        queue: handle of a `JudgingQueue`.
        keep_engine: whether the engine stays loaded while trials train.
    """
    if task is None:
        yield
        return
    from pipeline.cluster.placement import has_gpu

    if keep_engine:
        run.engines.leave_training_nodes()
    with ready_judge(run, judge_config(run.recipe, task)) as config:
        if reference_of(run, task).label:
            generate_task(run, run.sources.model("base"), "base", task, run.folder.label("base").generation(task.name))
        judge = Judge(config, run.folder.judge_store, reward_template(run, config.reward_model), run.progress)
        judging = TrialJudging(run, task, judge, reference_rows(run, task))
        if not keep_engine:
            run.engines.close()
        elif has_gpu():
            run.engines.pool()  # before trials scatter over the nodes: an engine's GPUs are all on one
        stop = threading.Event()
        thread = threading.Thread(target=_serve, args=(judging, queue, keep_engine, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10)  # idle after the last trial; busy only where the sweep is interrupted


def _serve(judging: TrialJudging, queue: Any, keep_engine: bool, stop: threading.Event) -> None:
    import ray

    waiting = queue.next.remote()
    while not stop.is_set():
        ready, _ = ray.wait([waiting], timeout=0.5)
        if not ready:
            continue
        name = ray.get(waiting)
        try:
            figures = judging(name)
        except Exception as error:  # the trial's row says so; the other trials go on
            figures = {"error": f"{type(error).__name__}: {error}"}
        if not keep_engine:
            judging.run.engines.close()
        ray.get(queue.finish.remote(name, figures))
        waiting = queue.next.remote()


def write_page(run: RunContext, task: Task | None, trials: list[str]) -> None:
    """Write the page over the finished trials and, where they were judged, their verdicts and leaderboard."""
    folder = run.folder.sweep
    if task is None:
        from eval.board.report import build

        build([folder.path], folder.path)
        return
    import pandas as pd

    reference = reference_rows(run, task)
    verdicts = pd.concat([pd.read_parquet(folder.label(name).verdicts) for name in trials], ignore_index=True)
    outputs = {name: json.loads(folder.outputs(name, task.name).read_text()) for name in trials}
    config = judge_config(run.recipe, task)
    board = make_board(verdicts, outputs, reference, config, seed=run.recipe.report.seed)
    # the outputs lie in the trials' folders already
    write_judged(folder.path, task.name, verdicts, board, {}, reference)

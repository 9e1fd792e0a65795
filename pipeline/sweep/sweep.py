"""Ray Tune over `methods.*` and `train.*` keys: trials share the base, tokens, cached reference and one engine.

otpo sweep small_world sweep.params.methods.otpo.reg='[0.03, 0.1, 0.3, 1]'

Everything lands in `runs/<name>/sweep/`, laid out as a run is: `models/<trial>/`, `verdicts.parquet`,
`leaderboard.csv`, `report.html`, and beside them `results.csv`, `plot.svg` and `best.yaml`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.judge.config import JudgeConfig
from otpo.errors import UserError, WorkError
from otpo.identity import source_identity
from pipeline.progress import Progress
from pipeline.recipe import Recipe, digest
from pipeline.run.context import World
from pipeline.run.stages import Run
from pipeline.sweep.results import Outcome, read_outcome, write_results
from pipeline.sweep.search import Search, frozen_labels, plan
from pipeline.sweep.tuner import Share, run_trials, share

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]


def sweep(
    recipe: Recipe, folder: Path, *, world: World | None, show: Progress, say: Say = print, redo: bool = False
) -> Outcome:
    """Do what of a sweep is not done yet.

    Args:
        folder: of the run; the sweep's own is `folder/sweep`. say: called with a line that a person should read.

    Raises:
        UserError: wrong input or too small a cluster; nothing was started. WorkError: not one trial came to its end.
    """
    search = plan(recipe)
    this = _Sweep(recipe, folder.absolute(), world, show, redo)
    if search.task:
        this.check_answering()
    with this.opened():
        return this.sweep(search, say)


class _Sweep(Run):
    """A run whose stages after the pairs are the trials and what comes of them."""

    def sweep(self, search: Search, say: Say) -> Outcome:
        """Base, pairs, trials, results."""
        self.search, self.say, self.out, self.spent = search, say, self.folder / "sweep", 0.0
        self.task = self.tasks[search.task] if search.task else None
        if self.task and self._reference(self.task)[0] not in (None, "base"):
            raise UserError(
                f"judge.reference is '{self.recipe.judge.reference}', which a sweep does not train: set"
                " judge.reference=base, or a file."
            )
        # a first call is refused before the base is trained, and a finished one needs no Ray
        divided = None if "sweep" in self.manifest.tree["stages"] else share(self.recipe, search)
        self.base()
        self.pairs()
        self._train_frozen()
        trained_from, objective = self._trained_from(), self._objective()
        tried = self.recipe.sweep.model_dump(mode="json", exclude={"max_concurrent_trials"})
        if not self.needs("sweep", {"trials": trained_from, "objective": objective, "sweep": tried}):
            return read_outcome(self.out, search)
        if self.needs("sweep/trials", trained_from):
            self.clear("sweep/trials", [self.out])
        started = time.perf_counter()
        trials = self._trials(divided or share(self.recipe, search), digest(objective))
        outcome = write_results(self.recipe, search, self.out, trials)
        if outcome.best is None:
            raise WorkError(
                f"Not one of {len(trials)} trials came to its end; {self.out / 'results.csv'} has the reasons."
                f" The first: {trials[0].get('error')}"
            )
        self._write_boards([trial["name"] for trial in trials if trial["state"] == "done"])
        if not outcome.failed:  # the same command tries failed trials again
            outputs = [self.out / "results.csv", self.out / "best.yaml"]
            with self.manifest.doing("sweep", self.inputs_of["sweep"], outputs) as figures:
                figures["trials_seconds"] = round(time.perf_counter() - started, 2)
        self.did.append("sweep")
        return outcome

    def _train_frozen(self) -> None:
        """Train the labels that trials take as scorers, as `otpo run` would."""
        whole = self.recipe
        needed = frozen_labels(whole, self.search.label)
        self.recipe = whole.model_copy(update={"methods": {label: whole.methods[label] for label in needed}})
        try:
            self.train()
        finally:
            self.recipe = whole

    def _trained_from(self) -> dict[str, Any]:
        """What a trial's model depends on beside the trial's own values."""
        spec = self.recipe.method(self.search.label)
        return {
            "base": self.inputs_of["base"],
            "rows": self.inputs_of["pairs"] if self.recipe.pairs else source_identity(self.pairs_file),
            "train": self._training(self.search.label),
            "data": self.reading,
            "method": [self.search.label, spec.method.name, {**spec.hyperparameters, **spec.frozen_models}],
        }

    def _objective(self) -> dict[str, Any] | None:
        """What a trial's figures depend on beside its model."""
        if self.task is None:
            return None
        reference, file = self._reference(self.task)
        return {
            "judge": self.tree["judge"] | {"protocol": self.judge_config(self.task).protocol},
            "sampling": self._sampling,
            "engine": self._engine,
            "task": [self.task.name, source_identity(self.task.source), len(self.task.prompts)],
            "reference": reference or source_identity(file or self.task.source),
        }

    def _trials(self, divided: Share, key: str) -> list[dict[str, Any]]:
        """Run the trials; gives their records."""
        from pipeline.train.tokens import prepare_tokens

        tokens = prepare_tokens(
            self.recipe, self.folder, model=self.start.path, source=self.pairs_file, supervised=False
        )
        if self.task is None and tokens.validation is None:
            raise UserError(f"sweep.metric {self.search.metric} needs validation pairs: raise data.validation.")
        from pipeline.cluster.connect import connect
        from pipeline.sweep.trials import Desk, Setting

        connect(self.recipe.cluster.address)
        workers = self.recipe.train_of(self.search.label).workers
        self.say(
            f"{self.search.n_trials} trials, {divided.concurrent} at a time: each has {workers} training"
            f" worker{'s' * (workers > 1)} with {divided.cpus} CPU{'s' * (divided.cpus > 1)}."
        )
        setting = Setting(
            recipe=self.recipe,
            search=self.search,
            folder=self.out,
            models=self.folder / "models",
            caches=self.folder.parent / "scorers",
            start=self.start,
            tokens=tokens,
            cpus=divided.cpus,
            key=key,
        )
        desk: Any = Desk.remote()  # type: ignore[attr-defined]
        with self._answering(desk, divided):
            return run_trials(setting, desk, divided.concurrent, self.show)

    @contextmanager
    def _answering(self, desk: Any, divided: Share) -> Iterator[None]:
        """Answer the trials' questions in a thread of this process while the body runs."""
        if self.task is None:
            yield
            return
        with self.serving(self.judge_config(self.task)) as config:
            if self._reference(self.task)[0]:
                self._answers(self.model_of("base"), "base", self.folder / "models" / "base" / self.task.name)
            reference = self._reference_rows(self.task)
            if not divided.keep_engine:
                self.close_engines()
            stop = threading.Event()
            thread = threading.Thread(target=self._serve, args=(desk, config, reference, divided, stop), daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join(timeout=10)  # idle after the last trial; busy only where the sweep is interrupted

    def _serve(
        self, desk: Any, config: JudgeConfig, reference: list[dict[str, Any]], divided: Share, stop: threading.Event
    ) -> None:
        import ray

        question = desk.next.remote()
        while not stop.is_set():
            ready, _ = ray.wait([question], timeout=0.5)
            if not ready:
                continue
            name = ray.get(question)
            try:
                figures = self._judged(name, config, reference)
            except Exception as error:  # the trial's row says so; the other trials go on
                figures = {"error": f"{type(error).__name__}: {error}"}
            if not divided.keep_engine:
                self.close_engines()
            ray.get(desk.answer.remote(name, figures))
            question = desk.next.remote()

    def _judged(self, name: str, config: JudgeConfig, reference: list[dict[str, Any]]) -> dict[str, Any]:
        """Answers, verdicts and the board's row of a trained trial."""
        from eval.judge.verdicts import judge, ledger, write_verdicts

        assert self.task is not None
        folder, store = self.out / "models" / name, self.folder / "judge" / "store.sqlite"
        store.parent.mkdir(exist_ok=True)
        answers = self._answers(folder / "model", name, folder / self.task.name)
        verdicts = judge(
            answers,
            reference,
            config,
            store,
            self.task.name,
            self._counting(f"judge {name}"),
            subset=self.recipe.generate.limit is not None,
            spent_usd=self.spent,
        )
        self.spent += ledger(verdicts)["spent_usd"]
        write_verdicts(verdicts, folder / "verdicts.parquet")
        board = self._board(verdicts, {name: answers}, reference)
        return json.loads(board.to_json(orient="records"))[0]

    def _answers(self, model: Path, name: str, out: Path) -> list[dict[str, Any]]:
        from pipeline.generate.engine import Sampling

        assert self.task is not None

        def progress(done: int, total: int, rate: float) -> None:
            self.show(f"generate {name}", done, total, f"{rate:,.0f} tokens/s")

        sampling, template = Sampling(**self._sampling), self.recipe.generate.template
        return self.engines().generate(model, name, self.task.prompts, sampling, out, template, progress).outputs

    def _board(
        self, verdicts: pd.DataFrame, outputs: dict[str, list[dict[str, Any]]], reference: list[dict[str, Any]]
    ) -> pd.DataFrame:
        from eval.board.leaderboard import leaderboard

        assert self.task is not None
        config = self.judge_config(self.task)
        return leaderboard(
            verdicts,
            outputs,
            reference,
            judge=config.model or "",
            protocol=config.protocol,
            calibration=Path(config.calibration) if config.calibration else None,
            seed=self.recipe.report.seed,
        )

    def _write_boards(self, names: list[str]) -> None:
        """The files that any judged folder has at its top, and the page."""
        import pandas as pd

        from eval.board.leaderboard import write_leaderboard
        from eval.board.report import build
        from eval.board.run_files import write_answers
        from eval.judge.verdicts import write_verdicts

        if self.task is not None:
            reference, models = self._reference_rows(self.task), self.out / "models"
            verdicts = pd.concat([pd.read_parquet(models / n / "verdicts.parquet") for n in names], ignore_index=True)
            outputs = {n: json.loads((models / n / self.task.name / "model_outputs.json").read_text()) for n in names}
            write_verdicts(verdicts, self.out / "verdicts.parquet")
            write_answers(self.out, self.task.name, {}, reference)
            write_leaderboard(self._board(verdicts, outputs, reference), self.out / "leaderboard.csv")
        build([self.out], self.out)

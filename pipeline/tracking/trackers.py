"""The trackers that `tracking:` in a recipe can name, each behind the same few methods.

A tracker holds one training (a label of the recipe), or the leaderboard. Keys and addresses come from the environment
variables of each product (MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_API_KEY, TRACKIO_DIR, ...), never from a recipe.
To add a tracker, write a class here and add it to `TRACKERS`, `PACKAGES` and the recipe's `tracking`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from otpo.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
"""Name in a recipe, which is also the name of the module -> what pip installs."""


@dataclass(frozen=True)
class Place:
    """What a tracker is opened for.

    Attributes:
        project: the recipe's name: a W&B or Trackio project, an MLflow experiment.
        label: names the tracker's run: a label of the recipe, or "all models" for the leaderboard.
        folder: `tracking/` in the folder of the run, for what a tracker keeps on disk.
        config: settings of the training, as plain values.
        run: what `Tracker.run` was when an earlier process tracked the same training; None at the first time.
    """

    project: str
    label: str
    folder: Path
    config: dict[str, Any]
    run: str | None = None


class Tracker(Protocol):
    """One run in a tracker.

    Attributes:
        run: the tracker's own name of it, by which a later process goes on with it.
    """

    run: str

    def last_step(self, name: str) -> int:
        """The last step that the tracker held of a metric when it was opened; -1 if it held none."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of one step. Steps come in ascending order; a step may come in two parts."""

    def log_table(self, step: int, name: str, table: pd.DataFrame) -> None:
        """Log a table."""

    def flush(self) -> None:
        """Write what is held back to disk."""

    def finish(self, *, failed: bool) -> None:
        """Close the run."""


class TensorBoard:
    """Event files in `tracking/tensorboard/<label>`, which `tensorboard --logdir` reads.

    Opening a label writes its files from the start: that is simpler than reading which steps old files hold.
    """

    def __init__(self, place: Place):
        from torch.utils.tensorboard import SummaryWriter

        path = place.folder / "tensorboard" / place.label
        shutil.rmtree(path, ignore_errors=True)
        # purge_step tells a TensorBoard that is watching to drop what it has read from the deleted files
        self.writer: Any = SummaryWriter(str(path), purge_step=0)  # type: ignore[no-untyped-call]
        self.run = place.label
        if place.config:
            self.writer.add_text("config", f"```json\n{json.dumps(place.config, indent=1)}\n```")

    def last_step(self, name: str) -> int:
        """Always -1: the files are new."""
        return -1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A scalar each."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, table: pd.DataFrame) -> None:
        """A Markdown table on the page of texts."""
        rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
        text = "\n".join("|".join(["", *(str(cell).replace("|", "\\|") for cell in row), ""]) for row in rows)
        self.writer.add_text(name, text, step)

    def flush(self) -> None:
        """Else TensorBoard would see nothing for two minutes."""
        self.writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Close the event file."""
        self.writer.close()


class MLflow:
    """A run in the experiment that has the recipe's name: at MLFLOW_TRACKING_URI, or in files in `tracking/mlflow`."""

    def __init__(self, place: Place):
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # recent versions of MLflow refuse to write files without it
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (place.folder / "mlflow").absolute().as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric: Any = Metric
        self.client = MlflowClient(tracking_uri=uri)
        if place.run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or place.project
            experiment = self.client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self.client.create_experiment(name)
            self.run = self.client.create_run(number, run_name=place.label).info.run_id
            params = [Param(key, value) for key, value in _flat(place.config).items()]
            self.client.log_batch(self.run, params=params[:100])  # a call takes no more
            self.held: dict[str, int] = {}
        else:
            self.run = place.run
            self.client.update_run(self.run, status="RUNNING")
            names = self.client.get_run(self.run).data.metrics
            self.held = {
                name: max(metric.step for metric in self.client.get_metric_history(self.run, name)) for name in names
            }

    def last_step(self, name: str) -> int:
        """From the store."""
        return self.held.get(_allowed(name), -1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One call for all."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run, metrics=[self.metric(_allowed(name), value, now, step) for name, value in metrics.items()]
        )

    def log_table(self, step: int, name: str, table: pd.DataFrame) -> None:
        """A CSV file among the run's artifacts."""
        self.client.log_text(self.run, table.to_csv(index=False), f"{name}.csv")

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self, *, failed: bool) -> None:
        """Give the run its end."""
        self.client.set_terminated(self.run, status="FAILED" if failed else "FINISHED")


class WandB:
    """A run of Weights & Biases: on its server, or in `tracking/wandb` where WANDB_MODE is "offline".

    W&B cannot resume an offline run: it is written from the start, under the same id.
    """

    def __init__(self, place: Place):
        import wandb

        self.module: Any = wandb
        place.folder.mkdir(parents=True, exist_ok=True)
        offline = os.environ.get("WANDB_MODE") == "offline"
        for earlier in (place.folder / "wandb").glob(f"offline-run-*-{place.run}") if place.run else ():
            shutil.rmtree(earlier)
        settings = wandb.Settings(
            silent=True,
            console="off",  # else it captures the terminal's output
            # arguments, host and load of the driver, which say nothing about the workers
            x_disable_meta=True,
            x_disable_stats=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
        )
        self.tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or place.project,
            id=place.run or uuid.uuid4().hex[:8],
            name=place.label,
            config=place.config,
            dir=str(place.folder),
            resume=None if offline else "allow",
            reinit="create_new",  # several labels may be open at once
            settings=settings,
        )
        self.run = self.tracked.id
        self.start = self.tracked.starting_step

    def last_step(self, name: str) -> int:
        """The same for every metric: W&B takes no step before the last one that it has."""
        return self.start - 1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row of the run's history; the parts of one step are joined."""
        self.tracked.log(metrics, step=step)

    def log_table(self, step: int, name: str, table: pd.DataFrame) -> None:
        """A table."""
        self.tracked.log({name: self.module.Table(dataframe=table)}, step=step)

    def flush(self) -> None:
        """W&B's own process writes."""

    def finish(self, *, failed: bool) -> None:
        """Wait until everything is written or sent."""
        self.tracked.finish(exit_code=int(failed))


class Trackio:
    """A run in Trackio's local store (TRACKIO_DIR, by default in the cache of Hugging Face)."""

    def __init__(self, place: Place):
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.table: Any = trackio.Table
        self.run = place.label
        with redirect_stdout(sys.stderr):
            # `init` finishes the run that was opened before in the same context, so each has a context of its own
            self.tracked = Context().run(
                trackio.init,
                place.project,
                name=place.label,
                config=place.config,
                resume="never" if place.run is None else "allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self.held: dict[str, int] = {}
        rows = [] if place.run is None else SQLiteStorage.get_logs(place.project, place.label, run_id=self.tracked.id)
        for row in rows:
            self.held |= {name: max(row["step"], self.held.get(name, -1)) for name in row}

    def last_step(self, name: str) -> int:
        """From the store."""
        return self.held.get(name, -1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row, which Trackio's own thread writes a moment later."""
        self.tracked.log(dict(metrics), step=step)

    def log_table(self, step: int, name: str, table: pd.DataFrame) -> None:
        """A table."""
        self.tracked.log({name: self.table(dataframe=table)}, step=step)

    def flush(self) -> None:
        """Trackio's own thread writes."""

    def finish(self, *, failed: bool) -> None:
        """Wait until everything is written."""
        with redirect_stdout(sys.stderr):
            self.tracked.finish()


TRACKERS: dict[str, Callable[[Place], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that cannot work, before anything starts.

    Raises:
        UserError: one is not installed, or W&B has no key.
    """
    names = list(names)
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise UserError(
            f"tracking: not installed here: {', '.join(missing)}. Install with `pip install {packages}`, or leave"
            " it out of `tracking`."
        )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError(
                "tracking: wandb has no key. Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep"
                " the runs on this machine."
            )


def _allowed(name: str) -> str:
    """A metric's name in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names."""
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found

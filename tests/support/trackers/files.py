"""Reading back what the trackers hold, from their own files: metric -> [(step, value), ...] in the order of logging."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[int, float]]]


def _curves(rows: Iterator[tuple[int, str, float]]) -> Curves:
    found: Curves = {}
    for step, name, value in rows:
        found.setdefault(name, []).append((step, value))
    return found


def of_tensorboard(folder: Path, label: str) -> Curves:
    """The scalars of `tracking/tensorboard/<label>`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / label), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return _curves((event.step, name, event.value) for name in names for event in events.Scalars(name))


def tensorboard_text(folder: Path, label: str, tag: str) -> str:
    """A text of `tracking/tensorboard/<label>`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / label))
    events.Reload()
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def mlflow_client(folder: Path) -> Any:
    """A client of the files under `tracking/mlflow`."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    return MlflowClient((folder / "mlflow").absolute().as_uri())


def of_mlflow(folder: Path, run: str) -> Curves:
    """The metrics of an MLflow run, by its id."""
    client = mlflow_client(folder)
    names = client.get_run(run).data.metrics
    return _curves((m.step, name, m.value) for name in names for m in client.get_metric_history(run, name))


def of_wandb(folder: Path, run: str) -> tuple[Curves, dict[str, Any]]:
    """(metrics, config) of an offline W&B run, by its id. Its file must be the only one of the run."""
    from wandb.proto import wandb_internal_pb2

    [file] = (folder / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb")
    rows, config = [], {}
    for data in _leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows += [(items["_step"], name, value) for name, value in items.items() if not name.startswith("_")]
    return _curves(iter(rows)), config


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind seven bytes of W&B's own."""
    block, at, parts = 32768, 7, b""
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts = (parts if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts


def of_trackio(project: str, label: str) -> Curves:
    """The metrics of a Trackio run below TRACKIO_DIR, which this process must have set before it imported Trackio."""
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(project, label)
    return _curves(
        (row["step"], name, value) for row in rows for name, value in row.items() if name not in ("step", "timestamp")
    )

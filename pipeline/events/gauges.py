"""Figures for Ray's metrics: how far each piece of work is, and how fast training goes.

Ray serves them in Prometheus' format on each node, from where its dashboard's pages and Grafana read them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from pipeline.progress import Progress

DONE, TOTAL = "otpo_work_done", "otpo_work_total"
OF_TRAINING = {
    "tokens_per_second": "otpo_train_tokens_per_second",
    "loss": "otpo_train_loss",
    "step": "otpo_train_step",
}


def _connected() -> bool:
    """Whether this process belongs to a cluster; a run that has nothing to do does not even load Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@cache
def _gauge(name: str, description: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description, tag_keys=("run", "work"))


def gauged(progress: Progress, run: str) -> Progress:
    """The same callback, which also sets gauges of what is done and what there is to do.

    Args:
        run: the run's name, which tells its figures apart.
    """

    def told(what: str, done: int, total: int, remark: str) -> None:
        progress(what, done, total, remark)
        if total and _connected():
            tags = {"run": run, "work": what}
            _gauge(DONE, "Rows, steps, outputs or verdicts that are done.").set(done, tags)
            _gauge(TOTAL, "Rows, steps, outputs or verdicts that there are.").set(total, tags)

    return told


def set_training(run: str, label: str, line: Mapping[str, float]) -> None:
    """Set the gauges of training from the newest line of a label's metrics."""
    for key, name in OF_TRAINING.items():
        if key in line and _connected():
            _gauge(name, f"{key} of the newest optimizer step.").set(line[key], {"run": run, "work": label})

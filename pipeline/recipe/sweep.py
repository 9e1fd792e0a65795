"""The section `sweep` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe.sections import Section, Seed


class SweepRange(Section):
    """Values between two bounds, for every search but a grid."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    log: bool = Field(False, description="Draws evenly on a logarithmic scale.")
    integer: bool = Field(False, description="Draws whole numbers.")

    @model_validator(mode="after")
    def _bounds(self) -> SweepRange:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"expected low < high{', and low > 0 with log: true' if self.log else ''}")
        return self


class SweepConfig(Section):
    """Ray Tune over any `methods.*` or `train.*` key; each trial trains one label."""

    params: dict[str, list[bool | int | float | str] | SweepRange] = Field(
        {}, description="Dotted key of the recipe, and the values to try: a list, or {low, high, log, integer}."
    )
    label: str | list[str] | None = Field(
        None,
        description="Which of `methods` is tuned; of a list, each with as many trials. Unset: the one in `params`.",
    )
    search: Literal["grid", "random", "optuna", "glisp"] = Field(
        "grid", description="How values are chosen. glisp knows only which of two trials' outputs the judge prefers."
    )
    num_samples: int = Field(8, ge=1, description="Trials of any search but a grid, which tries every combination.")
    metric: str | list[str] = Field(
        "win_rate",
        description="What is optimised: a column of the board or eval_loss; of several, the first names the winner.",
    )
    mode: Literal["min", "max"] | list[Literal["min", "max"]] | None = Field(
        None, description="For each metric. Unset: min for a loss or a length, else max."
    )
    task: str | None = Field(None, description="Task whose outputs are judged. Unset: the first of generate.tasks.")
    scheduler: Literal["none", "asha"] = Field("none", description="asha stops trials that fall behind.")
    judge_every: int | None = Field(
        None,
        ge=1,
        description="Steps between models that are judged while a trial trains. Unset: none; asha: train.eval_every.",
    )
    grace_period: int | None = Field(
        None, ge=1, description="Steps before ASHA may stop a trial. Unset: those between its figures."
    )
    reduction_factor: float = Field(4, gt=1, description="ASHA goes on with one trial in this many.")
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="Most trials at a time. Unset: as many as the cluster holds."
    )
    held_out: float = Field(
        0.25,
        ge=0,
        le=0.9,
        description="Share of the task's prompts that no trial is judged on; the winner is, at the end. 0: none.",
    )
    held_out_seeds: int = Field(
        0, ge=0, description="Times that the winner is trained again, with fresh seeds, and judged on held-out prompts."
    )
    max_failures: int = Field(
        1, ge=0, description="Times that a failed trial is started again, unless it would fail in the same way."
    )
    seed: Seed = Field(0, description="Seed of random, optuna and glisp.")

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """`sweep.params.methods.otpo.reg=[0.1, 1]` on the command line arrives as nested sections."""
        if isinstance(value, dict) and isinstance(value.get("params"), dict):
            value = {**value, "params": dict(_leaves(value["params"]))}
        return value

    @property
    def labels(self) -> list[str]:
        """The labels that are named; none where `params` tells the one."""
        return [self.label] if isinstance(self.label, str) else self.label or []

    @property
    def objectives(self) -> dict[str, Literal["min", "max"]]:
        """Metric -> whether less or more of it is better; the first one names the winner."""
        metrics = [self.metric] if isinstance(self.metric, str) else self.metric
        modes = self.mode if isinstance(self.mode, list) else [self.mode] * len(metrics)
        small = ("loss", "length")
        return {
            metric: mode or ("min" if metric.endswith(small) or metric == "length_ratio" else "max")
            for metric, mode in zip(metrics, modes, strict=True)
        }

    @model_validator(mode="after")
    def _labels_differ(self) -> SweepConfig:
        if isinstance(self.label, list) and (not self.label or len(set(self.label)) < len(self.label)):
            raise ValueError(f"label: expected at least one label, each once, found {self.label}")
        return self

    @model_validator(mode="after")
    def _a_mode_for_each_metric(self) -> SweepConfig:
        metrics = [self.metric] if isinstance(self.metric, str) else self.metric
        if not metrics or len(set(metrics)) < len(metrics):
            raise ValueError("metric: expected at least one metric, each once")
        if isinstance(self.mode, list) and len(self.mode) != len(metrics):
            raise ValueError(f"mode: expected one for each metric, found {len(self.mode)} for {len(metrics)}")
        return self


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""The values that a sweep tries: every combination of lists, or draws; and the names of trials."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.recipe import SweepConfig, SweepRange

Params = dict[str, Any]
"""Dotted key of a recipe -> value: what one trial changes."""

Space = dict[str, list[Any] | SweepRange]
"""Dotted key of a recipe -> the values to try."""


def space_of(sweep: SweepConfig, label: str) -> Space:
    """What is tried of a label: its own keys, and those of `train`."""
    own = f"methods.{label}."
    return {key: values for key, values in sweep.params.items() if key.startswith(("train.", own))}


def combinations(sweep: SweepConfig, space: Space) -> list[Params]:
    """Every trial of a grid, or the seeded and distinct draws of a random search."""
    if sweep.search == "grid":
        lists = [values for values in space.values() if isinstance(values, list)]
        return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]
    generator = random.Random(sweep.seed)
    drawn = ({key: _draw(values, generator) for key, values in space.items()} for _ in range(1000))
    return list(itertools.islice(_distinct(drawn), sweep.num_samples))


def _distinct(drawn: Iterable[Params]) -> Iterator[Params]:
    seen = set()
    for params in drawn:
        if (name := trial_name(params)) not in seen:
            seen.add(name)
            yield params


def _draw(values: list[Any] | SweepRange, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    if values.log:
        value = math.exp(generator.uniform(math.log(values.low), math.log(values.high)))
    else:
        value = generator.uniform(values.low, values.high)
    return rounded(round(value) if values.integer else value)


def rounded(value: Any) -> Any:
    """A drawn number with four significant digits: what the table shows is what was trained."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def trial_name(params: Params, label: str | None = None) -> str:
    """The name and folder of a trial: `reg-0.03_beta-0.1`, after the label where it is given."""
    short = short_keys(list(params))
    text = "_".join(f"{short[key]}-{_text(value)}" for key, value in params.items())
    text = text if label is None else f"{label}.{text}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)


def _text(value: Any) -> str:
    return (
        f"{value:.12g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def short_keys(keys: list[str]) -> dict[str, str]:
    """Dotted key -> its last part, or the whole key where two keys end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}

"""The section `study` of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipeline.recipe.sections import Section

FEWEST_SEEDS = 2


class StudyConfig(Section):
    """Tuned methods compared over training seeds, in one or several regimes."""

    seeds: list[int] = Field(
        [1, 2, 3, 4, 5], description="Seeds of training, and of the world, that every tuned method is run with."
    )
    regimes: dict[str, dict[str, Any]] = Field(
        {}, description="Name -> keys of the recipe with other values. Each regime is tuned and run by itself."
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> StudyConfig:
        if len(set(self.seeds)) < max(len(self.seeds), FEWEST_SEEDS):
            raise ValueError(f"seeds: expected at least {FEWEST_SEEDS}, each once, found {self.seeds}")
        return self

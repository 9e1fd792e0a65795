"""The section `data` of a recipe: which rows, and how they become tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.recipe.sections import Section


class DatasetConfig(Section):
    """One data set of a mix. Names and meaning are those of TRL's `DatasetMixtureConfig`."""

    path: str = Field(description="A JSON, JSONL, CSV or parquet file (.gz too), or a hub name.")
    split: str = Field("train", description="Split of a hub data set; a file has none.")
    fraction: float | None = Field(
        None, gt=0, description="Share of an epoch's rows, given for every set or for none; shares are normalised."
    )
    limit: int | None = Field(None, ge=2, description="Uses only the first rows of the set: how many. Unset: all.")
    columns: dict[str, str | None] = Field({}, description="As data.columns, for this set.")


class DataConfig(Section):
    """The preference pairs and how they become tokens."""

    path: str | None = Field(None, description="A JSON, JSONL, CSV or parquet file (.gz too), or a hub name.")
    datasets: dict[str, DatasetConfig] = Field(
        {}, description="A mix in place of path: name of each data set and its keys, or its path; or a list of these."
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="With fractions: cut sets so that no row comes twice, or repeat rows so that every one comes.",
    )
    split: str = Field("train", description="Split of a hub data set; a file has none.")
    template: Literal["auto", "chat", "literal"] = Field(
        "auto",
        description="How the whole run renders prompts: chat (chat template), literal (strings as they are) or auto.",
    )
    columns: dict[str, str | None] = Field(
        {}, description="Which column is what, where its name does not say it: {prompt: frage}. null leaves one out."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Variables of the chat template, as {enable_thinking: false}. Unset: as in the model's training.",
    )
    rewritten: Literal["refuse", "drop", "template", "text"] = Field(
        "refuse",
        description="What to do with completions that the template rewrites; template or text is what is then trained.",
    )
    max_length: int = Field(1024, ge=8, description="Most tokens of a prompt and one completion together.")
    max_prompt_length: int | None = Field(
        None, ge=1, description="Most tokens of a prompt. Unset: no limit of its own."
    )
    truncation: Literal["keep_start", "drop"] = Field(
        "keep_start",
        description="keep_start cuts a prompt at its beginning, a completion at its end; drop leaves the row out.",
    )
    validation: float = Field(
        0.05, ge=0, description="Rows held out for evaluation: a fraction if below 1, else a number of rows."
    )
    limit: int | None = Field(None, ge=2, description="Uses only the first rows: how many. Unset: all.")

    @property
    def given(self) -> bool:
        """Whether the recipe names rows that are there already."""
        return bool(self.path or self.datasets)

    @field_validator("datasets", mode="before")
    @classmethod
    def _named_sets(cls, value: Any) -> Any:
        """A path stands for a set with this path; in a list, sets are named by their files."""
        if isinstance(value, list):
            sets = [{"path": item} if isinstance(item, str) else item for item in value]
            names = [Path(str(item.get("path"))).name.split(".")[0] if isinstance(item, dict) else "" for item in sets]
            if len(set(names)) < len(names):
                raise ValueError(f"two of the sets are called {names}: give names, {{one: {{path: ...}}, two: ...}}")
            value = dict(zip(names, sets, strict=True))
        if isinstance(value, dict):
            return {name: {"path": item} if isinstance(item, str) else item for name, item in value.items()}
        return {} if value is None else value

    @field_validator("validation")
    @classmethod
    def _fraction_or_whole(cls, value: float) -> float:
        if value >= 1 and not value.is_integer():
            raise ValueError(f"expected a fraction below 1 or a whole number of rows, found {value:g}")
        return value

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> DataConfig:
        if not self.datasets:
            return self
        if self.path:
            raise ValueError("path and datasets both say where the pairs come from: keep one")
        for key in ("limit", "split", "columns"):
            if getattr(self, key) != DataConfig.model_fields[key].default:
                raise ValueError(f"{key} belongs to a single path: set datasets.NAME.{key} for each data set")
        named = [name for name, each in self.datasets.items() if each.fraction is not None]
        if named and len(named) < len(self.datasets):
            missing = next(name for name in self.datasets if name not in named)
            raise ValueError(f"datasets.{missing}.fraction is missing: give a fraction to every data set, or to none")
        for name in self.datasets:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"datasets: '{name}' names metrics: use letters, digits, '_' and '-'")
        return self

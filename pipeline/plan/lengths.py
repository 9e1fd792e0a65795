"""How many rows a run trains on and how long they are: from token ids, or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from otpo.data.token_file import TokenFile

# UltraFeedback's binarised pairs in Llama 3's tokens, as sampled from the model that is trained: rows, and means
ULTRAFEEDBACK = (61_135, 190, 350)
PROMPTS = {"alpaca_eval": 805}  # rows of known tasks; others are counted, or assumed to have as many


@dataclass(frozen=True)
class Lengths:
    """Rows of training and their tokens.

    Attributes:
        rows: pairs, or completions.
        completions: of a row: 2 of a pair.
        prompt, completion: mean tokens of each.
        longest: tokens of the longest row's prompt and all its completions.
        square: mean of the squared tokens of a prompt and one completion together, which attention costs.
        source: where the figures are from.
    """

    rows: int
    completions: int
    prompt: float
    completion: float
    longest: int
    square: float
    source: str

    def row(self, *, shared: bool) -> float:
        """Mean tokens that a model computes for a row: the prompt once where it is shared."""
        return self.prompt * (1 if shared else self.completions) + self.completion * self.completions

    @property
    def counted(self) -> float:
        """Mean tokens of a row as training reports them: the prompt with each completion."""
        return self.row(shared=False)

    def single(self, *, both: bool) -> Lengths:
        """Of the same pairs, their completions as rows of their own: both of a pair, or the chosen one alone."""
        if self.completions == 1:
            return self
        return replace(
            self,
            rows=self.rows * (self.completions if both else 1),
            completions=1,
            longest=math.ceil((self.longest + self.prompt) / 2),
            source=f"{self.source}; {'each' if both else 'the chosen'} completion is a row",
        )


def measured(tokens: TokenFile, source: str) -> Lengths:
    """The lengths in a file of token ids. Completions of other prompts, which KTO keeps beside its own, are no rows."""
    import numpy as np

    parts = (len(tokens.offsets) - 1) // max(len(tokens), 1)
    spans = np.diff(np.asarray(tokens.offsets)).reshape(-1, parts).astype(np.float64)
    spans = spans if tokens.labels is None else spans[:, :2]
    prompts, completions = spans[:, :1], spans[:, 1:]
    return Lengths(
        rows=len(tokens),
        completions=completions.shape[1],
        prompt=float(prompts.mean()),
        completion=float(completions.mean()),
        longest=int(spans.sum(1).max()),
        square=float(((prompts + completions) ** 2).mean()),
        source=f"{len(tokens):,} rows of {source}",
    )


def assumed(recipe: Recipe, rows: int | None = None) -> Lengths:
    """Lengths like UltraFeedback's, cut as the recipe cuts them. Sampled pairs are as many as their prompts give.

    Args:
        rows: how many, where that is known.
    """
    data = recipe.data
    number, prompt, completion = ULTRAFEEDBACK
    alike = f"UltraFeedback's {number:,} pairs"
    if recipe.pairs is not None:
        prompts = prompts_of(recipe.pairs.prompts, recipe.pairs.limit)
        number, completion = prompts * recipe.pairs.per_prompt, min(completion, recipe.pairs.max_tokens)
        alike = f"UltraFeedback's, {number:,} pairs sampled for {prompts:,} prompts"
    prompt = min(prompt, data.max_prompt_length or data.max_length, data.max_length // 2)
    completion = min(completion, data.max_length - prompt)
    held_out = data.validation if data.validation >= 1 else data.validation * (rows or number)
    count = min(rows or number, data.limit or rows or number)
    return Lengths(
        rows=max(1, round(count - held_out)),
        completions=2,
        prompt=prompt,
        completion=completion,
        longest=2 * data.max_length - prompt,
        square=1.4 * (prompt + completion) ** 2,
        source=f"assumed to be like {alike}: prompts of {prompt} and completions of {completion} tokens on average,"
        f" the longest cut at {data.max_length}",
    )


def prompts_of(source: str, limit: int | None) -> int:
    """Prompts of a task: those of a local JSON-lines file are counted."""
    path = Path(source).expanduser()
    count = PROMPTS.get(source, PROMPTS["alpaca_eval"])
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    return min(count, limit or count)

"""How many rows a run trains on and how long they are: from token ids, or assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from otpo.data.token_file import TokenFile

# UltraFeedback's binarised pairs in Llama 3's tokens, as sampled from the model that is trained: rows, and means
ULTRAFEEDBACK = (61_135, 190, 350)


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


def measured(tokens: TokenFile, source: str) -> Lengths:
    """The lengths in a file of token ids."""
    import numpy as np

    parts = (len(tokens.offsets) - 1) // max(len(tokens), 1)
    spans = np.diff(np.asarray(tokens.offsets)).reshape(-1, parts).astype(np.float64)
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
    """Lengths like UltraFeedback's, cut as the recipe cuts them.

    Args:
        rows: how many, where that is known.
    """
    data = recipe.data
    number, prompt, completion = ULTRAFEEDBACK
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
        source=f"assumed to be like UltraFeedback's {number:,} pairs: prompts of {prompt} and completions of"
        f" {completion} tokens on average, the longest cut at {data.max_length}",
    )

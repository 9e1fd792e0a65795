"""What outputs are made of: sentences and list items; of summaries, how much shorter and how much copied they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eval.stats.win_rate import valid_preferences

_ITEM = re.compile(r"^\s*(?:[-*+\u2022]|\d+[.)])\s", re.MULTILINE)
_END = re.compile(r"[.!?\u2026]+[\"')\]\u201d\u2019*_]*(?=\s|$)|[\u3002\uff01\uff1f]")
_WORD = re.compile(r"\w+")

BUCKETS = ((0.0, 0.5, "under_0.5"), (0.5, 0.8, "0.5_to_0.8"), (0.8, 1.25, "0.8_to_1.25"), (1.25, 2.0, "1.25_to_2"),
           (2.0, np.inf, "over_2"))  # fmt: skip
"""Least and greatest length of an output over that of the reference's, the greatest not included, and a name."""


def sentences_of(text: str) -> int:
    """Sentences of a text: of each line the ends of sentences that it has, or one where it has words and no end."""
    lines = [line for line in text.splitlines() if _WORD.search(line)]
    return sum(max(1, len(_END.findall(_ITEM.sub("", line)))) for line in lines)


def list_items_of(text: str) -> int:
    """Items of lists, with bullets or numbers."""
    return len(_ITEM.findall(text))


def copy_rate(text: str, source: str) -> float | None:
    """The share of a text's runs of three words that stand in its source, without regard to case; None below three."""
    runs, there = _runs(text), set(_runs(source))
    return sum(run in there for run in runs) / len(runs) if runs else None


def wording(outputs: Sequence[str], sources: Sequence[str] | None = None) -> dict[str, float | None]:
    """How outputs are written.

    Args:
        outputs: n texts.
        sources: of summaries, the n texts that are summarized.

    Returns:
        avg_sentences and avg_list_items (means); with sources also compression_ratio (characters of the sources over
        those of the summaries) and copy_rate (percent, mean). None where there is nothing to count.
    """
    found: dict[str, float | None] = {
        "avg_sentences": float(np.mean([sentences_of(text) for text in outputs])) if outputs else None,
        "avg_list_items": float(np.mean([list_items_of(text) for text in outputs])) if outputs else None,
    }
    if sources is not None:
        written = sum(map(len, outputs))
        rates = [rate for pair in zip(outputs, sources, strict=True) if (rate := copy_rate(*pair)) is not None]
        found["compression_ratio"] = sum(map(len, sources)) / written if written else None
        found["copy_rate"] = float(100 * np.mean(rates)) if rates else None
    return found


def win_rates_by_length(
    preference: npt.ArrayLike, lengths: npt.ArrayLike, reference_lengths: npt.ArrayLike
) -> dict[str, float | None]:
    """The win rate where outputs are so many times as long as the reference's, for each of BUCKETS.

    Args:
        preference: (n,) preferences, NaN allowed.
        lengths: (n,) characters of the model's outputs.
        reference_lengths: (n,) characters of the reference's.

    Returns:
        win_rate_NAME (percent; None without a verdict) and n_NAME (verdicts), with NAME as in `ratio_0.5_to_0.8`. An
        output with a reference of no characters is in the last bucket, unless it has none itself.
    """
    chance = valid_preferences(preference) - 1
    mine, theirs = np.asarray(lengths, dtype=float), np.asarray(reference_lengths, dtype=float)
    ratio = np.divide(mine, theirs, out=np.where(mine > 0, np.inf, 1.0), where=theirs > 0)
    found: dict[str, float | None] = {}
    for least, greatest, name in BUCKETS:
        inside = (ratio >= least) & ((ratio < greatest) | np.isinf(greatest)) & ~np.isnan(chance)
        found[f"win_rate_ratio_{name}"] = float(chance[inside].mean() * 100) if inside.any() else None
        found[f"n_ratio_{name}"] = int(inside.sum())
    return found


def _runs(text: str) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return list(zip(words, words[1:], words[2:], strict=False))

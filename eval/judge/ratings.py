"""Ratings: the judge scores outputs one at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from eval.judge.asking.questions import Question
from eval.judge.client import Progress, ask_all
from eval.judge.config import JudgeConfig
from eval.judge.protocols.registry import PROTOCOLS
from eval.judge.protocols.templates import render
from eval.judge.store import open_store
from otpo.errors import WorkError
from otpo.files import Row


def rate(
    items: list[Row], config: JudgeConfig, store: str | Path, progress: Progress | None = None
) -> list[float | None]:
    """Rate outputs from 1 to 10 (with the protocol "rating", whatever `config.protocol` says).

    Args:
        items: rows {instruction, output}.
        config: the endpoint and how to ask it.
        store: SQLite file of the judge's replies.
        progress: called with (done, total, failures).

    Returns:
        One rating an item; None where the judge gave none.

    Raises:
        UserError: wrong settings, or a key or model refused at the start.
        WorkError: a key or model refused later on, or not one item could be rated. Replies so far are in the store.
    """
    protocol = PROTOCOLS["rating"]
    questions = [Question(render(protocol, item["instruction"], item["output"]), protocol) for item in items]
    with open_store(store) as opened:
        verdicts = ask_all(questions, config, opened, progress)
    if verdicts and all(verdict.error for verdict in verdicts):
        kinds = Counter(verdict.error for verdict in verdicts)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise WorkError(f"The judge at {config.url} rated none of {len(verdicts)} outputs: {counted}.")
    return [None if verdict.error else verdict.value for verdict in verdicts]

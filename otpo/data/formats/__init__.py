"""The known data formats. To add one: write a function that reads a row (in a module here) and a line in FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from otpo.data.formats import columns, datasets
from otpo.data.rows import Parts, Row
from otpo.errors import UserError


@dataclass(frozen=True)
class Format:
    """A data format: how its rows are recognised, and the functions that read them.

    Attributes:
        columns: a row of this format has all of these.
        read: reads the prompt and the completions of a row; raises BadRow for a row that cannot be used.
        pairs: whether a row gives a chosen and a rejected completion; otherwise it gives one.
        about: a remark for the report.
        looks: a further condition on a row.
        messages: splits a transcript into messages under `data.template: chat`; strings that it leaves are wrapped as
            one message.
        group: joins rows that make one example, each under the number of its first row; `read` then reads the joined.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Parts]
    pairs: bool
    about: str = ""
    looks: Callable[[Row], bool] | None = None
    messages: Callable[[Parts], Parts] | None = None
    group: Callable[[Sequence[Row]], list[tuple[int, Row]]] | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row is of this format."""
        return all(column in row for column in self.columns) and (self.looks is None or self.looks(row))


_INSTRUCTION = "prompt = instruction, and after a blank line the input where there is one"

# `recognise` takes the first that at least half of the rows fit, so formats with more conditions stand first.
FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(
        ("chosen", "rejected", "score_chosen", "score_rejected"), columns.ultrafeedback, pairs=True,
        about="as UltraFeedback binarized; the prompt is what both conversations begin with",
    ),
    "preference": Format(("prompt", "chosen", "rejected"), columns.preference, pairs=True),
    "instruction": Format(
        ("instruction", "chosen", "rejected"), columns.instruction, pairs=True,
        about=_INSTRUCTION,
    ),
    "instruction-ranked": Format(
        ("instruction", "output"), columns.instruction_ranked, pairs=True,
        looks=lambda row: isinstance(row["output"], list),
        about=f"output = [chosen, rejected] as in LLaMA-Factory; {_INSTRUCTION}",
    ),
    "hh": Format(
        ("chosen", "rejected"), datasets.hh, pairs=True, looks=datasets.is_hh, messages=datasets.hh_messages,
        about="Human/Assistant transcripts as in HH-RLHF; the prompt is what both share up to the last 'Assistant:', "
        "as text, or as messages with template: chat",
    ),
    "preference-implicit": Format(
        ("chosen", "rejected"), columns.preference_implicit, pairs=True,
        about="the prompt is what both completions begin with",
    ),
    "tldr": Format(
        ("info", "summaries", "choice"), datasets.tldr, pairs=True, messages=datasets.tldr_messages,
        about="comparisons of summaries as in summarize_from_feedback; prompt = SUBREDDIT, TITLE, POST, 'TL;DR:'",
    ),
    "helpsteer-preference": Format(
        ("prompt", "response_1", "response_2", "preference_strength"), datasets.helpsteer_preference, pairs=True,
        messages=datasets.helpsteer_messages,
        about="as HelpSteer2's preferences; below 0 response_1 is chosen; template: chat makes messages of its turns",
    ),
    "helpsteer": Format(
        ("prompt", "response", "helpfulness"), datasets.helpsteer, pairs=True,
        messages=datasets.helpsteer_messages, group=datasets.by_prompt,
        about="as HelpSteer2's ratings; two rows of one prompt make a pair, the more helpful response is chosen; "
        "template: chat makes messages of its turns",
    ),
    "unpaired": Format(
        ("prompt", "completion", "label"), columns.unpaired, pairs=False,
        about="single completions, each labelled good or bad (KTO)",
    ),
    "instruction-output": Format(
        ("instruction", "output"), columns.instruction_output, pairs=False,
        looks=lambda row: isinstance(row["output"], str),
        about=f"one completion a row, as Alpaca's; {_INSTRUCTION}",
    ),
    "prompt-completion": Format(("prompt", "completion"), columns.prompt_completion, pairs=False),
}  # fmt: skip


def recognise(rows: Sequence[Row]) -> str:
    """Name the format of the rows: the first of FORMATS that at least half of the rows fit.

    Raises:
        UserError: no format fits; says the columns found and the formats known.
    """
    for name, known in FORMATS.items():
        if 2 * sum(map(known.fits, rows)) >= max(len(rows), 1):
            return name
    found = sorted({str(column) for row in rows for column in row})
    formats = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise UserError(f"no known format has the columns {', '.join(found) or '(none)'}. Known formats: {formats}")

"""Row formats: one function each, which reads a row's prompt and answers. A new format is a function and a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from otpo.data.formats.datasets import (
    by_prompt,
    helpsteer,
    helpsteer_messages,
    helpsteer_preference,
    hh,
    hh_messages,
    is_hh,
    tldr,
    tldr_messages,
)
from otpo.data.rows import BadRow, Parts, Row, number_of, shared_prefix, string_of, text_of
from otpo.errors import UserError


def preference(row: Row) -> Parts:
    """`{prompt, chosen, rejected}`, strings or messages (TRL's explicit prompt).

    Where `prompt` is a string and the answers are conversations that repeat it, as in UltraFeedback binarized, the
    conversations' shared beginning is the prompt, as in TRL's `maybe_extract_prompt`.
    """
    prompt, chosen, rejected = (text_of(row, column) for column in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        if shared_prefix(chosen, rejected):
            return preference_implicit(row)
        prompt = [{"role": "user", "content": prompt}]
    return Parts(prompt, (chosen, rejected))


def ultrafeedback(row: Row) -> Parts:
    """`{prompt, chosen, rejected, score_chosen, score_rejected}`: UltraFeedback binarized.

    The answers are conversations that repeat the prompt; TRL's copy has no `prompt`. Scores change nothing here: rows
    whose scores are equal (the choice was drawn by lot) or the wrong way round are used and noted.
    """
    parts = preference_implicit(row) if row.get("prompt") is None else preference(row)
    try:
        chosen, rejected = number_of(row, "score_chosen"), number_of(row, "score_rejected")
    except BadRow:
        return parts
    notes = {"equal scores": chosen == rejected, "chosen answer scored below the rejected one": chosen < rejected}
    return replace(parts, notes=tuple(note for note, true in notes.items() if true))


def instruction(row: Row) -> Parts:
    """`{instruction, input, chosen, rejected}`: the prompt is the instruction, a blank line and the input if any."""
    return Parts(_instruction_of(row), (text_of(row, "chosen"), text_of(row, "rejected")))


def instruction_ranked(row: Row) -> Parts:
    """`{instruction, input, output}` whose output is a list of two answers, the better first (LLaMA-Factory's)."""
    answers = row["output"]
    if not isinstance(answers, list) or [type(answer) for answer in answers] != [str, str]:
        raise BadRow("output is not a list of two strings")
    return Parts(_instruction_of(row), tuple(answers))


def instruction_output(row: Row) -> Parts:
    """`{instruction, input, output}`: supervised training on rows such as Alpaca's."""
    return Parts(_instruction_of(row), (string_of(row, "output"),))


def _instruction_of(row: Row) -> str:
    prompt = string_of(row, "instruction")
    return f"{prompt}\n\n{string_of(row, 'input')}" if row.get("input") else prompt


def preference_implicit(row: Row) -> Parts:
    """`{chosen, rejected}` that both begin with the prompt: their shared beginning (TRL's `extract_prompt`).

    Unlike TRL's, the split never falls inside a word ("gre|en" against "gre|y"): it goes back to the word's beginning.
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one answer is a string, the other a list of messages")
    if chosen == rejected:
        raise BadRow("identical answers")
    split = shared_prefix(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        while split and chosen[split - 1].isalnum():
            split -= 1
        if split and chosen[split - 1] == " ":  # the space belongs to the first word of the answer
            split -= 1
    return Parts(chosen[:split], (chosen[split:], rejected[split:]))


def unpaired(row: Row) -> Parts:
    """`{prompt, completion, label}`: one answer and whether it is a good one (KTO)."""
    label = row["label"]
    if isinstance(label, str):
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    if label not in (True, False):
        raise BadRow("label is neither true nor false")
    return Parts(text_of(row, "prompt"), (text_of(row, "completion"),), bool(label))


def prompt_completion(row: Row) -> Parts:
    """`{prompt, completion}`: supervised training."""
    return Parts(text_of(row, "prompt"), (text_of(row, "completion"),))


@dataclass(frozen=True)
class Format:
    """A kind of row: what it is known by, and the functions that read it.

    Attributes:
        columns: that a row of this kind has. looks: what else must be true of it.
        parts: reads a row. pairs: whether it gives two answers.
        about: what the report says of it.
        messages: what `data.template: chat` makes of the parts' strings before they are wrapped as messages.
        group: joins rows that make one example, each under the number of its first row; `parts` then reads the joined.
    """

    columns: tuple[str, ...]
    parts: Callable[[Row], Parts]
    pairs: bool
    about: str = ""
    looks: Callable[[Row], bool] | None = None
    messages: Callable[[Parts], Parts] | None = None
    group: Callable[[Sequence[Row]], list[tuple[int, Row]]] | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row is of this kind."""
        return all(column in row for column in self.columns) and (self.looks is None or self.looks(row))


_INSTRUCTION = "prompt = instruction, and after a blank line the input where there is one"

# The first that most rows fit is taken, so what asks for more stands first.
FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(
        ("chosen", "rejected", "score_chosen", "score_rejected"), ultrafeedback, pairs=True,
        about="as UltraFeedback binarized; the prompt is what both conversations begin with",
    ),
    "preference": Format(("prompt", "chosen", "rejected"), preference, pairs=True),
    "instruction": Format(
        ("instruction", "chosen", "rejected"), instruction, pairs=True,
        about=_INSTRUCTION,
    ),
    "instruction-ranked": Format(
        ("instruction", "output"), instruction_ranked, pairs=True, looks=lambda row: isinstance(row["output"], list),
        about=f"output = [chosen, rejected] as in LLaMA-Factory; {_INSTRUCTION}",
    ),
    "hh": Format(
        ("chosen", "rejected"), hh, pairs=True, looks=is_hh, messages=hh_messages,
        about="Human/Assistant transcripts as in HH-RLHF; the prompt is what both share up to the last 'Assistant:', "
        "as text, or as messages with template: chat",
    ),
    "preference-implicit": Format(
        ("chosen", "rejected"), preference_implicit, pairs=True, about="the prompt is what both answers begin with"
    ),
    "tldr": Format(
        ("info", "summaries", "choice"), tldr, pairs=True, messages=tldr_messages,
        about="comparisons of summaries as in summarize_from_feedback; prompt = SUBREDDIT, TITLE, POST, 'TL;DR:'",
    ),
    "helpsteer-preference": Format(
        ("prompt", "response_1", "response_2", "preference_strength"), helpsteer_preference, pairs=True,
        messages=helpsteer_messages,
        about="as HelpSteer2's preferences; below 0 response_1 is chosen; template: chat makes messages of its turns",
    ),
    "helpsteer": Format(
        ("prompt", "response", "helpfulness"), helpsteer, pairs=True, messages=helpsteer_messages, group=by_prompt,
        about="as HelpSteer2's ratings; two rows of one prompt make a pair, the more helpful response is chosen; "
        "template: chat makes messages of its turns",
    ),
    "unpaired": Format(
        ("prompt", "completion", "label"), unpaired, pairs=False,
        about="single answers, each labelled good or bad (KTO)",
    ),
    "instruction-output": Format(
        ("instruction", "output"), instruction_output, pairs=False, looks=lambda row: isinstance(row["output"], str),
        about=f"one answer, as Alpaca's rows; {_INSTRUCTION}",
    ),
    "prompt-completion": Format(("prompt", "completion"), prompt_completion, pairs=False),
}  # fmt: skip


def recognise(rows: Sequence[Row]) -> str:
    """Name the format of the rows: the first of FORMATS that at least half of the rows fit.

    Raises:
        UserError: no format fits; says the columns found and the formats known.
    """
    for name, known in FORMATS.items():
        if 2 * sum(map(known.fits, rows)) >= max(len(rows), 1):
            return name
    columns = sorted({str(column) for row in rows for column in row})
    formats = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise UserError(f"no known format has the columns {', '.join(columns) or '(none)'}. Known formats: {formats}")

"""Formats of public data sets that need code of their own: HH-RLHF, TL;DR comparisons, HelpSteer2."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from otpo.data.formats.cells import string_of, text_of
from otpo.data.rows import BadRow, Parts, Row, number_of, shared_prefix

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ASSISTANT = "\n\nAssistant:"


def is_hh(row: Row) -> bool:
    """Whether both texts are transcripts that begin with `Human:` and hold a turn of `Assistant:`."""
    texts = (row["chosen"], row["rejected"])
    return all(isinstance(t, str) and t.lstrip().startswith("Human:") and _HH_ASSISTANT in t for t in texts)


def hh(row: Row) -> Parts:
    r"""`{chosen, rejected}`, transcripts `\n\nHuman: ... \n\nAssistant: ...` as in Anthropic's HH-RLHF.

    The prompt is what both share, up to and including their last `\n\nAssistant:`; the completions begin with the space
    after it. Transcripts that differ before their last turn are left out (the DPO repository cuts the rejected one at
    the length of the chosen one's prompt; TRL leaves a person's turns in the completions).
    """
    chosen, rejected = string_of(row, "chosen"), string_of(row, "rejected")
    end = chosen.rfind(_HH_ASSISTANT, 0, shared_prefix(chosen, rejected))
    if end < 0:
        raise BadRow(f"the transcripts share no beginning that ends in {_HH_ASSISTANT!r}")
    end += len(_HH_ASSISTANT)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if _HH_TURN.search(text, end):
            raise BadRow(f"{side} is more than one turn")
    return Parts(chosen[:end], (chosen[end:], rejected[end:]))


def hh_messages(parts: Parts) -> Parts:
    """The transcript's turns as messages, without the markers and the space after them (as TRL's copy of HH)."""
    _, *turns = _HH_TURN.split(str(parts.prompt))
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": text.removeprefix(" ")}
        for who, text in zip(turns[:-2:2], turns[1:-2:2], strict=True)  # the last turn is the empty one to be completed
    ]
    return replace(parts, prompt=messages, completions=tuple(str(text).removeprefix(" ") for text in parts.completions))


def turns_of_prompt(parts: Parts) -> Parts:
    """As `hh_messages` where the prompt is such a transcript, as Nectar's; otherwise unchanged."""
    text = parts.prompt if isinstance(parts.prompt, str) else ""
    return hh_messages(parts) if text.lstrip().startswith("Human:") and _HH_ASSISTANT in text else parts


def tldr(row: Row) -> Parts:
    """`{info, summaries, choice}`: the comparisons of openai/summarize_from_feedback; `summaries[choice]` is chosen.

    The prompt is TRL's: SUBREDDIT, TITLE and POST (its blank lines taken out), then `TL;DR:`; for news articles (in the
    validation split) TITLE and the article. The summaries keep the space that they begin with.
    """
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict):
        raise BadRow("info is no object")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise BadRow("summaries are not two objects")
    if choice not in (0, 1):
        raise BadRow("choice is neither 0 nor 1")
    title = f"TITLE: {string_of(info, 'title')}"
    if info.get("post") is None:
        parts = [title, string_of(info, "article").replace("\n\n", "\n")]
    else:
        post = string_of(info, "post").replace("\n\n", "\n")
        parts = [f"SUBREDDIT: r/{string_of(info, 'subreddit')}", title, f"POST: {post}"]
    chosen, rejected = summaries[int(choice)], summaries[1 - int(choice)]
    return Parts("\n\n".join([*parts, "TL;DR:"]), (string_of(chosen, "text"), string_of(rejected, "text")))


def tldr_messages(parts: Parts) -> Parts:
    """The summaries without the space that they begin with: it belongs to `TL;DR:` before it."""
    return replace(parts, completions=tuple(str(text).strip() for text in parts.completions))


def by_prompt(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Join each row with the next one of the same prompt: the first one's number and `{"rows": [row, row]}`.

    A row that finds no partner stands alone.
    """
    groups: dict[int, list[Row]] = {}
    waiting: dict[str, int] = {}
    for number, row in enumerate(rows):
        prompt = json.dumps(row.get("prompt"), sort_keys=True, default=str)
        first = waiting.pop(prompt, None)
        if first is None:
            waiting[prompt] = first = number
        groups.setdefault(first, []).append(row)
    return [(number, {"rows": group}) for number, group in groups.items()]


def helpsteer(row: Row) -> Parts:
    """Two rows `{prompt, response, helpfulness, ...}` with one prompt: HelpSteer2's ratings as a preference.

    The more helpful response is chosen, as the data set's card proposes for DPO; the other ratings are not read.
    """
    if len(row["rows"]) < 2:
        raise BadRow("no second response to the prompt")
    first, second = row["rows"]
    difference = number_of(first, "helpfulness") - number_of(second, "helpfulness")
    if not difference:
        raise BadRow("equal helpfulness")
    chosen, rejected = (first, second) if difference > 0 else (second, first)
    return Parts(text_of(first, "prompt"), (text_of(chosen, "response"), text_of(rejected, "response")))


def helpsteer_preference(row: Row) -> Parts:
    """`{prompt, response_1, response_2, preference_strength}`: HelpSteer2's preferences.

    The strength goes from -3 (response_1 is much better) to 3 (response_2 is).
    """
    strength = number_of(row, "preference_strength")
    if not strength:
        raise BadRow("preference_strength is 0: neither response is preferred")
    chosen, rejected = ("response_2", "response_1") if strength > 0 else ("response_1", "response_2")
    return Parts(text_of(row, "prompt"), (text_of(row, chosen), text_of(row, rejected)))


def helpsteer_messages(parts: Parts) -> Parts:
    """Turns that the prompt marks by lines `<extra_id_1>Assistant` and `<extra_id_1>User` as messages."""
    if not isinstance(parts.prompt, str):
        return parts
    first, *turns = re.split(r"\n?<extra_id_1>(Assistant|User)\n", parts.prompt)
    messages = [{"role": "user", "content": first}]
    messages += [{"role": who.lower(), "content": text} for who, text in zip(turns[::2], turns[1::2], strict=True)]
    return replace(parts, prompt=messages)

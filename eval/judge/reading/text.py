"""What a judge's reply says in words: the text after the thinking, and the one verdict that a strict grammar reads."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from eval.judge.protocols.protocol import FIRST, SECOND

_TAG = r"(?:think|thinking|reasoning|thought|analysis)"
_THINKING = re.compile(rf"<({_TAG})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(rf"^.*</{_TAG}>", re.DOTALL | re.IGNORECASE)
_THINKING_START = re.compile(rf"<{_TAG}>", re.IGNORECASE)

# What tokenizers write for a space and a line end, where a server passes their raw tokens on.
_RAW_SPACES = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})
WRAPPING = " \t\r\n\"'`*_.:!()[]{}$\u201c\u201d\u2018\u2019\uff0e\u3002"

_LETTER = rf"(?P<letter>[{FIRST}{SECOND}])"
_OPEN, _CLOSE = r"[\s\"'`*_(\[{\u201c\u2018]*", r"[\s\"'`*_.!)\]}\u201d\u2019\uff0e\u3002$]*"
_THING = r"(?:answer|output|summary|response|assistant|option|model|one)"
_WORDS = r"(?:(?:my|the|your|final|overall|better|best|preferred|winning|chosen|correct)\s+)*"
_SENTENCES = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        # M   **M**   [[M]]   "M".   answer M   \boxed{M}
        rf"{_OPEN}(?:\\boxed{_OPEN}|{_THING}\s+{_OPEN})?(?-i:{_LETTER}){_CLOSE}",
        # Verdict: M   The better answer is **M**.   Final decision - answer M
        rf"{_OPEN}(?:(?:so|therefore|thus|hence|overall|in conclusion)[\s,]+)?{_WORDS}"
        rf"(?:verdict|decision|winner|choice|name|judgment|judgement|{_THING}){_CLOSE}\s*(?:is|:|=|-){_CLOSE}[\s:]*"
        rf"{_OPEN}(?:{_THING}\s+)?{_OPEN}(?-i:{_LETTER}){_CLOSE}",
        # Answer M is better.   Summary m is the better one.   M is better than m.
        rf"{_OPEN}(?:{_WORDS}{_THING}\s+)?{_OPEN}(?-i:{_LETTER})[\s\"'`*_)\]]*\s(?:is|wins as)\s+(?:clearly\s+|the\s+)*"
        rf"(?:better|best|superior|preferable|preferred|winner)(?:\s+{_THING})?"
        rf"(?:\s+than\s+{_OPEN}(?:{_THING}\s+)?{_OPEN}[{FIRST}{SECOND}])?{_CLOSE}",
    )
]
_JSON = re.compile(r"(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Spoken:
    """A verdict in a text: the letter, and where it stands."""

    letter: str
    at: int


def without_raw_spaces(text: str) -> str:
    """A text whose spaces are spaces, where a tokenizer's own signs for them came through."""
    return text.translate(_RAW_SPACES)


def strip_thinking(text: str) -> str:
    """A reply without its thinking blocks. Everything after a block that never ends is dropped too."""
    text = _THINKING_END.sub("", _THINKING.sub("", text))
    return _THINKING_START.split(text, maxsplit=1)[0].strip()


def letter_of(token: str) -> str | None:
    """The verdict that a token is, however it is wrapped: " m", "**M", "M."; None for any other token."""
    bare = without_raw_spaces(token).strip(WRAPPING)
    return bare if bare in (FIRST, SECOND) else None


def spoken_verdict(text: str) -> Spoken | None:
    """The verdict of a text without thinking; None where it has none, or two that differ.

    The first line may be the verdict, or the last one may say it. Nothing in between is looked at: a judge that weighs
    both answers names both.
    """
    lines = [match for match in re.finditer(r"[^\n]+", text) if match[0].strip()]
    if not lines:
        return None
    found = [Spoken(said["letter"], line.start() + said.start("letter")) for line in (lines[0], lines[-1])
             if (said := _sentence(line[0]))]  # fmt: skip
    if not found and (match := _JSON.fullmatch(text)):
        letter = json_verdict(match[1], "verdict", "better", "winner", "answer", "choice", "preferred", "decision")
        return Spoken(letter, text.rindex(letter, match.start(1))) if isinstance(letter, str) else None
    return found[-1] if found and len({each.letter for each in found}) == 1 else None


def json_verdict(text: str, *names: str) -> str | None:
    """The letter under the one of these names that a JSON object has; None where there is none, or several."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    said: list[Any] = [value for key, value in found.items() if str(key).lower() in names]
    return letter_of(said[0]) if len(said) == 1 and isinstance(said[0], str) else None


def _sentence(line: str) -> re.Match[str] | None:
    for pattern in _SENTENCES:
        if match := pattern.fullmatch(line.strip("\r")):
            return match
    return None

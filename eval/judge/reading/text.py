"""What a judge's reply says in words: the text after the thinking, and the one verdict that a strict grammar reads."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from eval.judge.protocols.protocol import FIRST, SECOND

_TAG = r"(?:(?:seed:)?think|thinking|reasoning|thought|analysis)"
_THINKING = re.compile(rf"<({_TAG})(?:\s[^<>]*)?>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(rf"^.*</{_TAG}>", re.DOTALL | re.IGNORECASE)
_THINKING_START = re.compile(rf"<{_TAG}(?:\s[^<>]*)?>", re.IGNORECASE)
# Other marks of thinking: Magistral's [THINK], Kimi's \u25c1think\u25b7, OpenThinker's; and gpt-oss's channels.
_OTHER_START = re.compile(r"\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>")
_OTHER_END = re.compile(r"\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>")
_FINAL_CHANNEL = re.compile(r"^.*<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>", re.DOTALL)
_CHANNELS_END = re.compile(r"<\|(?:return|end|channel)\|>.*$", re.DOTALL)

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
    text = _OTHER_START.sub("<think>", _OTHER_END.sub("</think>", text))
    if "<|channel|>" in text:  # what comes before the final channel is thinking; without one all of it is
        text = _CHANNELS_END.sub("", _FINAL_CHANNEL.sub("", text))
    text = _THINKING_END.sub("", _THINKING.sub("", text))
    return _THINKING_START.split(text, maxsplit=1)[0].strip()


def letter_of(token: str) -> str | None:
    """The verdict that a token is, however it is wrapped: " m", "**M", "M."; None for any other token."""
    bare = without_raw_spaces(token).strip(WRAPPING)
    return bare if bare in (FIRST, SECOND) else None


def spoken_verdict(text: str, cut: bool = False) -> Spoken | None:
    """The verdict of a text without thinking; None where it has none, or two that differ.

    The first line may be the verdict, or the last one may say it. Nothing in between is looked at: a judge that weighs
    both answers names both.

    Args:
        text: of the reply.
        cut: whether it ended before its end. Its last line then counts only as a bare letter: "M is better" may have
            gone on "in style alone".
    """
    lines = [match for match in re.finditer(r"[^\n]+", text) if match[0].strip()]
    if cut and lines and not letter_of(text):
        lines = lines[:1] if len(lines) > 1 else []
    if not lines:
        return _in_json(text) if cut else None
    found = [Spoken(said["letter"], line.start() + said.start("letter")) for line in (lines[0], lines[-1])
             if (said := _sentence(line[0]))]  # fmt: skip
    if not found:
        return _in_json(text)
    return found[-1] if len({each.letter for each in found}) == 1 else None


def _in_json(text: str) -> Spoken | None:
    if not (match := _JSON.fullmatch(text)):
        return None
    letter = json_verdict(match[1], "verdict", "better", "winner", "answer", "choice", "preferred", "decision")
    return Spoken(letter, text.rindex(letter, match.start(1))) if letter else None


def json_verdict(text: str, *names: str) -> str | None:
    """The letter under the one of these names that a JSON object has once; None where there is none, or several."""
    try:
        found = json.loads(text, object_pairs_hook=list)  # a key that stands twice is there twice
    except (ValueError, RecursionError):
        return None
    if not text.lstrip().startswith("{"):
        return None
    said: list[Any] = [value for key, value in found if str(key).lower() in names]
    return letter_of(said[0]) if len(said) == 1 and isinstance(said[0], str) else None


def _sentence(line: str) -> re.Match[str] | None:
    for pattern in _SENTENCES:
        if match := pattern.fullmatch(line.strip("\r")):
            return match
    return None

"""How a judge is asked and how its reply is read. Plain data and pure functions.

PROTOCOLS is the list. "alpaca_eval" is AlpacaEval 2's own prompt, read from the installed `alpaca_eval` package; the
others are ours. Pairwise protocols are read as AlpacaEval's weighted annotator reads them (`logprob_parser` with
numerator "m" and denominator {"m", "M"}): https://github.com/tatsu-lab/alpaca_eval
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from otpo.errors import UserError

OFFICIAL_FILE = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
OFFICIAL_SHA256 = "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62"
FIRST, SECOND = "m", "M"
"""The names of the answer shown first and of the one shown second."""

_PLACEHOLDER = re.compile(r"\{(instruction|output_1|output_2|fence)\}")
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
_FENCED = re.compile(r"^(`{3,})\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(r"^.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)

Message = dict[str, str]


@dataclass(frozen=True)
class Protocol:
    """A way of asking. `template` is a file of `eval/judge/prompts`, None for AlpacaEval's own."""

    name: str
    title: str
    verdict: Literal["pair", "rating"]
    template: str | None
    max_tokens: int
    top_logprobs: int
    note: str


PROTOCOLS: dict[str, Protocol] = {
    "preference": Protocol(
        "preference",
        "pairwise preference",
        "pair",
        "preference.txt",
        1,
        5,
        "our prompt; reading and order as AlpacaEval 2",
    ),
    "summary": Protocol(
        "summary",
        "pairwise summaries",
        "pair",
        "summary.txt",
        1,
        5,
        "our prompt, in the spirit of the precise-and-concise prompt of DPO's TL;DR study (arXiv 2305.18290)",
    ),
    "alpaca_eval": Protocol(
        "alpaca_eval",
        "AlpacaEval 2",
        "pair",
        None,
        1,
        5,
        "the official prompt (Apache-2.0), from the alpaca_eval package",
    ),
    "rating": Protocol(
        "rating",
        "rating from 1 to 10",
        "rating",
        "rating.txt",
        4,
        20,
        "one answer at a time, expected value of the number",
    ),
}


class UnreadableError(Exception):
    """A reply that holds no verdict; `kind` is the typed error."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def find_protocol(name: str, verdict: Literal["pair", "rating"]) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: there is none, or it gives another kind of verdict.
    """
    protocol = PROTOCOLS.get(name)
    if protocol is None or protocol.verdict != verdict:
        known = ", ".join(p.name for p in PROTOCOLS.values() if p.verdict == verdict)
        raise UserError(f"judge.protocol: expected one of {known}; found '{name}'.")
    return protocol


def render(protocol: Protocol, instruction: str, first: str, second: str = "") -> list[Message]:
    """The messages that show an instruction and one or two answers, verbatim.

    The template is split into messages before it is filled and is filled in one pass, so that nothing in the texts is
    taken for a placeholder or for a message border. Our own templates put each text between fences longer than any
    run of backticks in the texts: `fenced_texts` gives the texts back, whatever they contain.
    """
    run = max((len(run) for text in (instruction, first, second) for run in re.findall("`+", text)), default=0)
    values = {"instruction": instruction, "output_1": first, "output_2": second, "fence": "`" * max(3, run + 1)}
    return [
        {"role": role, "content": _PLACEHOLDER.sub(lambda match: values[match[1]], content)}
        for role, content in _template(protocol.template)
    ]


def fenced_texts(content: str) -> list[str]:
    """The texts shown in a message of one of our templates: the inverse of `render`."""
    return [match[2] for match in _FENCED.finditer(content)]


def model_first(instruction: str, seed: int = 0) -> bool:
    """AlpacaEval's seeded order rule: whether the model's output (output_2) is shown before the reference's."""
    draw = random.Random("is_switched_outputs" + instruction + str(seed))
    return draw.choices([False, True], k=1)[0]


def read_pair(response: dict[str, Any], allow_text: bool = False) -> float:
    """The preference in a pairwise reply: 1 the answer shown first is better, 2 the second.

    `2 - p(m) / (p(m) + p(M))` over the exact tokens in the first position's `top_logprobs`; a token that is not among
    them has probability 0 (AlpacaEval's `logprob_parser`).

    Args:
        response: a chat completion.
        allow_text: where the logprobs hold no verdict, take a reply that is plainly "m" or "M" as 1 or 2.

    Raises:
        UnreadableError: no_logprobs, unparsable, refused or malformed.
    """
    choice = _choice(response)
    top = _first_logprobs(choice)
    logprobs = {token: value for token, value in top or () if token in (FIRST, SECOND)}
    if logprobs:
        first, second = logprobs.get(FIRST, -math.inf), logprobs.get(SECOND, -math.inf)
        peak = max(first, second)
        total = peak + math.log(math.exp(first - peak) + math.exp(second - peak))
        return 2.0 - math.exp(first - total)
    if allow_text:
        verdict = _text(choice).strip(" \t\n\"'`*.")
        if verdict in (FIRST, SECOND):
            return 1.0 if verdict == FIRST else 2.0
    raise UnreadableError(_why_not(choice, top))


def read_rating(response: dict[str, Any], allow_text: bool = False) -> float:
    """The rating in a reply: the expected value over the numbers 1 to 10 among the first position's `top_logprobs`.

    Args:
        response: a chat completion.
        allow_text: where the logprobs hold no number, take the number that the text consists of.

    Raises:
        UnreadableError: no_logprobs, unparsable, refused or malformed.
    """
    choice = _choice(response)
    top = _first_logprobs(choice)
    number = re.fullmatch(r"\D{0,20}?(10|[1-9])(?:\s*/\s*10)?\D{0,20}", _text(choice))
    emitted = _first_token(choice)
    # Where the tokenizer splits "10" the first token says "1": the text then knows better than the token.
    if number and number[1] == "10" and emitted is not None and emitted.strip() == "1":
        return 10.0
    weights = {value: math.exp(logprob) for token, logprob in top or () if (value := _score(token)) is not None}
    total = sum(weights.values())
    if total > 0:
        return sum(value * weight for value, weight in weights.items()) / total
    if allow_text and number:
        return float(number[1])
    raise UnreadableError(_why_not(choice, top))


def strip_thinking(text: str) -> str:
    """The reply without its thinking; an opened block that never ends leaves nothing."""
    text = _THINKING_END.sub("", _THINKING.sub("", text))
    return re.split(r"<(?:think|thinking|reasoning)>", text, maxsplit=1, flags=re.IGNORECASE)[0].strip()


def _score(token: str) -> int | None:
    token = token.strip()
    return int(token) if re.fullmatch(r"10|[1-9]", token) else None


def _choice(response: dict[str, Any]) -> dict[str, Any]:
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableError("malformed")
    return choices[0]


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return strip_thinking(content) if isinstance(content, str) else ""


def _first_position(choice: dict[str, Any]) -> dict[str, Any] | None:
    logprobs = choice.get("logprobs")
    positions = logprobs.get("content") if isinstance(logprobs, dict) else None
    return positions[0] if isinstance(positions, list) and positions and isinstance(positions[0], dict) else None


def _first_token(choice: dict[str, Any]) -> str | None:
    token = (_first_position(choice) or {}).get("token")
    return token if isinstance(token, str) else None


def _first_logprobs(choice: dict[str, Any]) -> list[tuple[str, float]] | None:
    """(token, log-probability) of the first position's `top_logprobs`, None where the reply has none."""
    top = (_first_position(choice) or {}).get("top_logprobs")
    if not isinstance(top, list) or not top:
        return None
    pairs = [(item.get("token"), item.get("logprob")) for item in top if isinstance(item, dict)]
    return [(t, float(p)) for t, p in pairs if isinstance(t, str) and isinstance(p, (int, float)) and not math.isnan(p)]


def _why_not(choice: dict[str, Any], top: list | None) -> str:
    message = choice.get("message")
    if choice.get("finish_reason") == "content_filter" or (isinstance(message, dict) and message.get("refusal")):
        return "refused"
    return "no_logprobs" if top is None else "unparsable"


@cache
def _template(file: str | None) -> tuple[tuple[str, str], ...]:
    """(role, content with placeholders) of each message of a template in ChatML."""
    text = _official_text() if file is None else (Path(__file__).parent / "prompts" / file).read_text("utf-8")
    return tuple((role, content.strip()) for role, content in _TURN.findall(text))


def _official_text() -> str:
    spec = importlib.util.find_spec("alpaca_eval")
    path = Path(spec.origin).parent / OFFICIAL_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "judge.protocol 'alpaca_eval' uses the official prompt, which is read from the package alpaca_eval: it is "
            "not installed. Install it (pip install alpaca_eval==0.6.6) or use the protocol 'preference'."
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != OFFICIAL_SHA256:
        raise UserError(
            f"{path}: expected AlpacaEval 2's prompt with sha256 {OFFICIAL_SHA256}, found {found}. "
            "Install alpaca_eval==0.6.6 or use the protocol 'preference'."
        )
    return data.decode("utf-8")

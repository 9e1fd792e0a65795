"""The judge's prompt: fills a prompt template with an instruction and one or two outputs.

The templates are the files of `eval/judge/prompts`, written in ChatML. AlpacaEval 2's own is read from the installed
`alpaca_eval` package, a user's from their file; one without ChatML is a single message of the user.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

from eval.judge.protocols.protocol import Protocol
from otpo.errors import UserError

PROMPTS = Path(__file__).parents[1] / "prompts"
OFFICIAL_FILE = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
OFFICIAL_SHA256 = "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62"

_PLACEHOLDER = re.compile(r"\{(instruction|output_1|output_2|criteria|fence)\}")
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
CHATML = re.compile(r"<\|im_(?:start|end)\|>")
_FENCED = re.compile(r"^(`{3,})\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)

Message = dict[str, str]
"""A chat message: role and content."""


def render(protocol: Protocol, instruction: str, first: str, second: str = "") -> list[Message]:
    """The messages that show the judge an instruction and one or two outputs, verbatim.

    The template is split into messages first and then filled in one pass, so no text can be taken for a placeholder or
    for the end of a message. Our own templates put each text between fences that are longer than any run of backticks
    in the texts, so `fenced_texts` gives the texts back whatever they contain.

    Args:
        protocol: whose template to fill.
        instruction: what the models were asked.
        first: the output shown first.
        second: the output shown second; unused by a protocol that rates one output.

    Raises:
        UserError: the protocol needs AlpacaEval's template, and the package or the expected file is not there.
    """
    run = max((len(run) for text in (instruction, first, second) for run in re.findall("`+", text)), default=0)
    values = {"instruction": instruction, "output_1": first, "output_2": second, "fence": "`" * max(3, run + 1)}
    values["criteria"] = "\n".join(f"- {each.name} ({each.scale}): {each.asks}" for each in protocol.criteria)
    return [
        {"role": role, "content": _PLACEHOLDER.sub(lambda match: values[match[1]], content)}
        for role, content in _template(protocol.template, protocol.text)
    ]


def fenced_texts(content: str) -> list[str]:
    """The texts that a message of one of our own templates shows: the inverse of `render`."""
    return [match[2] for match in _FENCED.finditer(content)]


def placeholders_of(text: str) -> set[str]:
    """The placeholders that a template has."""
    return {match[1] for match in _PLACEHOLDER.finditer(text)}


@cache
def _template(file: str | None, text: str | None = None) -> tuple[tuple[str, str], ...]:
    """(role, content with placeholders) of each message of a template."""
    if text is None:
        text = _official_text() if file is None else (PROMPTS / file).read_text("utf-8")
    turns = _TURN.findall(text)
    return tuple((role, content.strip()) for role, content in turns or [("user", text)])


def _official_text() -> str:
    spec = importlib.util.find_spec("alpaca_eval")
    path = Path(spec.origin).parent / OFFICIAL_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            "judge.protocol 'alpaca_eval' needs the official prompt template, which comes with the package "
            "alpaca_eval; it is not installed. Install it (pip install alpaca_eval==0.6.6) or use the protocol "
            "'preference'."
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != OFFICIAL_SHA256:
        raise UserError(
            f"{path}: expected AlpacaEval 2's prompt template with sha256 {OFFICIAL_SHA256}, found {found}. "
            "Install alpaca_eval==0.6.6 or use the protocol 'preference'."
        )
    return data.decode("utf-8")

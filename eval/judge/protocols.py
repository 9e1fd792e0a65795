"""The ways of asking a judge. Plain data; PROTOCOLS is the list.

`prompt_templates` fills a protocol's prompt template, `replies` reads a verdict from the reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from otpo.errors import UserError

FIRST, SECOND = "m", "M"
"""What the prompt templates call the output shown first and the output shown second."""


@dataclass(frozen=True)
class Protocol:
    """A way of asking the judge.

    Attributes:
        name: the value of `judge.protocol`.
        verdict: "pair" if the judge compares two outputs, "rating" if it rates one from 1 to 10.
        template: its prompt template, a file of `eval/judge/prompts`; None for AlpacaEval's own.
        max_tokens: tokens of the reply, unless `judge.max_tokens` is set.
        top_logprobs: alternatives to ask for at each position of the reply.
        least_mass: probability that the tokens of a verdict must have together for their logprobs to be one.
        bare: whether to read as alpaca_eval does: of bare tokens alone, and whichever token a reply of one token is.
        about: one line about it.
    """

    name: str
    verdict: Literal["pair", "rating"]
    template: str | None
    max_tokens: int
    top_logprobs: int
    about: str
    least_mass: float = 0.5
    bare: bool = False


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "preference",
            verdict="pair",
            template="preference.txt",
            max_tokens=1,
            top_logprobs=5,
            about="which of two outputs is better; our prompt, read as AlpacaEval 2 reads its own",
        ),
        Protocol(
            "summary",
            verdict="pair",
            template="summary.txt",
            max_tokens=1,
            top_logprobs=5,
            about="which of two summaries is better; our prompt, in the spirit of DPO's TL;DR study (arXiv 2305.18290)",
        ),
        Protocol(
            "alpaca_eval",
            verdict="pair",
            template=None,
            max_tokens=1,
            top_logprobs=5,
            about="AlpacaEval 2's official prompt (Apache-2.0), from the alpaca_eval package",
            # alpaca_eval itself takes any mass and any token; its judge's least mass in 2,408 replies is 0.85.
            least_mass=0.01,
            bare=True,
        ),
        Protocol(
            "rating",
            verdict="rating",
            template="rating.txt",
            max_tokens=4,
            top_logprobs=20,
            about="one output at a time, rated from 1 to 10",
        ),
    )
}


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

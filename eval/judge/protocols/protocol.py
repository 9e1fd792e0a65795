"""What a protocol is: a prompt template, the kind of verdict, the orders that are asked, and what a verdict counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FIRST, SECOND = "m", "M"
"""What the prompt templates of verdicts by a letter call the output shown first and the output shown second."""

Kind = Literal["pair", "grades", "rating", "criteria"]
Read = Literal["logprobs", "json", "tool", "text"]


@dataclass(frozen=True)
class Grade:
    """One of the verdicts that a judge may give on two outputs.

    Attributes:
        said: what the judge writes, such as "A>>B".
        preference: 1 if the output shown first is better, 2 if the second is, 1.5 for a tie.
        weight: how often it counts in the score.
    """

    said: str
    preference: float
    weight: float = 1.0


@dataclass(frozen=True)
class Criterion:
    """One of the things that an output is looked at for.

    Attributes:
        name: its key in the judge's JSON.
        asks: what the judge is asked to look for.
        points: the most that it gives, from 1 up; None is yes or no.
        weight: its part of the score.
    """

    name: str
    asks: str
    points: int | None = None
    weight: float = 1.0

    @property
    def scale(self) -> str:
        """What the judge may say, in words."""
        return "true or false" if self.points is None else f"a whole number from 1 to {self.points}"


@dataclass(frozen=True)
class Protocol:
    """A way of asking the judge.

    Attributes:
        name: the value of `judge.protocol`, or the name in a user's file.
        verdict: "pair", which of two outputs is better; "grades", by how much; "rating", one output, from 1 to 10;
            "criteria", one output, by a list of them.
        template: its prompt template, a file of `eval/judge/prompts`; None for AlpacaEval's own, or where `text` is.
        max_tokens: tokens of the reply, unless `judge.max_tokens` is set.
        about: one line about it.
        top_logprobs: alternatives to ask for at each position of the reply.
        least_mass: probability that the tokens of a verdict must have together for their logprobs to be one.
        bare: whether to read as alpaca_eval does: of bare tokens alone, and whichever token a reply of one token is.
        reads: where the verdict can be read, in the order in which that is tried.
        both_orders: whether each pair is always asked in both orders.
        agreed: whether both orders must name the same winner; otherwise the prompt is a tie. If not, their mean counts.
        grades: of "grades", the verdicts that there are.
        criteria: of "criteria".
        text: of a user's file, the template itself.
        digest: of a user's file, eight hex digits of what decides a verdict.
    """

    name: str
    verdict: Kind
    template: str | None
    max_tokens: int
    about: str
    top_logprobs: int = 5
    least_mass: float = 0.5
    bare: bool = False
    reads: tuple[Read, ...] = ("logprobs", "json", "tool", "text")
    both_orders: bool = False
    agreed: bool = False
    grades: tuple[Grade, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    text: str | None = None
    digest: str = ""

    @property
    def single(self) -> bool:
        """Whether the judge sees one output at a time."""
        return self.verdict in ("rating", "criteria")

    @property
    def label(self) -> str:
        """What a board calls it: two files of one name that ask differently have two labels."""
        return f"{self.name}-{self.digest}" if self.digest else self.name

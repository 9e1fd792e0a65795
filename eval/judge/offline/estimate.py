"""What judging would cost, before anything is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eval.judge.budget import MOST_TOKENS, USUAL_TOKENS, most_tokens_of, price, size_of
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import Failure
from eval.judge.offline.batch_files import NOT_ASKED


@dataclass
class Estimate:
    """Counts the questions that are not in the store yet.

    Attributes:
        config: has the prices.
        calls: questions.
        bytes_asked: of their prompts.
        most_reply_tokens: the most that all replies may have.
    """

    config: JudgeConfig
    calls: int = field(default=0)
    bytes_asked: int = field(default=0)
    most_reply_tokens: int = field(default=0)

    def __call__(self, key: str, body: dict[str, Any]) -> Failure:
        """Count a question."""
        self.calls, self.bytes_asked = self.calls + 1, self.bytes_asked + size_of(body)
        self.most_reply_tokens += most_tokens_of(body)
        return Failure(NOT_ASKED)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, at a quarter of a token a byte, which is what English text has."""
        return round(self.bytes_asked * USUAL_TOKENS)

    @property
    def usd(self) -> float:
        """The price of the prompts alone."""
        return price(self.config, self.prompt_tokens, 0)

    @property
    def most_usd(self) -> float:
        """The price if prompts had twice as many tokens and every reply were as long as it may be."""
        return price(self.config, self.bytes_asked * MOST_TOKENS, self.most_reply_tokens)

    def __str__(self) -> str:
        """In one line."""
        said = f"{self.calls:,} calls, about {self.prompt_tokens:,} prompt tokens, replies of at most "
        said += f"{self.most_reply_tokens:,} tokens together"
        if self.config.price_input or self.config.price_output:
            return f"{said}: from {self.usd:,.2f} to {self.most_usd:,.2f} USD"
        return f"{said}; give judge.price_input and judge.price_output for the price"

"""What judging costs, a budget that no call may exceed, and the pace of calls."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from eval.judge.config import JudgeConfig

# Tokens in a byte of a prompt: what English text has, and about twice that where a limit must hold.
USUAL_TOKENS, MOST_TOKENS = 0.25, 0.5


def price(config: JudgeConfig, prompt_tokens: float, completion_tokens: float) -> float:
    """The price of these tokens in USD."""
    return (prompt_tokens * config.price_input + completion_tokens * config.price_output) / 1e6


def size_of(body: dict[str, Any]) -> int:
    """Bytes of the messages of a request, with what each of them adds."""
    return sum(len(message["content"].encode("utf-8", "surrogatepass")) + 16 for message in body["messages"])


def most_tokens_of(body: dict[str, Any]) -> int:
    """Most tokens of the reply to a request."""
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)


@dataclass
class Spending:
    """USD that judges have cost one command so far, whichever of its tasks, labels and milestones they judged."""

    usd: float = 0.0


class Pace:
    """Starts calls so that no minute has more requests or tokens than `config` allows.

    A call counts with its prompt and its longest reply, as endpoints count it, until its reply says what it was.
    """

    def __init__(self, config: JudgeConfig):
        self._requests, self._tokens = config.max_requests_per_minute, config.max_tokens_per_minute
        self._next_request = self._next_token = 0.0

    def book(self, size: int, max_tokens: int) -> tuple[float, float]:
        """Take the next place.

        Args:
            size: bytes of the call's messages.
            max_tokens: most tokens of the reply.

        Returns:
            Tokens that were booked, and seconds to wait.
        """
        now, booked = time.monotonic(), size * USUAL_TOKENS + max_tokens
        start = max(now, self._next_request if self._requests else now, self._next_token if self._tokens else now)
        if self._requests:
            self._next_request = start + 60 / self._requests
        if self._tokens:
            self._next_token = start + 60 * booked / self._tokens
        return booked, start - now

    def settle(self, booked: float, used: tuple[int, int]) -> None:
        """Replace what was booked for a call by the tokens that its reply reported; (0, 0) reports none."""
        if self._tokens and sum(used):
            self._next_token += 60 * (sum(used) - booked) / self._tokens


class Budget:
    """Lets a call start only if all calls together, finished and running, stay within `config.budget_usd`.

    Args:
        config: prices and the budget.
        spent: USD already spent of it.
    """

    def __init__(self, config: JudgeConfig, spent: float):
        self._config, self._changed = config, asyncio.Condition()
        self._spent, self._reserved, self._exhausted = spent, 0.0, False
        self._tokens_per_byte = 0.0  # the most that any reply has reported

    async def reserve(self, size: int, max_tokens: int) -> float | None:
        """Set money aside for a call; waits while running calls could still turn out cheaper than reserved.

        Args:
            size: bytes of the call's messages.
            max_tokens: most tokens of the reply.

        Returns:
            USD set aside, or None if the call would exceed the budget.
        """
        if self._config.budget_usd is None:
            return 0.0
        async with self._changed:
            while not self._exhausted:
                estimate = price(self._config, size * (self._tokens_per_byte or MOST_TOKENS), max_tokens)
                if self._spent + self._reserved + estimate <= self._config.budget_usd:
                    self._reserved += estimate
                    return estimate
                if not self._reserved:  # no running call could free any money
                    self._exhausted = True
                    self._changed.notify_all()
                else:
                    await self._changed.wait()
        return None

    async def settle(self, reserved: float, size: int, tokens: tuple[int, int], unknown: bool = False) -> None:
        """Replace what was set aside for a call with what it cost.

        Args:
            reserved: what `reserve` returned.
            size: bytes of the call's messages.
            tokens: (prompt, completion) tokens that the reply reported.
            unknown: whether there was a reply that reported none; it counts as what was set aside.
        """
        self._spent += reserved if unknown else price(self._config, *tokens)
        self._tokens_per_byte = max(self._tokens_per_byte, tokens[0] / max(size, 1))
        if self._config.budget_usd is not None:
            async with self._changed:
                self._reserved -= reserved
                if self._reserved < 1e-12:
                    self._reserved = 0.0
                self._changed.notify_all()

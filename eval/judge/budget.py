"""What judging costs, and a budget that no call may exceed."""

from __future__ import annotations

import asyncio

from eval.judge.config import JudgeConfig


def price(config: JudgeConfig, prompt_tokens: float, completion_tokens: float) -> float:
    """The price of these tokens in USD."""
    return (prompt_tokens * config.price_input + completion_tokens * config.price_output) / 1e6


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
                # Before the first reply: half a token per byte, about twice what English text has.
                estimate = price(self._config, size * (self._tokens_per_byte or 0.5), max_tokens)
                if self._spent + self._reserved + estimate <= self._config.budget_usd:
                    self._reserved += estimate
                    return estimate
                if not self._reserved:  # no running call could free any money
                    self._exhausted = True
                    self._changed.notify_all()
                else:
                    await self._changed.wait()
        return None

    async def settle(self, reserved: float, size: int, tokens: tuple[int, int]) -> None:
        """Replace what was set aside for a call with what it cost.

        Args:
            reserved: what `reserve` returned.
            size: bytes of the call's messages.
            tokens: (prompt, completion) tokens that the reply reported.
        """
        self._spent += price(self._config, *tokens)
        self._tokens_per_byte = max(self._tokens_per_byte, tokens[0] / max(size, 1))
        if self._config.budget_usd is not None:
            async with self._changed:
                self._reserved -= reserved
                if self._reserved < 1e-12:
                    self._reserved = 0.0
                self._changed.notify_all()

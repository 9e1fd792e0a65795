"""Where trained trials wait to be judged: one engine, one judge and one writer of files serve all trials."""

from __future__ import annotations

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class JudgingQueue:
    """Hands trained trials to the driver and the driver's figures back to the trials."""

    def __init__(self) -> None:
        self.trained: asyncio.Queue[str] = asyncio.Queue()
        self.waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.claims: dict[str, int] = {}

    async def claim(self, name: str) -> int:
        """How often the name was claimed before: a sampler may draw the same values twice at the same time."""
        self.claims[name] = self.claims.get(name, -1) + 1
        return self.claims[name]

    async def judged(self, name: str) -> dict[str, Any]:
        """For a trial: queue it, and wait for its figures; {"error": text} if there are none."""
        self.waiting[name] = asyncio.get_running_loop().create_future()
        await self.trained.put(name)
        return await self.waiting[name]

    async def next(self) -> str:
        """For the driver: the next trial to judge."""
        return await self.trained.get()

    async def finish(self, name: str, figures: dict[str, Any]) -> None:
        """For the driver: give a trial its figures."""
        self.waiting.pop(name).set_result(figures)

"""Where trained trials wait to be judged: one engine, one judge and one writer of files serve all trials."""

from __future__ import annotations

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class JudgingQueue:
    """Hands trained trials to the driver and the driver's figures back to the trials."""

    def __init__(self) -> None:
        self.trained: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        self.waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.claims: dict[str, list[str]] = {}

    async def claim(self, name: str, trial: str) -> int:
        """How many other trials claimed the name before: a sampler may draw the same values twice at the same time."""
        claims = self.claims.setdefault(name, [])
        if trial not in claims:  # one that Tune starts again after its process died has claimed it
            claims.append(trial)
        return claims.index(trial)

    async def judged(self, name: str, against: str | None) -> dict[str, Any]:
        """For a trial: queue it, and wait for its figures.

        Where there are none, gives {"error": text, "lasting": whether it would fail again}.
        """
        self.waiting[name] = asyncio.get_running_loop().create_future()
        await self.trained.put((name, against))
        return await self.waiting[name]

    async def next(self) -> tuple[str, str | None]:
        """For the driver: the next trial to judge, and the trial that it is compared with if trials are."""
        return await self.trained.get()

    async def finish(self, name: str, figures: dict[str, Any]) -> None:
        """For the driver: give a trial its figures."""
        self.waiting.pop(name).set_result(figures)

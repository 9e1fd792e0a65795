"""Where trained trials wait to be judged: one engine, one judge and one writer of files serve all trials."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@ray.remote(num_cpus=0)
class JudgingQueue:
    """Hands trained trials to the driver and the driver's figures back to the trials."""

    def __init__(self) -> None:
        self.trained: asyncio.Queue[tuple[str, str | None, int | None]] = asyncio.Queue()
        self.waiting: dict[tuple[str, int | None], asyncio.Future[dict[str, Any]]] = {}
        self.claims: dict[str, list[str]] = {}

    async def claim(self, name: str, trial: str) -> int:
        """How many other trials claimed the name before: a sampler may draw the same values twice at the same time."""
        claims = self.claims.setdefault(name, [])
        if trial not in claims:  # one that Tune starts again after its process died has claimed it
            claims.append(trial)
        return claims.index(trial)

    async def judged(self, name: str, against: str | None, step: int | None = None) -> dict[str, Any]:
        """For a trial: queue it, or its milestone of a step, and wait for the figures.

        Where there are none, gives {"error": text, "lasting": whether it would fail again}.
        """
        future = self.waiting[name, step] = asyncio.get_running_loop().create_future()
        await self.trained.put((name, against, step))
        return await future

    async def next(self) -> tuple[str, str | None, int | None]:
        """For the driver: the next trial to judge; the one that it is compared with, if trials are; the milestone."""
        return await self.trained.get()

    async def finish(self, name: str, step: int | None, figures: dict[str, Any]) -> None:
        """For the driver: give a trial its figures. Where it was stopped or began again, nobody may wait for them."""
        future = self.waiting.pop((name, step), None)
        if future is not None and not future.done():
            future.set_result(figures)


@contextmanager
def judging_queue() -> Iterator[Any]:
    """The handle of a queue that ends with the body: of a sweep in a notebook, Ray lives longer than its trials."""
    queue: Any = JudgingQueue.remote()  # type: ignore[attr-defined]
    try:
        yield queue
    finally:
        ray.kill(queue)

"""Runs the judge's coroutines, also in a notebook, whose thread has an event loop already."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in a thread of its own where this one runs a loop: loops do not nest.

    Ctrl-C cancels the coroutine and waits until it has ended, in both cases.
    """
    try:
        inside = asyncio.get_running_loop().is_running()
    except RuntimeError:
        inside = False
    if not inside:  # outside of the except block, or this error would be the context of every later one
        return asyncio.run(coroutine)
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def noting() -> T:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, noting())
        try:
            return running.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            if task is not None:
                with suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
            raise

"""Verdicts a second of the judge's client beside a bare one, at a server that takes 200 ms for each call.

python -m tests.benchmarks client --calls 5000 --slots 64

The server is a process of its own. The bare client sends the same requests with `openai.AsyncOpenAI` and as many at a
time, and reads nothing; ours also reads and checks each verdict and keeps each reply in a store. The two take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LATENCY = 0.2  # seconds that the server takes for a call
REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "judge",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "m"},
            "logprobs": {
                "content": [
                    {
                        "token": "m",
                        "logprob": -0.1,
                        "bytes": [109],
                        "top_logprobs": [
                            {"token": "m", "logprob": -0.1, "bytes": [109]},
                            {"token": "M", "logprob": -2.36, "bytes": [77]},
                        ],
                    }
                ]
            },
        }
    ],
    "usage": {"prompt_tokens": 200, "completion_tokens": 1, "total_tokens": 201},
}


def main(arguments: list[str]) -> None:
    """Print the calls a second of each side and turn, and the ratio of their medians."""
    parser = argparse.ArgumentParser(prog="client", description=__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for ask in (_bare, _ours):  # libraries load now
        ask(url, options.slots, options.slots)
    for turn in range(options.turns):
        for side, values in rates.items():
            began = time.perf_counter()
            {"bare": _bare, "ours": _ours}[side](url, options.calls, options.slots)
            values.append(options.calls / (time.perf_counter() - began))
            print(
                f"{side} turn {turn + 1}: {values[-1]:.1f} calls/s of {options.slots / LATENCY:.0f} possible",
                flush=True,
            )
    server.kill()
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["bare"])
    print(f"ours is {ratio:.3f} of the bare client")
    print(json.dumps({"benchmark": "client", **rates, "ratio": ratio}))


def _serve(port: Connection) -> None:
    from aiohttp import web

    async def complete(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(LATENCY)
        return web.json_response(REPLY)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "judge", "object": "model"}]})

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(serve())


def _rows(calls: int, text: str) -> list[dict[str, Any]]:
    return [{"instruction": f"Question {i}?", "output": f"{text} {i}. " * 8, "generator": text} for i in range(calls)]


def _ours(url: str, calls: int, slots: int) -> None:
    from eval.judge.config import JudgeConfig
    from eval.judge.verdicts import judge

    config = JudgeConfig(url=url, model="judge", concurrency=slots)
    with tempfile.TemporaryDirectory() as folder:
        verdicts = judge(_rows(calls, "ours"), _rows(calls, "theirs"), config, Path(folder, "store.sqlite"), "task")
    assert verdicts["preference"].notna().all()


def _bare(url: str, calls: int, slots: int) -> None:
    import httpx2
    import openai

    from eval.judge.protocols.registry import find_protocol
    from eval.judge.protocols.templates import render

    protocol = find_protocol("preference")
    shown = [
        render(protocol, a["instruction"], a["output"], b["output"])
        for a, b in zip(_rows(calls, "ours"), _rows(calls, "theirs"), strict=True)
    ]

    async def ask_all() -> None:
        limits = httpx2.Limits(max_connections=slots, max_keepalive_connections=slots)
        transport = openai.DefaultAioHttpClient(limits=limits, trust_env=False)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=transport) as client:
            free = asyncio.Semaphore(slots)

            async def ask(messages: Any) -> None:
                async with free:
                    await client.chat.completions.create(
                        model="judge", messages=messages, max_tokens=1, temperature=0, logprobs=True, top_logprobs=5
                    )

            await asyncio.gather(*map(ask, shown))

    asyncio.run(ask_all())

"""The small world's judge and annotator behind the OpenAI chat-completions protocol, on loopback.

    python -m jobs.small_world.judge_server runs/NAME/world

prints its address as its first line, and ends when its standard input does, so that it cannot outlive its parent.
It reads the prompts of `eval/judge/prompts`: two fenced texts are an instruction and an output to be rated, three are
an instruction and two outputs to be compared. Replies depend on the texts alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judge.protocols.protocol import FIRST, SECOND
from eval.judge.protocols.templates import fenced_texts
from jobs.small_world import world as small_world
from jobs.small_world.opinions import LENGTH_LIKING, Reader, readers
from jobs.small_world.world import SETTINGS

MAX_BODY = 2**20
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}
SMALLEST = 1e-12  # a verdict that is out of the question still has a finite log-probability


@contextmanager
def serve(world_dir: Path) -> Iterator[str]:
    """Run the server in a process of its own; gives the base URL ("http://127.0.0.1:PORT/v1").

    Raises:
        RuntimeError: the server ended before it said where it listens; its own message is on standard error.
    """
    command = [sys.executable, "-m", "jobs.small_world.judge_server", str(world_dir.absolute())]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the small world's judge ended with exit code {process.wait()} before it was ready")
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class HTTPError(Exception):
    """A request that the server refuses, in the shape of OpenAI's errors."""

    status: int
    message: str
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """The reply."""
        error = {"message": self.message, "type": "invalid_request_error", "param": None, "code": self.code}
        return {"error": error}


def respond(known: dict[str, Reader], method: str, path: str, body: bytes) -> dict[str, Any]:
    """The JSON for a request.

    Raises:
        HTTPError: the request cannot be served.
    """
    if path == "/v1/models":
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "small-world"} for name in known]
        return {"object": "list", "data": models}
    if path != "/v1/chat/completions":
        raise HTTPError(404, f"No such path: {path}. Known: /v1/models and /v1/chat/completions.")
    if method != "POST":
        raise HTTPError(405, f"Expected POST, found {method}.")
    try:
        request = json.loads(body)
        model, shown = request["model"], "\n".join(message["content"] for message in request["messages"])
    except (ValueError, KeyError, TypeError) as error:
        raise HTTPError(400, "Expected a JSON object with `model` and `messages` whose contents are text.") from error
    if model not in known:
        raise HTTPError(404, f"The model '{model}' does not exist. Known: {', '.join(known)}.", "model_not_found")
    return _completion(request, _verdict(known[model], fenced_texts(shown)), len(small_world.split_words(shown)))


def _verdict(reader: Reader, texts: list[str]) -> dict[str, float]:
    """Token -> probability."""
    if len(texts) == 3:
        first = reader.prefers_first(*texts)
        return {FIRST: first, SECOND: 1 - first}
    if len(texts) == 2:
        # The two whole numbers around the score, so that their expected value is the score.
        score = reader.score(*texts)
        low = min(9, math.floor(score))
        return {str(low): low + 1 - score, str(low + 1): score - low}
    raise HTTPError(
        400,
        f"Expected an instruction and one or two outputs between lines of backticks, found {len(texts)} such texts.",
    )


def _completion(request: dict[str, Any], verdict: dict[str, float], prompt_tokens: int) -> dict[str, Any]:
    ranked = sorted(verdict.items(), key=lambda item: -item[1])
    tokens = [
        {"token": token, "bytes": list(token.encode()), "logprob": math.log(max(probability, SMALLEST))}
        for token, probability in ranked
    ]
    logprobs = None
    if request.get("logprobs"):
        top = tokens[: int(request.get("top_logprobs") or 0)]
        logprobs = {"content": [{**tokens[0], "top_logprobs": top}], "refusal": None}
    message = {"role": "assistant", "content": ranked[0][0], "refusal": None}
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1},
    }


async def _converse(known: dict[str, Reader], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection's requests until the client closes it."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, *_ = [*head[0].split(" "), "", ""]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            length = int(headers.get("content-length") or 0)
            close = headers.get("connection", "").lower() == "close"
            try:
                if length > MAX_BODY or "transfer-encoding" in headers:
                    close = True
                    raise HTTPError(413, f"Expected a body with a Content-Length of at most {MAX_BODY} bytes.")
                body = await reader.readexactly(length)
                status, reply = 200, respond(known, method, path.partition("?")[0], body)
            except HTTPError as error:
                status, reply = error.status, error.body()
            payload = json.dumps(reply).encode()
            writer.write(
                f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(payload)}\r\nConnection: {'close' if close else 'keep-alive'}\r\n\r\n".encode()
                + payload
            )
            await writer.drain()
            if close:
                break
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
        pass  # the client went away or does not speak HTTP
    except asyncio.CancelledError:
        pass  # the server is ending
    finally:
        writer.close()


async def _main(world_dir: Path) -> None:
    settings = json.loads((world_dir / SETTINGS).read_text())
    known = readers(small_world.load(world_dir / "truth.json"), settings.get("length_liking", LENGTH_LIKING))
    server = await asyncio.start_server(lambda r, w: _converse(known, r, w), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))

"""Judges behind real HTTP for tests: one that follows a script, and the replay of recorded verdicts."""

from __future__ import annotations

import hashlib
import json
import math
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from eval.judge.protocols.templates import fenced_texts

DROP = object()
"""As a body: close the connection without an answer."""


@dataclass
class Reply:
    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


def completion(text: str, top: dict[str, float] | None, tokens: tuple[int, int] = (100, 1)) -> dict[str, Any]:
    """A chat completion whose first token had these probabilities."""
    listed = [{"token": t, "bytes": list(t.encode()), "logprob": math.log(p)} for t, p in (top or {}).items()]
    logprobs = {"content": [{"token": text, "bytes": [], "logprob": -0.1, "top_logprobs": listed}]} if top else None
    message = {"role": "assistant", "content": text}
    finish = "length" if len(text) == 1 else "stop"
    choice = {"index": 0, "finish_reason": finish, "message": message, "logprobs": logprobs}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "test", "choices": [choice], "usage": usage}


def share(text: str) -> float:
    """A number in (0, 1) that depends on the text alone."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) + 1) / (2**32 + 2)


def verdict(body: dict[str, Any]) -> dict[str, Any]:
    """A judge that prefers by a hash of the answers: p(first) = share(first) / (share(first) + share(second))."""
    _, first, second = fenced_texts(body["messages"][-1]["content"])
    p = share(first) / (share(first) + share(second))
    return completion("m" if p > 0.5 else "M", {"m": p, "M": 1 - p})


@dataclass
class Call:
    body: dict[str, Any]
    authorization: str | None
    at: float
    number: int
    attempt: int
    """How often this body had been sent, this time included."""
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class ScriptedJudge:
    """Serves what `script(call)` says (a Reply, a completion, or None for `verdict`) and remembers every call."""

    def __init__(
        self,
        script: Callable[[Call], Any] = lambda call: None,
        models: Any = None,
        certificate: ssl.SSLContext | None = None,
    ):
        self.script, self.models = script, models or Reply({"object": "list", "data": [{"id": "test"}]})
        self.calls: list[Call] = []
        self.answered = self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if certificate:
            self._server.socket = certificate.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> ScriptedJudge:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _enter(self, body: dict, path: str, headers: dict[str, str]) -> Call:
        with self._lock:
            attempt = 1 + sum(call.body == body for call in self.calls)
            at = time.monotonic()
            call = Call(body, headers.get("authorization"), at, len(self.calls) + 1, attempt, path, headers)
            self.calls.append(call)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return call

    def _handler(judge) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self._send(judge.models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                call = judge._enter(body, self.path, {name.lower(): value for name, value in self.headers.items()})
                try:
                    reply = judge.script(call)
                    reply = verdict(body) if reply is None else reply
                    self._send(reply if isinstance(reply, Reply) else Reply(reply))
                finally:
                    with judge._lock:
                        judge._at_once -= 1

            def _send(self, reply: Reply):
                time.sleep(reply.delay)
                if reply.body is DROP:
                    self.close_connection = True
                    return
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    for key, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the caller has gone
                    self.close_connection = True
                    return
                with judge._lock:
                    judge.answered += 1

        return Handler


@contextmanager
def replay(tool: Path, annotations: Path, *options: str) -> Iterator[str]:
    """The address of a process that serves recorded verdicts."""
    command = [sys.executable, str(tool), "--port", "0", "--annotations", str(annotations), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def replay_stats(url: str) -> dict[str, int]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as reply:
        return json.load(reply)


def serve_batch(requests: Path, url: str) -> list[dict[str, Any]]:
    """What a batch service gives back for these lines, in another order than they came."""
    lines = []
    for line in requests.read_text().splitlines():
        request = json.loads(line)
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        data = json.dumps(request["body"]).encode()
        call = urllib.request.Request(url + "/chat/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call) as reply:
            body = json.load(reply)
        response = {"status_code": 200, "request_id": "r", "body": body}
        lines.append({"id": "batch_req_1", "custom_id": request["custom_id"], "response": response, "error": None})
    return lines[::-1]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path

"""An OpenAI-compatible endpoint, and the ways one call to it can fail.

`Failure.kind` decides what follows:

retried; if it persists, it is the question's result
    rate_limited (429), server_error (5xx), connection (refused or broken off), timeout, malformed (a 200 that is not a
    chat completion), no_logprobs
the question's result at once, because asking again would not help
    unparsable, cut_off (the token limit came before an answer), refused, context_length, bad_request, not_found, budget
ends the run, because no further call can succeed
    auth, quota, model_not_found
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from eval.judge.config import JudgeConfig
from otpo.errors import UserError

RETRIED = frozenset({"rate_limited", "server_error", "connection", "timeout", "malformed", "no_logprobs"})
FATAL = frozenset({"auth", "quota", "model_not_found"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_MODEL_UNKNOWN = re.compile(
    r"\bmodel\b.*(not (?:been )?(?:found|exist|available|loaded|supported)|does ?n[o']t exist|unknown|invalid|no such)"
    r"|(unknown|invalid|no such|unsupported|not found).{0,20}\bmodel\b",
    re.IGNORECASE | re.DOTALL,
)
_TOO_LONG = re.compile(
    r"context.{0,3}(length|window)|maximum context|too many tokens|prompt is too long|max_model_len", re.IGNORECASE
)


class Failure(Exception):
    """One call that gave no verdict.

    Attributes:
        kind: see the module's docstring.
        detail: what the endpoint said.
        retry_after: seconds that the endpoint asked to wait, if it did.
    """

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail, self.retry_after = kind, detail, retry_after


class Endpoint:
    """One HTTP client shared by all calls. Use `open_endpoint` to get one."""

    def __init__(self, client: openai.AsyncOpenAI, config: JudgeConfig, secret: str):
        self._client, self._config, self._secret = client, config, secret

    async def complete(self, body: dict[str, Any]) -> str:
        """POST a chat completion and return the body of the 200.

        Raises:
            Failure: anything else came back, or nothing came within `config.timeout`.
        """
        return await self._send(self._client.post("/chat/completions", body=body, cast_to=httpx2.Response))

    async def models(self) -> str:
        """GET the list of models."""
        return await self._send(self._client.get("/models", cast_to=httpx2.Response))

    async def _send(self, request: Awaitable[httpx2.Response]) -> str:
        try:
            # The client's own timeout limits the gap between two bytes; this one limits the whole call.
            async with asyncio.timeout(self._config.timeout):
                response = await request
                return self._clean(response.text)
        except openai.APIStatusError as error:
            raise self._status_failure(error.response) from None
        except (openai.APIConnectionError, TimeoutError, OSError, httpx2.HTTPError) as error:
            raise Failure(*_transport(error)) from None

    def _clean(self, text: str) -> str:
        """What the endpoint said, without the key in case it repeats it."""
        return text.replace(self._secret, "***") if self._secret in text else text

    def _status_failure(self, response: httpx2.Response) -> Failure:
        text = self._clean(response.text)
        kind, detail = classify_status(response.status_code, text)
        return Failure(kind, detail, retry_after(response.headers))


@asynccontextmanager
async def open_endpoint(config: JudgeConfig) -> AsyncIterator[Endpoint]:
    """The endpoint at `config.url`, with as many connections as `config.concurrency`.

    Raises:
        UserError: the address or the model is missing, or there is a budget but no price.
    """
    if not config.url or not config.model:
        raise UserError(
            "The judge needs an address and a model: set judge.url (such as http://127.0.0.1:8000/v1) and judge.model."
        )
    url = urlsplit(config.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"judge.url: expected an address such as http://127.0.0.1:8000/v1, found '{config.url}'.")
    if config.budget_usd is not None and not (config.price_input or config.price_output):
        raise UserError(
            f"judge.budget_usd is {config.budget_usd} but judge.price_input and judge.price_output are 0, so every "
            "call would be free: give the prices (USD per million tokens)."
        )
    key = os.environ.get(config.api_key_env) or "none"
    http_client = openai.DefaultAioHttpClient(
        limits=httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        trust_env=url.hostname not in _LOOPBACK,  # a proxy is for other machines, not for this one
    )
    async with openai.AsyncOpenAI(
        base_url=config.url, api_key=key, max_retries=0, timeout=config.timeout, http_client=http_client
    ) as client:
        yield Endpoint(client, config, secret=key if key != "none" else "\0")


def classify_status(status: int, text: str) -> tuple[str, str]:
    """(kind, detail) of the failure behind a reply whose status is not 200."""
    code, message = _error_body(text)
    detail = f"HTTP {status} {message or text[:200].strip()}".strip()
    said = f"{code} {message}"
    if status == 401:
        return "auth", detail
    if status == 403:
        return ("refused" if re.search("moderation|flagged|content policy", said, re.IGNORECASE) else "auth"), detail
    if status == 429:
        return ("quota" if "insufficient_quota" in said else "rate_limited"), detail
    if status == 404 and (code is None or "model" in code or re.search(r"\bmodel\b", message, re.IGNORECASE)):
        return "model_not_found", detail
    if status == 404:
        return "not_found", detail
    if status in (408, 504):
        return "timeout", detail
    if status >= 500 or status in (409, 425):
        return "server_error", detail
    if status == 413 or _TOO_LONG.search(said):
        return "context_length", detail
    if status == 400 and ("model_not" in said.lower() or _MODEL_UNKNOWN.search(message)):
        return "model_not_found", detail
    return "bad_request", detail


def _error_body(text: str) -> tuple[str | None, str]:
    """(code, message) of an error body in any of the usual shapes; code is None if the body is not JSON."""
    try:
        body = json.loads(text)
    except ValueError:
        return None, ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", str(error)
    message = error.get("message") or error.get("detail") or ""
    return str(error.get("code") or error.get("type") or ""), message if isinstance(message, str) else json.dumps(
        message
    )


def _transport(error: BaseException) -> tuple[str, str]:
    """(kind, detail) of a call that ended without a reply, by the errors that caused `error`."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(e, OSError) and e.errno == errno.ECONNREFUSED for e in chain):
        return "connection", "connection refused"
    # The aiohttp transport reports a dropped connection as a timeout; only Python's own TimeoutError is one.
    if any(isinstance(e, TimeoutError) for e in chain):
        return "timeout", "no complete reply in time"
    bottom = chain[-1]
    return "connection", f"{type(bottom).__name__}: {bottom}"[:200]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a reply's `retry-after-ms` or `Retry-After` (seconds or a date); None if it has neither."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        return max(
            0.0,
            float(value) if re.fullmatch(r"[\d.]+", value) else parsedate_to_datetime(value).timestamp() - time.time(),
        )
    except (ValueError, TypeError):
        return None


def advice(kind: str, config: JudgeConfig) -> str:
    """What to do about a failure that ends a run."""
    given = "is set" if os.environ.get(config.api_key_env) else "is not set"
    return {
        "auth": f"The key is read from the environment variable {config.api_key_env}, which {given}.",
        "quota": "The account has no credit left.",
        "model_not_found": f"Expected a model that the endpoint serves and an address that usually ends in /v1; "
        f"found model '{config.model}' at {config.url}.",
    }[kind]

"""An OpenAI-compatible endpoint, and the ways one call to it can fail.

`Failure.kind` decides what follows:

retried; if it persists, it is the question's result
    rate_limited (429), server_error (5xx), connection (refused or broken off), tls, dns, timeout, malformed (a 200 that
    is not a chat completion), no_logprobs
the question's result at once, because asking again would not help
    unparsable, cut_off (the token limit came before an answer), refused, context_length, bad_request, not_found, budget
ends the run, because no further call can succeed
    auth, quota, model_not_found, region (the account may not ask from here)
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import httpx2
import openai

from eval.judge.asking.address import address_of, certificates, key_of
from eval.judge.asking.refusals import classify_status, refusal_inside
from eval.judge.asking.streams import joined
from eval.judge.config import JudgeConfig
from otpo.errors import UserError

RETRIED = frozenset({"rate_limited", "server_error", "connection", "tls", "dns", "timeout", "malformed", "no_logprobs"})
FATAL = frozenset({"auth", "quota", "model_not_found", "region"})
SECRET_LENGTH = 8  # a shorter key, such as "-" for a server that wants none, is no secret and may stand in any reply


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
        text = joined(await self._send(self._client.post("/chat/completions", body=body, cast_to=httpx2.Response)))
        if refused := refusal_inside(text):
            raise Failure(*refused)
        return text

    async def models(self) -> str:
        """GET the list of models."""
        return await self._send(self._client.get("/models", cast_to=httpx2.Response))

    async def _send(self, request: Awaitable[httpx2.Response]) -> str:
        try:
            # The client's own timeout limits the gap between two bytes; this one limits the whole call.
            async with asyncio.timeout(self._config.timeout):
                response = await request
                return self._clean(_text_of(response))
        except openai.APIStatusError as error:
            raise self._status_failure(error.response) from None
        except (openai.APIConnectionError, TimeoutError, OSError, httpx2.HTTPError, aiohttp.ClientError) as error:
            raise Failure(*_transport(error)) from None

    def _clean(self, text: str) -> str:
        """What the endpoint said, without the key in case it repeats it."""
        return text if len(self._secret) < SECRET_LENGTH else text.replace(self._secret, "***")

    def _status_failure(self, response: httpx2.Response) -> Failure:
        text = self._clean(_text_of(response))
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
    address = address_of(config.url)
    if config.budget_usd is not None and not (config.price_input or config.price_output):
        raise UserError(
            f"judge.budget_usd is {config.budget_usd} but judge.price_input and judge.price_output are 0, so every "
            "call would be free: give the prices (USD per million tokens)."
        )
    key = key_of(config)
    trusted = certificates(config) if address.base.startswith("https") else None
    http_client = openai.DefaultAioHttpClient(
        limits=httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        trust_env=not address.loopback,  # a proxy is for other machines, not for this one
        verify=trusted or True,
    )
    async with openai.AsyncOpenAI(
        base_url=address.base,
        api_key=key or "none",
        max_retries=0,
        timeout=config.timeout,
        http_client=http_client,
        default_query=address.query,
        default_headers={"api-key": key} if address.azure and key else None,
    ) as client:
        yield Endpoint(client, config, secret=key or "\0")


def _text_of(response: httpx2.Response) -> str:
    """The body in the encoding that JSON shows itself, whatever its header says of it."""
    found = response.content
    return found.decode(json.detect_encoding(found), errors="replace")


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
    if broken := next((e for e in chain if isinstance(e, ssl.SSLError)), None):
        return "tls", str(broken)[:200]
    if any(isinstance(e, socket.gaierror) for e in chain):
        return "dns", "the host's name is not known"
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
        "region": "The endpoint serves no requests from this place or for this account.",
        "tls": "Check http or https in judge.url; a certificate of your own is trusted by judge.ca_file (PEM).",
        "dns": "Check the host's name in judge.url.",
    }[kind]

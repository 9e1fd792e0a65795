"""Finds out, before anything starts, whether the judge can be asked at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable

from eval.judge.client import parameters
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import Endpoint, Failure, advice, open_endpoint
from eval.judge.event_loop import run_coroutine
from eval.judge.prompt_templates import render
from eval.judge.protocols import PROTOCOLS, find_protocol
from otpo.errors import UserError


def check(config: JudgeConfig) -> None:
    """Check address, key, model and settings without buying a verdict.

    Reads the endpoint's list of models. If the model is not in it, asks for a completion of one token.

    Raises:
        UserError: nothing listens at the address, the key is refused, the model is not served, a setting is refused,
            or the protocol is unknown or its prompt template is missing.
    """
    if config.protocol not in PROTOCOLS:
        find_protocol(config.protocol, "pair")
    render(PROTOCOLS[config.protocol], "", "", "")  # AlpacaEval's template may be missing
    run_coroutine(_check(config))


async def _check(config: JudgeConfig) -> None:
    probe = {
        "model": config.model,
        "messages": [{"role": "user", "content": "Reply with the letter m."}],
        **parameters(PROTOCOLS[config.protocol], config.model_copy(update={"max_tokens": 1})),
    }
    async with open_endpoint(config) as endpoint:
        listing = await _reply_or_failure(endpoint.models(), config)
        if isinstance(listing, str) and _lists(listing, str(config.model)):
            return
        reply = await _ask_probe(endpoint, probe, config)
    if not isinstance(reply, Failure):
        return
    no_list = isinstance(listing, Failure) and listing.kind in ("not_found", "model_not_found")
    if no_list and reply.kind in ("not_found", "model_not_found"):
        raise UserError(
            f"{config.url} serves neither a list of models nor chat completions ({reply}). "
            f"{advice('model_not_found', config)}"
        )
    if reply.kind == "model_not_found":
        raise UserError(f"The judge does not serve the model ({reply}). {advice('model_not_found', config)}")
    if reply.kind == "bad_request" and any(name in reply.detail for name in ("logprobs", "max_tokens", "temperature")):
        raise UserError(
            f"The judge at {config.url} refuses a setting of the request ({reply}). Change judge.temperature, "
            "judge.max_tokens or judge.extra_body, or use another judge."
        )


async def _ask_probe(endpoint: Endpoint, body: dict, config: JudgeConfig) -> str | Failure | None:
    """The reply to the probe. Failures that may pass are retried; None if they did not pass."""
    for attempt in range(min(config.max_retries, 3) + 1):
        reply = await _reply_or_failure(endpoint.complete(body), config)
        if isinstance(reply, str) or reply.kind not in ("rate_limited", "server_error", "connection", "timeout"):
            return reply
        await asyncio.sleep(min(reply.retry_after or 0.25 * 2**attempt, 5.0))
    return None


async def _reply_or_failure(call: Awaitable[str], config: JudgeConfig) -> str | Failure:
    """A reply or its failure.

    Raises:
        UserError: a failure that no run could survive.
    """
    try:
        return await call
    except Failure as failure:
        if failure.kind == "auth":
            raise UserError(
                f"The judge at {config.url} refused the key ({failure}). {advice('auth', config)}"
            ) from None
        if failure.kind in ("quota", "region", "tls", "dns"):
            raise UserError(
                f"The judge at {config.url} cannot be asked ({failure}). {advice(failure.kind, config)}"
            ) from None
        if failure.kind == "connection" and failure.detail == "connection refused":
            raise UserError(
                f"No judge answers at {config.url} ({failure.detail}). Start it or correct judge.url."
            ) from None
        return failure


def _lists(listing: str, model: str) -> bool:
    """Whether a list of models names this one."""
    try:
        return any(entry.get("id") == model for entry in json.loads(listing)["data"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False

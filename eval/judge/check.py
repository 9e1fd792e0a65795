"""Finds out, before anything starts, whether the judge can be asked at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path

from eval.judge.asking.probe import QUESTION, find_way
from eval.judge.asking.ways import Way, first_way, is_known, messages_of, parameters, recall, remember, way_of
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import RETRIED, Endpoint, Failure, advice, open_endpoint
from eval.judge.event_loop import run_coroutine
from eval.judge.panels.members import members_of
from eval.judge.protocols.protocol import Protocol
from eval.judge.protocols.registry import find_protocol
from eval.judge.protocols.templates import render
from otpo.errors import UserError


def check(config: JudgeConfig, store: str | Path | None = None) -> Way:
    """Check address, key, model and settings, and find out how the judge can be asked.

    Reads the endpoint's list of models, and asks one question with a clear answer: once where the judge can be asked
    as AlpacaEval asks its own, a few times where not. What is found holds for this process, and is kept in the store.

    Args:
        config: the endpoint and how to ask it.
        store: of the replies; what an earlier process found there is not asked for again.

    Raises:
        UserError: nothing listens at the address, the key is refused, the model is not served, a setting is refused,
            no verdict can be read, or the protocol is unknown or its prompt template is missing.
    """
    protocol = find_protocol(config.protocol)
    render(protocol, "", "", "")  # AlpacaEval's template may be missing
    first_way(config, protocol)
    if store is not None and not is_known(config, protocol):
        recall(config, protocol, store)
    if is_known(config, protocol):
        return way_of(config, protocol)
    way = run_coroutine(_check(config, protocol))
    remember(config, protocol, way)
    return way


def check_each(config: JudgeConfig, store: str | Path | None = None) -> list[tuple[str, Way]]:
    """`check` of a judge, or of every judge of a panel: its model, and how it is asked."""
    return [(str(member.model), check(member, store)) for member in members_of(config)]


async def _check(config: JudgeConfig, protocol: Protocol) -> Way:
    async with open_endpoint(config) as endpoint:
        listing = await _reply_or_failure(endpoint.models(), config)
        listed = isinstance(listing, str) and _lists(listing, str(config.model))

        async def ask(way: Way) -> str | Failure | None:
            shown = messages_of(render(protocol, *QUESTION), protocol, way)
            body = {"model": config.model, "messages": shown, **parameters(protocol, config, way)}
            reply = await _ask_probe(endpoint, body, config)
            if isinstance(reply, Failure):
                _refuse_what_cannot_change(reply, listing, listed, config)
            return reply

        return await find_way(ask, config, protocol)


def _refuse_what_cannot_change(reply: Failure, listing: str | Failure, listed: bool, config: JudgeConfig) -> None:
    no_list = isinstance(listing, Failure) and listing.kind in ("not_found", "model_not_found")
    if no_list and reply.kind in ("not_found", "model_not_found"):
        raise UserError(
            f"{config.url} serves neither a list of models nor chat completions ({reply}). "
            f"{advice('model_not_found', config)}"
        )
    if reply.kind == "model_not_found" and not listed:
        raise UserError(f"The judge does not serve the model ({reply}). {advice('model_not_found', config)}")
    if reply.kind == "malformed":
        raise UserError(
            f"{config.url} answers, but not with a chat completion ({reply}). Expected the address of an "
            "OpenAI-compatible server, which usually ends in /v1."
        )
    if reply.kind == "connection" and isinstance(listing, Failure) and listing.kind == "connection":
        raise UserError(
            f"The judge at {config.url} breaks off every connection ({reply}). Check http or https in judge.url, and "
            "what stands between."
        )


async def _ask_probe(endpoint: Endpoint, body: dict, config: JudgeConfig) -> str | Failure | None:
    """The reply to the probe. Failures that may pass are retried; None if they did not pass, yet might."""
    reply: str | Failure | None = None
    for attempt in range(min(config.max_retries, 3) + 1):
        reply = await _reply_or_failure(endpoint.complete(body), config)
        if isinstance(reply, str) or reply.kind not in RETRIED:
            return reply
        if reply.kind == "timeout":  # each may take minutes
            return None
        await asyncio.sleep(min(reply.retry_after or 0.25 * 2**attempt, 5.0))
    lasting = isinstance(reply, Failure) and reply.kind in ("malformed", "connection")
    return reply if lasting else None


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

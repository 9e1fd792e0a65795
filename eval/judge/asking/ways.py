"""The ways in which a judge can be asked for a verdict, and which of them an endpoint was found to take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eval.judge.config import JudgeConfig
from eval.judge.protocols import FIRST, SECOND, Protocol
from eval.judge.store import Store, open_store

Read = Literal["logprobs", "json", "text"]
# Tokens of a reply that may hold a sentence, an explanation, or thinking first.
JSON_TOKENS, TEXT_TOKENS, THINKING_TOKENS = 256, 2048, 16_384


@dataclass(frozen=True)
class Way:
    """How a judge is asked, and where its verdict is read.

    Attributes:
        read: from the logprobs of the answer, from JSON that fits a schema, or from the text by a strict grammar.
        max_tokens: of a reply; None is the protocol's own number.
        tokens_field: what the endpoint calls that limit.
        temperature: whether a temperature may be sent.
        top_logprobs: alternatives at each position; None is the protocol's own number.
        system: whether a system message may be sent; otherwise its text begins the user's.
        stream: whether the endpoint answers in pieces only.
    """

    read: Read = "logprobs"
    max_tokens: int | None = None
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: bool = True
    top_logprobs: int | None = None
    system: bool = True
    stream: bool = False

    def __str__(self) -> str:
        """In one line, what is out of the ordinary last."""
        odd = [
            self.tokens_field if self.tokens_field != "max_tokens" else "",
            f"up to {self.max_tokens} tokens a reply" if self.max_tokens else "",
            "" if self.temperature else "no temperature",
            f"{self.top_logprobs} logprobs" if self.top_logprobs and self.read == "logprobs" else "",
            "" if self.system else "no system message",
            "streamed" if self.stream else "",
        ]
        where = {"logprobs": "logprobs", "json": "JSON by a schema", "text": "the text"}[self.read]
        return ", ".join([f"verdicts from {where}", *(each for each in odd if each)])


def parameters(protocol: Protocol, config: JudgeConfig, way: Way | None = None) -> dict[str, Any]:
    """The request's fields other than model and messages. They are part of a stored reply's key."""
    way = way or first_way(config)
    fields: dict[str, Any] = {
        way.tokens_field: config.max_tokens or way.max_tokens or protocol.max_tokens,
        "temperature": config.temperature if way.temperature else None,
    }
    if way.read == "logprobs":
        fields |= {"logprobs": True, "top_logprobs": way.top_logprobs or protocol.top_logprobs}
    if way.read == "json":
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": _schema(protocol)},
        }
    if way.stream:
        fields["stream"] = True
    return {name: value for name, value in (fields | config.extra_body).items() if value is not None}


def messages_of(messages: list[dict[str, str]], protocol: Protocol, way: Way) -> list[dict[str, str]]:
    """The messages as an endpoint takes them, with a last sentence about the form of the reply where it is another."""
    last = {"role": messages[-1]["role"], "content": messages[-1]["content"] + _form(protocol, way)}
    asked = [*messages[:-1], last]
    if way.system or asked[0]["role"] != "system":
        return asked
    system, *rest = asked
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _schema(protocol: Protocol) -> dict[str, Any]:
    verdict: dict[str, Any] = {"type": "string", "enum": [FIRST, SECOND]}
    name, value = ("verdict", verdict) if protocol.verdict == "pair" else ("rating", {"type": "integer"})
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


def _form(protocol: Protocol, way: Way) -> str:
    pair = protocol.verdict == "pair"
    if way.read == "json":
        forms = f'{{"verdict": "{FIRST}"}} or {{"verdict": "{SECOND}"}}' if pair else '{"rating": a whole number}'
        return f"\n\nReply in JSON: {forms}."
    if way.read == "text" and way.max_tokens and pair:
        return f'\n\nIf you say more than that, end with a line "Verdict: {FIRST}" or "Verdict: {SECOND}".'
    return ""


# ---- what is known of an endpoint ----

_known: dict[str, Way] = {}


def first_way(config: JudgeConfig) -> Way:
    """The way that is tried first: logprobs, unless the settings name another."""
    if config.verdict == "json":
        return Way("json", max_tokens=JSON_TOKENS)
    return Way("text", max_tokens=TEXT_TOKENS) if config.verdict == "text" else Way()


def endpoint_key(config: JudgeConfig, protocol: Protocol) -> str:
    """What a way was found for: address, model, kind of verdict, and the settings that the endpoint may refuse."""
    settings = config.model_dump(include={"url", "model", "verdict", "temperature", "max_tokens", "extra_body"})
    return json.dumps([settings, protocol.verdict], sort_keys=True)


def remember(config: JudgeConfig, protocol: Protocol, way: Way) -> None:
    """Keep what was found for the rest of this process."""
    _known[endpoint_key(config, protocol)] = way


def way_of(config: JudgeConfig, protocol: Protocol) -> Way:
    """The way that was found for the endpoint, or the first one."""
    return _known.get(endpoint_key(config, protocol)) or first_way(config)


def is_known(config: JudgeConfig, protocol: Protocol) -> bool:
    """Whether a way was found for the endpoint in this process."""
    return endpoint_key(config, protocol) in _known


def keep_ways(config: JudgeConfig, protocols: Iterable[Protocol], store: Store) -> None:
    """Write what is known of an endpoint beside its replies, for later processes."""
    for protocol in protocols:
        if is_known(config, protocol):
            store.put_way(endpoint_key(config, protocol), json.dumps(asdict(way_of(config, protocol))))


def recall(config: JudgeConfig, protocol: Protocol, store: str | Path) -> None:
    """Take what an earlier process found from the store, if it is there."""
    if Path(store).is_file():
        with open_store(store) as opened:
            if found := opened.way(endpoint_key(config, protocol)):
                remember(config, protocol, Way(**json.loads(found)))

"""The ways in which a judge can be asked for a verdict, and which of them an endpoint was found to take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eval.judge.asking.forms import fields_of, sentence_of
from eval.judge.config import JudgeConfig
from eval.judge.protocols.protocol import Protocol, Read
from eval.judge.store import Store, open_store
from otpo.errors import UserError

# Tokens of a reply that may hold a sentence, an explanation, or thinking first.
JSON_TOKENS, TEXT_TOKENS, THINKING_TOKENS = 256, 2048, 16_384
LEAST_TOKENS: dict[Read, int] = {"logprobs": 1, "json": JSON_TOKENS, "tool": JSON_TOKENS, "text": TEXT_TOKENS}


@dataclass(frozen=True)
class Way:
    """How a judge is asked, and where its verdict is read.

    Attributes:
        read: from the logprobs of the answer, from JSON that fits a schema, from the call of a tool with such JSON, or
            from the text by a strict grammar.
        max_tokens: of a reply; None is the protocol's own number.
        tokens_field: what the endpoint calls that limit.
        temperature: whether a temperature may be sent.
        top_logprobs: alternatives at each position; None is the protocol's own number.
        system: whether a system message may be sent; otherwise its text begins the user's.
        stream: whether the endpoint answers in pieces only.
        seed: whether a seed may be sent.
        reasoning: whether an effort of reasoning may be sent.
    """

    read: Read = "logprobs"
    max_tokens: int | None = None
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: bool = True
    top_logprobs: int | None = None
    system: bool = True
    stream: bool = False
    seed: bool = True
    reasoning: bool = True

    def __str__(self) -> str:
        """In one line, what is out of the ordinary last."""
        odd = [
            self.tokens_field if self.tokens_field != "max_tokens" else "",
            f"up to {self.max_tokens} tokens a reply" if self.max_tokens else "",
            "" if self.temperature else "no temperature",
            f"{self.top_logprobs} logprobs" if self.top_logprobs and self.read == "logprobs" else "",
            "" if self.system else "no system message",
            "streamed" if self.stream else "",
            "" if self.seed else "no seed",
            "" if self.reasoning else "no reasoning effort",
        ]
        where = {
            "logprobs": "logprobs", "json": "JSON by a schema", "tool": "the call of a tool", "text": "the text",
        }[self.read]  # fmt: skip
        return ", ".join([f"verdicts from {where}", *(each for each in odd if each)])


def parameters(protocol: Protocol, config: JudgeConfig, way: Way | None = None, sample: int = 0) -> dict[str, Any]:
    """The request's fields other than model and messages. They are part of a stored reply's key."""
    way = way or first_way(config, protocol)
    fields: dict[str, Any] = {
        way.tokens_field: config.max_tokens or way.max_tokens or protocol.max_tokens,
        "temperature": config.temperature if way.temperature else None,
        "reasoning_effort": config.reasoning_effort if way.reasoning else None,
    }
    if config.sampling_seed is not None and way.seed:
        fields["seed"] = config.sampling_seed + sample
    if way.read == "logprobs":
        fields |= {"logprobs": True, "top_logprobs": way.top_logprobs or protocol.top_logprobs}
    fields |= fields_of(protocol, way.read)
    if way.stream:
        fields["stream"] = True
    return {name: value for name, value in (fields | config.extra_body).items() if value is not None}


def messages_of(messages: list[dict[str, str]], protocol: Protocol, way: Way) -> list[dict[str, str]]:
    """The messages as an endpoint takes them, with a last sentence about the form of the reply where it is another."""
    last = {
        "role": messages[-1]["role"],
        "content": messages[-1]["content"] + sentence_of(protocol, way.read, long=bool(way.max_tokens)),
    }
    asked = [*messages[:-1], last]
    if way.system or asked[0]["role"] != "system":
        return asked
    system, *rest = asked
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


# ---- what is known of an endpoint ----

_known: dict[str, Way] = {}


def first_way(config: JudgeConfig, protocol: Protocol) -> Way:
    """The way that is tried first: the protocol's own first one, unless the settings name another.

    Raises:
        UserError: the protocol's verdicts cannot be read where the settings say.
    """
    if config.verdict == "auto":
        read = protocol.reads[0]
        return Way(read, max_tokens=None if read in ("logprobs", "text") else max(protocol.max_tokens, JSON_TOKENS))
    if config.verdict not in protocol.reads:
        raise UserError(
            f"judge.verdict: verdicts of the protocol {protocol.name} are read from {', '.join(protocol.reads)} (or "
            f"auto, the first that the judge gives); found {config.verdict}."
        )
    if config.verdict == "logprobs":
        return Way()
    return Way(config.verdict, max_tokens=max(protocol.max_tokens, LEAST_TOKENS[config.verdict]))


def endpoint_key(config: JudgeConfig, protocol: Protocol) -> str:
    """What a way was found for: address, model, kind of verdict, and the settings that the endpoint may refuse."""
    settings = config.model_dump(include={"url", "model", "verdict", "temperature", "max_tokens", "extra_body"})
    for later in ("sampling_seed", "reasoning_effort"):
        if (value := getattr(config, later)) is not None:
            settings[later] = value
    short = protocol.verdict in ("pair", "rating") and protocol.max_tokens < 10
    return json.dumps([settings, protocol.verdict if short else protocol.label], sort_keys=True)


def remember(config: JudgeConfig, protocol: Protocol, way: Way) -> None:
    """Keep what was found for the rest of this process."""
    _known[endpoint_key(config, protocol)] = way


def way_of(config: JudgeConfig, protocol: Protocol) -> Way:
    """The way that was found for the endpoint, or the first one."""
    return _known.get(endpoint_key(config, protocol)) or first_way(config, protocol)


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

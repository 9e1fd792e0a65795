"""Whether a rendered text has what messages and tools say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from otpo.data.rows import REASONING, BadRow, Messages

BESIDE_CONTENT = {"images", "image", "video", "audio", "attachments", "documents", "context", "tools", "functions"}
"""Keys of a message that say something beside its content."""
SPEAKERS = ("system", "developer", "user", "assistant")


def missing(completion: dict[str, Any], header: str, body: str) -> str | None:
    """The key of a message with more than text that a rendered answer lacks; None where it has everything."""
    if not _calls_in(completion, body):
        return "tool_calls"
    if not _is_named([completion], header + body):
        return "name"
    for key in ("content", *REASONING):
        text = completion.get(key)
        if isinstance(text, str) and text.strip() and text.strip() not in header + body:
            return key
    return None


def check_said(messages: Messages, text: str) -> None:
    """Raise BadRow where a rendered prompt lacks what a message says; thoughts of earlier answers may be taken out."""
    own = [(message.get("content") or "").rpartition("</think>")[2].strip() for message in messages]
    whole = "\0".join(own)
    for message, told in zip(messages, own, strict=True):
        if message["role"] in ("system", "developer", "user"):
            told = (message.get("content") or "").strip()
        if told and not _counted(text, told, whole.count(told)):
            raise BadRow(f"the chat template leaves out or changes a message of the {message['role']}")
        if not _calls_in(message, text):
            raise BadRow("the chat template leaves out tool calls")
        for key in message.keys() & BESIDE_CONTENT:
            if any(not _holds(text, leaf) for leaf in _leaves(message[key])):
                raise BadRow(f"the chat template leaves out {key} of a message: write it into the content")
    if not _is_named(messages, text):
        raise BadRow("the chat template leaves out the name of a message: write it into the content, or take names out")


def _is_named(messages: Messages, text: str) -> bool:
    """Whether a rendered text has the names of those who speak, beside what they say.

    A role is no name, and tools have theirs in the calls.
    """
    given = [str(m["name"]).strip() for m in messages if m.get("name") and m["role"] in SPEAKERS]
    names = [name for name in given if name and name not in SPEAKERS]
    if not names:
        return True
    said = "\0".join((message.get("content") or "").rpartition("</think>")[2] for message in messages)
    return all(text.count(name) >= said.count(name) + names.count(name) for name in names)


def check_tools(tools: Iterable[dict[str, Any]], text: str) -> None:
    """Raise BadRow where a rendered prompt lacks the name of a tool or of one of its parameters."""
    for tool in tools:
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        schema = function.get("parameters")
        known = schema.get("properties") if isinstance(schema, dict) else None
        names = [function.get("name") or "", *(known if isinstance(known, dict) else ())]
        if not all(_holds(text, name) for name in names):
            raise BadRow("the chat template leaves out tools (data.columns: {tools: null} leaves the column out)")


def _calls_in(message: dict[str, Any], text: str) -> bool:
    """Whether a rendered text has the names and the arguments of a message's tool calls, as often as they have them."""
    leaves: list[Any] = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        leaves += [function.get("name"), *_leaves(function.get("arguments"))]
    return all(_holds(text, leaf, leaves.count(leaf)) for leaf in leaves if leaf is not None)


def _leaves(value: Any) -> list[Any]:
    """The keys and the single values of nested objects and lists."""
    if isinstance(value, dict):
        return [leaf for key, each in value.items() for leaf in (key, *_leaves(each))]
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, list) else [value]


def _holds(text: str, leaf: Any, times: int = 1) -> bool:
    """Whether a text has a value so many times, as itself or as JSON or Python write it."""
    if isinstance(leaf, str):
        return not leaf.strip() or _counted(text, leaf.strip(), times)
    written = {re.escape(form) for form in (json.dumps(leaf, default=str), str(leaf))}
    return len(re.findall(rf"(?<![\w.])(?:{'|'.join(written)})(?!\w)", text)) >= times


def _counted(text: str, told: str, times: int) -> bool:
    """Whether a text has another so many times (at least once), as itself or as it stands inside JSON."""
    if text.count(told) >= max(times, 1):
        return True
    once = {json.dumps(told, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
    forms = {told, *once, *(json.dumps(each, ensure_ascii=False)[1:-1] for each in once)}
    return sum(text.count(form) for form in forms) >= max(times, 1)

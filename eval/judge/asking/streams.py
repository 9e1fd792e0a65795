"""Chat completions that come in pieces (server-sent events), joined to one."""

from __future__ import annotations

import json
import re
from typing import Any

_EVENTS = re.compile(r"\ufeff?\s*(?:data|event|id|retry)?:")  # a line that begins with a colon is a comment


def joined(text: str) -> str:
    """The chat completion whose pieces a body holds; any other body as it is."""
    if not _EVENTS.match(text):
        return text
    content: dict[str, str] = {"content": "", "reasoning_content": "", "refusal": ""}
    whole: dict[str, Any] = {"object": "chat.completion"}
    positions: list[Any] = []
    calls: dict[int, dict[str, Any]] = {}
    finish, ended = None, False
    for line in re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff")):  # JSON may hold other line ends as they are
        data = line[5:].strip() if line.startswith("data:") else ""
        ended = ended or data == "[DONE]"
        if data in ("", "[DONE]"):
            continue
        try:
            piece = json.loads(data)
        except (ValueError, RecursionError):
            return text
        if not isinstance(piece, dict) or piece.get("error"):
            return data
        whole |= {key: piece[key] for key in ("id", "created", "model", "usage") if piece.get(key)}
        for choice in _dicts(piece.get("choices")):
            if choice.get("index"):  # another completion of the same request
                continue
            delta = _dict(choice.get("delta"))
            for key in content:
                content[key] += _words(delta.get(key))
            for call in _dicts(delta.get("tool_calls")):
                number = call.get("index")
                _extend(calls.setdefault(number if isinstance(number, int) else 0, {"name": "", "arguments": ""}), call)
            positions += _dicts(_dict(choice.get("logprobs")).get("content"))
            finish = choice.get("finish_reason") or finish
            whole |= {"error": choice["error"]} if choice.get("error") else {}
    if "error" in whole:
        return json.dumps({"error": whole["error"]})
    if not finish and not ended:
        return json.dumps({"error": {"message": "the stream broke off before its end"}})
    called = [{"type": "function", "function": function} for _, function in sorted(calls.items())]
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", **content} | ({"tool_calls": called} if called else {}),
        "logprobs": {"content": positions} if positions else None,
    }
    return json.dumps(whole | {"choices": [choice]})


def _extend(function: dict[str, Any], call: dict[str, Any]) -> None:
    """Add a piece of a tool's call to what came before."""
    piece = _dict(call.get("function"))
    for key in function:
        found = piece.get(key)
        function[key] += json.dumps(found) if isinstance(found, dict) else _words(found)


def _words(found: Any) -> str:
    """A piece of text, also where it comes in parts, as Mistral's models that think have it."""
    if isinstance(found, list):
        return "".join(_words(part.get("text")) for part in _dicts(found) if part.get("type") in (None, "text"))
    return found if isinstance(found, str) else ""


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

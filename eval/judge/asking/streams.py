"""Chat completions that come in pieces (server-sent events), joined to one."""

from __future__ import annotations

import json
from typing import Any


def joined(text: str) -> str:
    """The chat completion whose pieces a body holds; any other body as it is."""
    if not text.lstrip().startswith(("data:", "event:", ": ")):
        return text
    content: dict[str, str] = {"content": "", "reasoning_content": ""}
    whole: dict[str, Any] = {"object": "chat.completion"}
    positions: list[Any] = []
    calls: dict[int, dict[str, Any]] = {}
    finish = None
    for line in text.splitlines():
        if not line.startswith("data:") or line[5:].strip() in ("", "[DONE]"):
            continue
        try:
            piece = json.loads(line[5:])
        except ValueError:
            return text
        if not isinstance(piece, dict) or "error" in piece:
            return line[5:]
        whole |= {key: piece[key] for key in ("id", "created", "model", "usage") if piece.get(key)}
        for choice in (piece.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            for key in content:
                content[key] += delta.get(key) or ""
            for call in delta.get("tool_calls") or []:
                _extend(calls.setdefault(call.get("index") or 0, {"name": "", "arguments": ""}), call)
            positions += (choice.get("logprobs") or {}).get("content") or []
            finish = choice.get("finish_reason") or finish
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
    piece = call.get("function") or {}
    for key in function:
        function[key] += piece.get(key) or ""

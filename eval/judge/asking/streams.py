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
            positions += (choice.get("logprobs") or {}).get("content") or []
            finish = choice.get("finish_reason") or finish
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", **content},
        "logprobs": {"content": positions} if positions else None,
    }
    return json.dumps(whole | {"choices": [choice]})

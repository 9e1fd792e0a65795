"""What belongs to a prompt in every format: a system prompt, tools, earlier turns, variables of the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from otpo.data.formats.cells import conversation_of, is_blank, listed_of, parsed, text_of
from otpo.data.rows import BadRow, Messages, Parts, Row


@dataclass(frozen=True)
class Context:
    """What a row says beside prompt and completions; false where it says nothing."""

    system: str
    history: Messages
    tools: list[dict[str, Any]]
    template_kwargs: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.system or self.history or self.tools or self.template_kwargs)

    def before(self, parts: Parts) -> Parts:
        """The parts with a prompt of messages that begins with the system prompt and the earlier turns.

        Raises:
            BadRow: the prompt has another system message.
        """
        prompt = _with_context(parts.prompt, self.system, self.history)
        return replace(
            parts, prompt=prompt, tools=self.tools or parts.tools, template_kwargs=self.template_kwargs or None
        )


def context_of(row: Row, columns: Mapping[str, str]) -> Context:
    """The context of a row.

    Args:
        columns: what a column is (a key of `names.CONTEXT`) -> its name.

    Raises:
        BadRow: a cell that is not what it should be.
    """
    said = {what: row[column] for what, column in columns.items() if not is_blank(row.get(column))}
    kwargs = said.get("chat_template_kwargs", {})
    kwargs = parsed(kwargs) if isinstance(kwargs, str) else kwargs
    if not isinstance(kwargs, dict):
        raise BadRow("chat_template_kwargs is no object")
    return Context(
        system=_system(row, columns["system"]) if "system" in said else "",
        history=_history(said["history"], columns["history"]) if "history" in said else [],
        tools=listed_of(said["tools"], columns["tools"]) if "tools" in said else [],
        template_kwargs={key: value for key, value in kwargs.items() if value is not None},
    )


def joined(parts: Parts, text: str) -> Parts:
    """The parts with a text after the prompt and a blank line."""
    if isinstance(parts.prompt, str):
        return replace(parts, prompt=f"{parts.prompt}\n\n{text}")
    *before, last = parts.prompt
    return replace(parts, prompt=[*before, {**last, "content": f"{last.get('content') or ''}\n\n{text}"}])


def _with_context(prompt: Any, system: str, history: Messages) -> Messages:
    messages = ([{"role": "user", "content": prompt}] if prompt.strip() else []) if isinstance(prompt, str) else prompt
    first = messages[0] if messages and messages[0]["role"] in ("system", "developer") else None
    if first is not None and system and system.strip() != (first.get("content") or "").strip():
        raise BadRow("the system column and the prompt's system message differ")
    own = [first] if first is not None else [{"role": "system", "content": system}] if system else []
    return [*own, *history, *(messages[1:] if first is not None else messages)] if messages else []


def _system(row: Row, column: str) -> str:
    """The system prompt, also as one message of the system, which may be JSON."""
    said = text_of(row, column)
    if isinstance(said, str):
        return said
    if len(said) != 1 or said[0]["role"] not in ("system", "developer"):
        raise BadRow(f"{column} holds messages: expected a text, or one message of the system")
    return said[0].get("content") or ""


def _history(value: Any, column: str) -> Messages:
    """Earlier turns, as pairs [user's, assistant's] (LLaMA-Factory) or as messages."""
    value = parsed(value) if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        turns = [(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)]
        return [{"role": role, "content": str(text)} for role, text in turns]
    return conversation_of({column: value}, column)


def last_role(prompt: Any) -> str:
    """The role of the last of a prompt's messages; "" for a string."""
    return prompt[-1]["role"] if isinstance(prompt, list) and prompt else ""

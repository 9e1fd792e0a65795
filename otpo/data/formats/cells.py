"""What one cell of a row says: text, messages, tools, a label. As in CSV, messages may be JSON or Python text."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

from otpo.data.rows import REASONING, BadRow, Messages, Row, Text

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "chatbot": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant", "observation": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
"""Other names of roles, as ShareGPT and LLaMA-Factory write them, and the chat templates' name."""

_STANDARD = ("system", "developer", "user", "assistant", "tool", "function")
_LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "desirable", "good", "chosen", "positive"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "undesirable", "bad", "rejected", "negative"), False),
}
_WRITTEN = re.compile(r"\s*(array\()?\[?\s*\{\s*['\"]\w+['\"]\s*:")  # how messages begin where they are text
_TEXTS = ("content", "value", "text", "message", "parts")
_SPEAKERS = ("role", "from", "speaker")
_KEYS = tuple(
    re.compile(rf"['\"]({'|'.join(keys)})['\"]\s*:") for keys in (_SPEAKERS, (*_TEXTS, "tool_calls"))
)  # fmt: skip


def is_null(value: Any) -> bool:
    """Whether a cell holds nothing: None, or the NaN that tables put for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Whether a cell says nothing: null, white space, or an empty list or object, also as text."""
    if isinstance(value, bytes | str):
        return value.strip() in ("", b"", "[]", "{}", "null", "None")
    return is_null(value) or (isinstance(value, list | dict) and not value)


def parsed(text: str) -> Any:
    """What a text says as JSON, also as JSON inside a JSON string, or as a Python literal; None where it is neither."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return parsed(found) if isinstance(found, str) and found != text else found


# ---- text and messages ----


def string_of(row: Row, column: str) -> str:
    """The string in a column. Raises BadRow where there is none."""
    value = _cell(row, column)
    if not isinstance(value, str):
        raise BadRow(f"{column} is not a string")
    return value


def text_of(row: Row, column: str) -> Text:
    """The string or the messages in a column, as chat templates take them. Raises BadRow where there are none.

    One message alone stands for a list of it. Text that is a list of messages, as JSON or as Python prints it, is read
    as messages; other text stays as it is, whatever it begins with.
    """
    value = _cell(row, column)
    if isinstance(value, str):
        found = _written(value, column)
        if found is None:
            return value
        value = found
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{column} is neither a string nor a list of messages")
    return [_message(each, column) for each in value]


def conversation_of(row: Row, column: str) -> Messages:
    """The messages in a column, also as turns `{input, output}`. Raises BadRow where there are none."""
    value = _cell(row, column)
    if isinstance(value, str):
        value = parsed(value)
    if isinstance(value, list) and value and all(_is_turn(turn) for turn in value):
        pairs = [(turn.get("input"), turn.get("output")) for turn in value]
        return [
            {"role": role, "content": str(text)}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
            if not is_blank(text)
        ]
    found = text_of({column: value}, column)
    if isinstance(found, str):
        raise BadRow(f"{column} is not a list of messages")
    return found


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and "input" in value and not {"role", "from"} & value.keys()


def _cell(row: Row, column: str) -> Any:
    value = row.get(column)
    if is_null(value):
        raise BadRow(f"no {column}")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRow(f"{column} is bytes that are not UTF-8") from None
    return value


def _written(text: str, column: str) -> list[Any] | None:
    """The messages that a text is, None for any other text."""
    if text.lstrip()[:1] not in ("[", "{", '"', "a"):
        return None
    quoted = text.replace('\\"', '"')
    if not all(key.search(quoted) for key in _KEYS):
        return None
    found = parsed(text)
    listed = [found] if isinstance(found, dict) else found
    if isinstance(listed, list) and listed and all(_is_message(each) for each in listed):
        return listed
    if isinstance(found, list) and found and all(_is_said(each) for each in found):
        raise BadRow(f"{column} looks like messages, in a form that is not known: expected role and content")
    if found is None and _WRITTEN.match(text):
        raise BadRow(f"{column} looks like messages, and is neither JSON nor a Python literal")
    return None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    known = isinstance(role, str) and role.lower() in {*_STANDARD, *ROLES, "function_call"}
    return known and bool({*_TEXTS, "tool_calls"} & value.keys())


def _is_said(value: Any) -> bool:
    return isinstance(value, dict) and all(any(key in value for key in keys) for keys in (_SPEAKERS, _TEXTS))


def are_messages(value: Any) -> bool:
    """Whether a cell is a text that is messages, or looks like them."""
    try:
        return isinstance(value, str) and _written(value, "") is not None
    except BadRow:
        return True


def are_texts(value: Any) -> bool:
    """Whether a cell is a text that is a list of texts, such as the questions of a conversation."""
    found = parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else None
    return isinstance(found, list) and len(found) > 0 and all(isinstance(each, str) for each in found)


def _message(value: Any, column: str) -> dict[str, Any]:
    if isinstance(value, str):  # a message of its own as JSON
        value = parsed(value)
    if not isinstance(value, dict):
        raise BadRow(f"{column} is a list of something else than messages")
    value = {key: item for key, item in value.items() if not is_null(item) or key == "content"}
    role = value.pop("from", None)
    sharegpt = role is not None and "role" not in value
    role = value.pop("role", role)
    if not isinstance(role, str):
        raise BadRow(f"{column} has a message without a role")
    lower = role.strip().lower()
    absent = not {*_TEXTS} & value.keys()
    contents = [value.pop(key) for key in _TEXTS if key in value]
    said = [each for each in contents if not is_blank(each)]
    if len(said) > 1 and len({_content(each, column) for each in said}) > 1:
        raise BadRow(f"{column} has a message with two contents that differ ({', '.join(_TEXTS)})")
    content = said[0] if said else next((each for each in contents if each is not None), None)
    if sharegpt and lower == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _sharegpt_calls(content, column)}
    if sharegpt and lower not in {*_STANDARD, *ROLES}:
        raise BadRow(f"{column} has a message from {role!r}: expected system, human, gpt, observation, function_call")
    role = ROLES.get(lower, lower if lower in _STANDARD else role)
    if "function_call" in value and "tool_calls" not in value:  # OpenAI's older spelling of one call
        value["tool_calls"] = [{"type": "function", "function": value.pop("function_call")}]
    if is_blank(value.get("tool_calls", [])):
        value.pop("tool_calls", None)
    else:
        value["tool_calls"] = [_call(call, column) for call in listed_of(value["tool_calls"], f"{column}'s tool_calls")]
    if content is None and not (value.keys() & {"tool_calls", *REASONING}):
        raise BadRow(f"{column} has a message without content")
    return {"role": role, **({} if absent else {"content": _content(content, column)}), **value}


def _content(content: Any, column: str) -> str | None:
    """The text of a message; of a list of parts, theirs one after the other, as templates write them."""
    if content is None or isinstance(content, str):
        return content
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise BadRow(f"{column} has a message whose content is not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or "text" not in str(kind):
            raise BadRow(f"{column} has a message with a part that is not text ({kind}): only text can be trained on")
        texts.append(text)
    return "".join(texts)


# ---- tools ----


def listed_of(value: Any, what: str) -> list[Any]:
    """A list of objects, one object, or the same as JSON or Python text. Raises BadRow for anything else."""
    found = parsed(value) if isinstance(value, str) else value
    found = [found] if isinstance(found, dict) else found
    if isinstance(found, list):
        found = [parsed(each) if isinstance(each, str) else each for each in found]
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise BadRow(f"{what} is neither a list of objects nor JSON of one")
    return found


def _sharegpt_calls(value: Any, column: str) -> list[dict[str, Any]]:
    calls = listed_of(value, f"{column}'s function_call")
    return [{"type": "function", "function": _with_arguments(call)} for call in calls]


def _call(call: dict[str, Any], column: str) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    if "name" not in call:
        raise BadRow(f"{column} has a tool call without a name")
    return _with_arguments(call)


def _with_arguments(function: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object: as JSON text, OpenAI's form, templates would quote them a second time."""
    arguments = function.get("arguments")
    found = parsed(arguments) if isinstance(arguments, str) else None
    return {**function, "arguments": found} if isinstance(found, dict) else function


# ---- labels ----


def label_of(value: Any) -> bool | None:
    """Whether a cell says that a completion is good: true, 1, "yes", "desirable", ...; None where it says neither."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool | int | float | str):
        return _LABELS.get(str(value).strip().lower())
    return None

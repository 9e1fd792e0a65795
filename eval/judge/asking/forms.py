"""The form in which a judge is asked to give its verdict: JSON by a schema, the call of a tool, or a last line."""

from __future__ import annotations

import json
from typing import Any

from eval.judge.protocols.protocol import FIRST, SECOND, Protocol, Read

TOOL = "give_verdict"


def fields_of(protocol: Protocol, read: Read) -> dict[str, Any]:
    """The fields of a request that ask for the form of the reply; none where the text is read."""
    if read == "json":
        schema = {"name": "verdict", "strict": True, "schema": schema_of(protocol)}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    if read == "tool":
        function = {
            "name": TOOL, "description": "Gives your verdict.", "strict": True, "parameters": schema_of(protocol),
        }  # fmt: skip
        return {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": TOOL}},
        }
    return {}


def schema_of(protocol: Protocol) -> dict[str, Any]:
    """The JSON schema of a verdict."""
    kinds: dict[str, Any]
    if protocol.verdict == "criteria":
        kinds = {
            each.name: {"type": "boolean" if each.points is None else "integer", "description": each.asks}
            for each in protocol.criteria
        }
    elif protocol.verdict == "rating":
        kinds = {"rating": {"type": "integer"}}
    else:
        kinds = {"verdict": {"type": "string", "enum": said_of(protocol)}}
    return {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}


def said_of(protocol: Protocol) -> list[str]:
    """What a judge may say of two outputs."""
    return [grade.said for grade in protocol.grades] or [FIRST, SECOND]


def sentence_of(protocol: Protocol, read: Read, *, long: bool) -> str:
    """What is said at the end of the prompt about the form of the reply; empty where the prompt itself says it.

    Args:
        protocol: what the judge is asked for.
        read: where its verdict will be read.
        long: whether the reply may hold more than the verdict.
    """
    if read == "tool":
        return f"\n\nGive your verdict by calling {TOOL}."
    if read == "json" and protocol.verdict == "criteria":
        example = {each.name: True if each.points is None else each.points for each in protocol.criteria}
        return f"\n\nReply in JSON, such as {json.dumps(example, ensure_ascii=False)}."
    if read == "json" and protocol.verdict == "rating":
        return '\n\nReply in JSON: {"rating": a whole number}.'
    if read == "json":
        forms = [json.dumps({"verdict": said}) for said in said_of(protocol)]
        return f"\n\nReply in JSON: {', '.join(forms[:-1])} or {forms[-1]}."
    if read == "text" and long and protocol.verdict == "pair":
        return f'\n\nIf you say more than that, end with a line "Verdict: {FIRST}" or "Verdict: {SECOND}".'
    return ""

"""Prompts and completions through a chat template, and whether the template leaves a completion's text as it is.

Where a completion stands in a rendered conversation is told by what is rendered around it, never by a search for its
text: a template may take parts of it out, and its words may stand in the template's own markers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from otpo.data.chat.said import check_said, check_tools, missing
from otpo.data.rows import REASONING, BadRow, Messages, Parts, Text
from otpo.errors import UserError

PROBE = "otpo-7c1d"  # stands where the completion does; no template treats it specially
SHOWN = 160  # characters of a text in a remark

REFUSALS = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError)
"""What code of a template raises, by itself or for messages that it does not take."""

RESERVED = ("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize",
    "chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict")  # fmt: skip
"""Names that are no variables of a chat template: how it is rendered, and what."""

TRIMMED = "white space at the ends of a completion cut by the chat template"
OPENED = "rendered prompt already begins the completion"
OTHER_PROMPT = "chat template renders the prompt differently beside the completion"
PREFILLED = "prompt ends in the assistant's words, and the completion goes on with them"
DATED = "chat template writes today's date into the prompt: "
REOPENED = (
    "the chat template begins another answer behind each answer: in the model's chat template, what opens an answer"
    " belongs between {% if add_generation_prompt %} and {% endif %}"
)


@dataclass(frozen=True)
class Rendered:
    """A completion behind its rendered prompt.

    Attributes:
        text: what the chat template makes of it, with the end of the turn.
        written: its own text with the end of the turn, as far as the prompt does not begin it already.
        rewritten: what the template does to its text; None where it leaves the text as it is.
        notes: remarks for the report.
    """

    text: str
    written: str
    rewritten: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template with the variables that it is given.

    Attributes:
        kwargs: variables of the template (`data.chat_template_kwargs`), such as `enable_thinking`.
    """

    tokenizer: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def require(self, where: str) -> None:
        """Raise a UserError where there is no chat template, or it knows nothing of a variable.

        Args:
            where: what is to be rendered, for the error.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where} is to go through a chat template, and the tokenizer at '{self.tokenizer.name_or_path}' has"
                " none. Give a tokenizer with a chat template (chat_template.jinja beside it), or write prompts and"
                " completions as plain strings without a system prompt and tools, and leave data.template at auto."
            )
        for name in self.kwargs:
            if name in RESERVED:
                raise UserError(f"data.chat_template_kwargs: {name} is no variable of a chat template: leave it out.")
            if not self._knows(name):
                raise UserError(
                    f"data.chat_template_kwargs: the chat template of '{self.tokenizer.name_or_path}' has no variable"
                    f" {name}. Leave it out, or spell it as the template does."
                )

    def prompt(self, messages: Messages, parts: Parts) -> str:
        """The prompt that a completion follows: with the header of the answer, or open where its last words are the
        assistant's.

        Args:
            parts: whose tools and variables are given to the template.

        Raises:
            BadRow: the template refuses the messages, or leaves out what they say.
        """
        if not any((message.get("content") or "").strip() or message.get("tool_calls") for message in messages):
            raise BadRow("empty prompt")
        for name in parts.template_kwargs or ():
            if name in RESERVED or not self._knows(name):
                raise BadRow(f"the chat template has no variable {name} (chat_template_kwargs)")
        if parts.tools and not self._knows("tools"):
            raise BadRow("the chat template has no place for tools (data.columns: {tools: null} leaves them out)")
        how = "continue_final_message" if is_prefilled(messages) else "add_generation_prompt"
        try:
            text = self.render(messages, parts, **{how: True})
        except BadRow as reason:
            raise BadRow(f"{reason}{self._without_system(messages, parts)}") from None
        check_said(messages, text)
        check_tools(parts.tools or (), text)
        return text

    def _without_system(self, messages: Messages, parts: Parts) -> str:
        """A way out, where a template refuses messages for their system prompt alone; "" elsewhere."""
        try:
            self.render(messages[1:] if messages[0]["role"] in ("system", "developer") else [], parts)
        except BadRow:
            return ""
        return " (write the system prompt into the user's message; data.columns: {system: null} leaves a column out)"

    def completion(self, messages: Messages, prompt: str, completion: dict[str, Any], parts: Parts) -> Rendered:
        """A completion as it follows a prompt of `prompt`.

        Raises:
            BadRow: the template refuses the conversation, or nothing tells where the completion stands.
        """
        if self._reopens:
            raise BadRow(REOPENED)
        own = completion.get("content") or ""
        before, first = (messages[:-1], messages[-1]["content"]) if is_prefilled(messages) else (messages, "")
        prefilled = (PREFILLED,) * bool(first)
        full = self.render([*before, {**completion, "content": first + own}] if first else [*before, completion], parts)
        plain = not (completion.keys() & {"name", "tool_calls", *REASONING})
        if plain and full.startswith(prompt) and full[len(prompt) :] == own + self.usual_end:
            return Rendered(own + self.usual_end, own + self.usual_end, notes=prefilled)
        head, end = self._around(before, completion, first, parts)
        header = self._header(messages, prompt, parts)
        begun = _begun(header, own)
        gap = head[len(prompt) :] if head is not None and head.startswith(prompt) else ""
        written = gap * gap.isspace() + own[len(begun) :] + end
        if full.startswith(prompt):
            text, other = full[len(prompt) :], None
        elif head is not None and full.startswith(head) and header and head.endswith(header):
            text, other = full[len(head) :], OTHER_PROMPT
        else:
            return self._misplaced(full, head, end, own, written, header or prompt[-SHOWN // 4 :])
        body = text.removesuffix(end)
        notes = (*prefilled, *((other,) if other else ()))
        if not plain:
            lack = missing(completion, header, body)
            return Rendered(text, text, self._left_out(lack) if lack else None, notes)
        if body.strip() == own.strip():
            return Rendered(text, written, notes=notes if own in body else (*notes, TRIMMED))
        if begun and body.strip() == own[len(begun) :].strip():
            return Rendered(text, written, notes=(*notes, OPENED))
        return Rendered(text, written, _change(own, body), notes)

    def _misplaced(self, full: str, head: str | None, end: str, own: str, written: str, header: str) -> Rendered:
        """A completion that does not follow the prompt as it is generated from."""
        behind = f"{own!r:.{SHOWN}} put behind {header!r:.{SHOWN}}"
        if head is None or not full.startswith(head):
            return Rendered(written, written, behind)
        text = full[len(head) :]
        body = text.removesuffix(end)
        return Rendered(text, written, behind if body.strip() == own.strip() else _change(own, body))

    def render(self, messages: Messages, parts: Parts, **how: bool) -> str:
        """The messages through the template. Raises BadRow where it refuses them."""
        variables = {**self.kwargs, **(parts.template_kwargs or {}), **how}
        given = _as_parts(messages) if self._in_parts else messages
        try:
            try:
                return self._apply(given, tools=parts.tools, **variables)
            except TypeError:
                # Some templates, such as DeepSeek's, write a call's arguments as they are and take them as JSON.
                return self._apply(_with_json_arguments(given), tools=parts.tools, **variables)
        except REFUSALS as error:
            raise BadRow(f"the chat template refuses the messages: {error}") from None

    def _apply(self, messages: Messages, **variables: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **variables))

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template takes contents as lists of parts only, as those of models that see pictures do."""
        probe = [{"role": "user", "content": PROBE}]
        for messages, found in ((probe, False), (_as_parts(probe), True)):
            try:
                if PROBE in self._apply(messages, **self.kwargs):
                    return found
            except REFUSALS:
                continue
        return False

    def dated(self, prompt: str) -> str | None:
        """A remark where the template writes today's date into a prompt; None where it does not."""
        forms = ("%d %b %Y", *re.findall(r"strftime_now\(\s*['\"](.+?)['\"]", self._text))
        if "strftime_now" not in self._text or not any(time.strftime(form) in prompt for form in forms):
            return None
        if self._knows("date_string"):
            return f"{DATED}data.chat_template_kwargs={{date_string: ...}} fixes it"
        return f"{DATED}a date in place of strftime_now in the model's chat template fixes it"

    @cached_property
    def _text(self) -> str:
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def _knows(self, variable: str) -> bool:
        return re.search(rf"\b{re.escape(variable)}\b", self._text) is not None

    def _left_out(self, key: str) -> str:
        """What the template leaves out of a message; thoughts may be read under another key, which is named then."""
        what = "a tool call" if key == "tool_calls" else f"its {key}"
        read = [other for other in REASONING if self._knows(other)] if key in REASONING else []
        way = f" (the chat template reads {' or '.join(read)}: call it so in the rows)" if read else ""
        return f"{what} is left out{way}"

    def _around(self, before: Messages, completion: dict[str, Any], first: str, parts: Parts) -> tuple[str | None, str]:
        """What is rendered before a completion in its conversation (None: nothing tells), and the end after it."""
        try:
            probe = {"role": completion["role"], "content": first + PROBE}
            head, found, end = self.render([*before, probe], parts).rpartition(first + PROBE if first else PROBE)
        except BadRow:
            return None, self.usual_end
        return (head + first, end) if found else (None, self.usual_end)

    @cached_property
    def usual_end(self) -> str:
        """What follows the words of an answer, as far as a plain question tells."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        try:
            return self.render(turns, Parts("", ())).rpartition(PROBE)[2]
        except BadRow:
            return ""

    @cached_property
    def _reopens(self) -> bool:
        """Whether the template opens another answer behind an answer that ends a conversation, not inside of one."""
        ask, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        try:
            opened = self.render([{**ask, "content": PROBE}], Parts("", ())).rpartition(PROBE)[2]
            head, _, inside = self.render([ask, answer, ask], Parts("", ())).rpartition(PROBE)
        except BadRow:
            return False
        header = head.rpartition("?")[2]
        opens = bool(header.strip()) and opened.startswith(header) and self.usual_end.endswith(opened)
        return opens and not inside.startswith(self.usual_end)

    def _header(self, messages: Messages, prompt: str, parts: Parts) -> str:
        """What the prompt has after its messages: the header of the answer, and what else opens the answer."""
        if is_prefilled(messages):
            return messages[-1]["content"].rstrip()
        try:
            bare = self.render(messages, parts, add_generation_prompt=False)
        except BadRow:
            return ""
        return prompt.removeprefix(bare) if prompt.startswith(bare) else ""


def is_prefilled(messages: Messages) -> bool:
    """Whether a prompt ends in words of the assistant, which the completion is to go on with."""
    last = messages[-1]
    return last["role"] == "assistant" and bool((last.get("content") or "").strip()) and not last.get("tool_calls")


def _as_parts(messages: Messages) -> Messages:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _with_json_arguments(messages: Messages) -> Messages:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": written(call["function"])}
        arguments = call.get("arguments")
        text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict | list) else arguments
        return {**call, "arguments": text}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def as_messages(text: Text, role: str) -> Messages:
    """A string as one message."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _begun(header: str, own: str) -> str:
    """The beginning of a completion with which its header already ends, such as an opened thought; "" for none."""
    for size in range(min(len(header), len(own)), 0, -1):
        if header.endswith(own[:size]):
            return own[:size] if own[:size].strip() else ""
    return ""


def _change(own: str, body: str) -> str:
    return f"{own!r:.{SHOWN}} rendered as {body!r:.{SHOWN}}"

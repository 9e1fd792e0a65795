"""Prompts and completions become token ids: rendered by one template, tokenised, BOS and EOS where they belong.

`encode_prompt` is what generation sends to a model; training makes the very same ids of the same prompt. Loads neither
torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from otpo.data.chat import SHOWN, Chat, Rendered, as_messages
from otpo.data.report import DataReport
from otpo.data.rows import BadRow, Example, Messages, Parts, Text, content, sides
from otpo.data.template import Rendering, Template, template_of
from otpo.errors import UserError

Encoded = tuple[Example, list[int], list[list[int]]]
"""An example, the ids of its prompt, the ids of each of its completions."""

_Split = tuple[Example, bool, list[str], list[int], list[int], list[list[int]]]
# an example, whether it is chat, its texts, the ids of its prompt, those of the prompt's end, those of each completion

MERGED_BOUNDARY = "tokens merge across the end of the prompt: completion tokenised alone"
REWRITTEN = "completion rewritten by the chat template"
RETOKENIZED = "completion changed by the tokenizer: its ids stand for another text"
SPECIAL_INSIDE = "text of a special token inside a message, read as that token"

REWRITES = ("refuse", "drop", "template", "text")
"""Values of `data.rewritten`."""


def encode_prompt(
    tokenizer: Any,
    prompt: Text,
    template: Rendering | Template,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt to be answered, exactly as training makes them: never two BOS, never an EOS.

    Args:
        tokenizer: of transformers. prompt: a string, or messages for the chat template; where the last of them is the
            assistant's, it is to be continued.
        template: how it is rendered; a template's name alone gives the chat template no variables.
        tools: JSON schemas of functions. template_kwargs: the prompt's own variables of the chat template.

    Raises:
        UserError: messages with a literal template, no chat template where one is needed, or one that refuses the
            messages.
    """
    rendering = Rendering.of(template)
    template_of(rendering.template, (prompt,), "the prompt")
    if rendering.template == "literal":
        return _begin(tokenizer, _ids(tokenizer, [str(prompt)])[0], _added_bos(tokenizer))
    chat = Chat(tokenizer, rendering.chat_template_kwargs)
    chat.require("the prompt")
    parts = Parts(prompt, (), tools=tools, template_kwargs=template_kwargs)
    try:
        return _ids(tokenizer, [chat.prompt(as_messages(prompt, "user"), parts)])[0]
    except BadRow as reason:
        raise UserError(
            f"expected a prompt that the chat template takes, found {str(prompt)!r:.200}: {reason}"
        ) from None


@dataclass
class Encoder:
    """Turns examples into token ids and notes in the report what is out of the ordinary.

    Attributes:
        template: a value of `data.template`. applied: the templates that examples went through.
        chat_template_kwargs: variables of the chat template.
        rewritten: what becomes of completions that the chat template rewrites. "refuse": `check` raises; "drop" leaves
            the rows out; "template" trains what it makes of them; "text" trains them as written.
    """

    tokenizer: Any
    template: str
    report: DataReport
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rewritten: str = "refuse"
    applied: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.eos = _eos_id(self.tokenizer)
        self.bos: int | None = self.tokenizer.bos_token_id
        self.added_bos = _added_bos(self.tokenizer)
        self.chat = Chat(self.tokenizer, self.chat_template_kwargs)

    @cached_property
    def special(self) -> dict[int, str]:
        """Special tokens: id -> text."""
        added = self.tokenizer.added_tokens_decoder
        return {number: token.content for number, token in added.items() if token.special}

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids of examples; those that the chat template refuses are counted in the report and left out.

        Raises:
            UserError: an example that goes through the chat template, and the tokenizer has none.
        """
        rendered: list[tuple[Example, bool, list[str]]] = []
        for example in examples:
            texts: list[Any] = [example.prompt, *example.completions]
            where = f"{self.report.source}: row {example.row}"
            chat = template_of(self.template, texts, where) == "chat"
            try:
                texts_of = self._render(example, where) if chat else texts
                _check_unicode(texts_of)
                rendered.append((example, chat, texts_of))
            except BadRow as reason:
                self.report.problems.setdefault(str(reason), []).append(example.row)
                continue
            self.applied.add("chat" if chat else "literal")
            if any(self._specials.search(content(text)) for text in texts):
                self._note(SPECIAL_INSIDE, example)
        prompts = _ids(self.tokenizer, [texts[0] for _, _, texts in rendered])
        tails = [self._tail(texts[0], ids) for (_, _, texts), ids in zip(rendered, prompts, strict=True)]
        joined = _ids(
            self.tokenizer,
            [tail + text for (_, _, texts), (tail, _) in zip(rendered, tails, strict=True) for text in texts[1:]],
        )
        each = iter(joined)
        found = []
        for (example, chat, texts), ids, (_, tail_ids) in zip(rendered, prompts, tails, strict=True):
            completions = [self._cut(next(each), tail_ids, text, example) for text in texts[1:]]
            found.append((example, chat, texts, ids, tail_ids, completions))
        changed = self._changed(found)
        return [self._ended(*parts) for parts in found if parts[0].row not in changed]

    def check(self) -> None:
        """Raise a UserError for rewritten completions that are to be refused, and for variables of no template."""
        if self.chat_template_kwargs and self.applied == {"literal"}:
            raise UserError(
                f"{self.report.source}: data.chat_template_kwargs belong to a chat template, and the rows are strings"
                " that are taken literally. Set data.template=chat, or leave data.chat_template_kwargs empty ({})."
            )
        if self.rewritten != "refuse":
            return
        if rows := self.report.notes.get(RETOKENIZED):
            raise UserError(
                f"{self.report.source}: the tokenizer changes the completions of {len(rows):,} of"
                f" {self.report.n_groups:,} rows, so that their ids stand for another text:"
                f" {self.report.shown[RETOKENIZED]}. Set data.rewritten to template or text (trains these ids all the"
                " same) or to drop (leaves these rows out)."
            )
        if not (rows := self.report.notes.get(REWRITTEN)):
            return
        thinking = (
            " The template knows enable_thinking: data.chat_template_kwargs={enable_thinking: false} renders answers"
            " without thoughts."
        )
        raise UserError(
            f"{self.report.source}: the chat template rewrites the completions of {len(rows):,} of"
            f" {self.report.n_groups:,} rows, so that something else would be trained than is written:"
            f" {self.report.shown[REWRITTEN]}. Set data.rewritten to template (trains what the template makes of them),"
            " to text (trains them as written, behind the rendered prompt) or to drop (leaves these rows out)."
            f"{thinking * ('enable_thinking' in str(self.tokenizer.chat_template))}"
        )

    def _tail(self, prompt: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of the prompt that the completion's tokenisation can depend on: from its last special token.

        Tokenizers split text at special tokens first, so the tokens after one do not depend on what stands before.
        """
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in self.special:
                start = prompt.rfind(self.special[ids[index]])
                if start >= 0:
                    return prompt[start:], ids[index:]
        return prompt, ids

    def _render(self, example: Example, where: str) -> list[str]:
        """The prompt as the chat template renders it, then each completion as it follows the prompt."""
        self.chat.require(where)
        if not example.prompt:
            raise BadRow("empty prompt")
        messages = as_messages(example.prompt, "user")
        if self.rewritten in ("refuse", "drop"):
            self._check_unrendered(messages, example)
        prompt = self.chat.prompt(messages, example)
        if dated := self.chat.dated(prompt):
            self._note(dated, example)
        texts = [prompt]
        for side, completion in zip(sides(example.completions), example.completions, strict=True):
            (message,) = as_messages(completion, "assistant") or [{"role": "assistant", "content": ""}]
            rendered = self.chat.completion(messages, prompt, message, example)
            for note in rendered.notes:
                self._note(note, example)
            texts.append(self._text_of(rendered, side, example))
        return texts

    def _check_unrendered(self, messages: Messages, example: Example) -> None:
        """Raise BadRow for a prompt that begins as rendered ones do, or an answer with an end of turn of its own."""
        begin, end = self._markers
        own = (messages[0].get("content") or "").lstrip()
        if marker := next((marker for marker in begin if own.startswith(marker)), None):
            raise BadRow(f"the prompt is rendered already: it begins with {marker} (data.template=literal takes it so)")
        if end and any(content(text).rstrip().endswith(end) for text in example.completions):
            raise BadRow(f"a completion ends in {end} already, which the chat template puts after it")

    @cached_property
    def _markers(self) -> tuple[tuple[str, ...], str]:
        """The special tokens that a rendered question has, and that which ends an answer ("" for none)."""
        try:
            question = self.chat.render([{"role": "user", "content": "?"}], Parts("", ()))
        except BadRow:
            question = ""
        end = self.chat.usual_end.strip()
        special = [text for text in self.special.values() if len(text) > 1]
        return tuple(text for text in special if text in question), end if end in special else ""

    def _text_of(self, rendered: Rendered, side: str, example: Example) -> str:
        if rendered.rewritten is None:
            return rendered.text
        if self.rewritten == "drop":
            raise BadRow("the chat template rewrites a completion")
        self._note(REWRITTEN, example, f"row {example.row}, {side}: {rendered.rewritten}")
        return rendered.written if self.rewritten == "text" else rendered.text

    def _cut(self, ids: list[int], tail: list[int], text: str, example: Example) -> list[int]:
        """The ids of a completion out of those of the prompt's end and the completion."""
        if ids[: len(tail)] == tail:
            return ids[len(tail) :]
        self._note(MERGED_BOUNDARY, example)
        return _ids(self.tokenizer, [text])[0]

    def _changed(self, found: Sequence[_Split]) -> set[int]:
        """Note completions whose ids stand for another text, because the tokenizer normalises or does not know it.

        Returns:
            The rows to be left out for it.
        """
        out: set[int] = set()
        flat = [
            (example, text, tail, ids)
            for example, _, texts, _, tail, completions in found
            for text, ids in zip(texts[1:], completions, strict=True)
        ]
        if not flat:
            return out
        decoded = self.tokenizer.batch_decode([ids for *_, ids in flat], clean_up_tokenization_spaces=False)
        for (example, text, tail, ids), alone in zip(flat, decoded, strict=True):
            if alone == text:
                continue
            # Some decoders drop the space of a first piece, or put one beside special tokens.
            before, both = self.tokenizer.batch_decode([tail, tail + ids], clean_up_tokenization_spaces=False)
            after = both[len(before) :] if both.startswith(before) else alone
            if self._bare(text) in (self._bare(after), self._bare(alone)):
                continue
            if self.rewritten != "drop":
                self._note(RETOKENIZED, example, f"row {example.row}: {text!r:.{SHOWN}} is {alone!r:.{SHOWN}}")
            elif example.row not in out:
                out.add(example.row)
                self.report.problems.setdefault("the tokenizer changes a completion", []).append(example.row)
        return out

    def _bare(self, text: str) -> str:
        """A text without white space at its beginning and beside special tokens."""
        return self._beside_specials.sub(r"\1", text).strip()

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in self.special.values() if len(text) > 1) or r"(?!)")

    @cached_property
    def _beside_specials(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self._specials.pattern})\s*")

    def _ended(
        self, example: Example, chat: bool, texts: list[str], prompt: list[int], _: list[int], found: list[list[int]]
    ) -> Encoded:
        """The ids with their beginning and end."""
        completions = [self._end_turn(ids, example) if chat else self._end_text(ids) for ids in found]
        if not texts[0].strip():
            self._note("empty prompt", example)
        return example, prompt if chat else _begin(self.tokenizer, prompt, self.added_bos), completions

    def _end_text(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def _end_turn(self, ids: list[int], example: Example) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] not in self.special and self._is_space(ids[end - 1]):
            end -= 1
        if end and ids[end - 1] in self.special:
            return ids[:end]
        self._note("chat template ends the completion without a special token: EOS added", example)
        return [*ids, self.eos]

    def _is_space(self, token: int) -> bool:
        return str(self.tokenizer.decode([token])).isspace()

    def _note(self, remark: str, example: Example, shown: str | None = None) -> None:
        rows = self.report.notes.setdefault(remark, [])
        if rows[-1:] != [example.row]:
            rows.append(example.row)
        if shown is not None:
            self.report.shown.setdefault(remark, shown)


def _check_unicode(texts: Sequence[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise BadRow("half of a surrogate pair, which no text has") from None


# ---- what prompts of training and of generation share ----


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _added_bos(tokenizer: Any) -> int | None:
    """The BOS that the tokenizer puts before a text; None if it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _begin(tokenizer: Any, prompt: list[int], added_bos: int | None) -> list[int]:
    """A literal prompt with its BOS. An empty one becomes BOS, or EOS where there is no BOS: something must predict."""
    if added_bos is not None and prompt[:1] != [added_bos]:
        prompt = [added_bos, *prompt]
    return prompt or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer at '{tokenizer.name_or_path}' has no EOS token, so no completion could be taught to end:"
            " set `eos_token` in its tokenizer_config.json to the token that ends a completion"
        )
    return tokenizer.eos_token_id

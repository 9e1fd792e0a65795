"""Prompts and completions become token ids: rendered by one template, tokenised, BOS and EOS where they belong.

`encode_prompt` is what generation sends to a model; training makes the very same ids of the same prompt. Loads neither
torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from otpo.data.report import DataReport
from otpo.data.rows import BadRow, Example, Messages, Parts, Text
from otpo.data.template import Template, template_of
from otpo.errors import UserError

Encoded = tuple[Example, list[int], list[list[int]]]
"""An example, the ids of its prompt, the ids of each of its completions."""

MERGED_BOUNDARY = "tokens merge across the end of the prompt: completion tokenised alone"


def encode_prompt(tokenizer: Any, prompt: Text, template: Template) -> list[int]:
    """Token ids of a prompt to be answered, exactly as training makes them: never two BOS, never an EOS.

    Args:
        tokenizer: of transformers. prompt: a string, or messages for the chat template.

    Raises:
        UserError: messages with a literal template, no chat template where one is needed, or one that refuses the
            messages.
    """
    template_of(template, (prompt,), "the prompt")
    if template == "literal":
        return _begin(tokenizer, _ids(tokenizer, [str(prompt)])[0], _added_bos(tokenizer))
    _require_chat_template(tokenizer, "the prompt")
    try:
        return _ids(tokenizer, [_apply(tokenizer, _messages(prompt, "user"), add_generation_prompt=True)])[0]
    except BadRow as reason:
        raise UserError(
            f"expected a prompt that the chat template takes, found {str(prompt)!r:.200}: {reason}"
        ) from None


@dataclass
class Encoder:
    """Turns examples into token ids and notes in the report what is out of the ordinary.

    Attributes:
        template: a value of `data.template`. applied: the templates that examples went through.
    """

    tokenizer: Any
    template: str
    report: DataReport
    applied: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.eos = _eos_id(self.tokenizer)
        self.bos: int | None = self.tokenizer.bos_token_id
        self.added_bos = _added_bos(self.tokenizer)

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
                rendered.append((example, chat, self._render(example, where) if chat else texts))
            except BadRow as reason:
                self.report.problems.setdefault(str(reason), []).append(example.row)
                continue
            self.applied.add("chat" if chat else "literal")
        prompts = _ids(self.tokenizer, [texts[0] for _, _, texts in rendered])
        tails = [self._tail(texts[0], ids) for (_, _, texts), ids in zip(rendered, prompts, strict=True)]
        joined = _ids(
            self.tokenizer,
            [tail + text for (_, _, texts), (tail, _) in zip(rendered, tails, strict=True) for text in texts[1:]],
        )
        each = iter(joined)
        return [
            self._join(example, chat, texts, ids, tail_ids, [next(each) for _ in texts[1:]])
            for (example, chat, texts), ids, (_, tail_ids) in zip(rendered, prompts, tails, strict=True)
        ]

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
        _require_chat_template(self.tokenizer, where)
        if not example.prompt:
            raise BadRow("empty prompt")
        messages = _messages(example.prompt, "user")
        prompt = _apply(self.tokenizer, messages, example, add_generation_prompt=True)
        texts = [prompt]
        for completion in (_messages(text, "assistant") for text in example.completions):
            full = _apply(self.tokenizer, messages + completion, example, add_generation_prompt=False)
            if full.startswith(prompt):
                texts.append(full[len(prompt) :])
                continue
            # Some templates render earlier turns differently once a completion follows. Generation sees `prompt`.
            answer = (completion[0].get("content") or "").strip()
            _, found, end = full.rpartition(answer) if answer else ("", "", "")
            if not found:
                raise BadRow("the chat template changes the completion's text")
            self._note("chat template renders the prompt differently beside the completion", example)
            texts.append(found + end)
        return texts

    def _join(
        self,
        example: Example,
        chat: bool,
        texts: list[str],
        prompt: list[int],
        tail: list[int],
        joined: list[list[int]],
    ) -> Encoded:
        completions = []
        for text, ids in zip(texts[1:], joined, strict=True):
            if ids[: len(tail)] == tail:
                completion = ids[len(tail) :]
            else:
                completion = _ids(self.tokenizer, [text])[0]
                self._note(MERGED_BOUNDARY, example)
            completions.append(self._end_turn(completion, example) if chat else self._end_text(completion))
        if not texts[0]:
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

    def _note(self, remark: str, example: Example) -> None:
        rows = self.report.notes.setdefault(remark, [])
        if rows[-1:] != [example.row]:
            rows.append(example.row)


# ---- what prompts of training and of generation share ----


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _apply(tokenizer: Any, messages: Messages, parts: Parts | None = None, *, add_generation_prompt: bool) -> str:
    more = {} if parts is None else {"tools": parts.tools, **(parts.template_kwargs or {})}
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **more)
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise BadRow(f"the chat template refuses the messages: {error}") from None


def _messages(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _added_bos(tokenizer: Any) -> int | None:
    """The BOS that the tokenizer puts before a text; None if it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _begin(tokenizer: Any, prompt: list[int], added_bos: int | None) -> list[int]:
    """A literal prompt with its BOS. An empty one becomes BOS, or EOS where there is no BOS: something must predict."""
    if added_bos is not None and prompt[:1] != [added_bos]:
        prompt = [added_bos, *prompt]
    return prompt or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def _require_chat_template(tokenizer: Any, where: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} is to go through a chat template, and the tokenizer at '{tokenizer.name_or_path}' has none. Give"
            " a tokenizer with a chat template (chat_template.jinja beside it), or write prompts and completions as"
            " plain strings and leave data.template at auto."
        )


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer at '{tokenizer.name_or_path}' has no EOS token, so no completion could be taught to end:"
            " set `eos_token` in its tokenizer_config.json to the token that ends a completion"
        )
    return tokenizer.eos_token_id

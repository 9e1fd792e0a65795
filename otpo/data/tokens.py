"""Examples become token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from otpo.data.convert import convert
from otpo.data.report import DataReport, check_usable
from otpo.data.rows import BadRow, Example, Messages, Row, Text
from otpo.errors import UserError
from otpo.records import TokenCompletion, TokenPair

CHUNK = 2048  # examples handed to the tokenizer at a time: enough for its threads, little enough for memory


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a model folder or hub name.

    Raises:
        UserError: none there.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"expected a tokenizer (tokenizer.json, tokenizer_config.json) at {path}, found none that loads: "
            f"{reason:.300}. Save the tokenizer into the model's folder, or make both with `otpo fresh`."
        ) from error


def tokenize_pairs(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "keep_start",
    source: str = "rows",
) -> tuple[list[TokenPair], DataReport]:
    """Turn preference rows into token pairs, and report what became of each row.

    *Messages* go through the tokenizer's chat template once. The prompt is rendered with the generation prompt, so that
    the assistant's header is in the prompt and never in an answer; BOS is there only if the template puts it there. An
    answer ends in the template's end of turn (white space that a template puts after it is cut: it is never generated);
    where a template has none, EOS is added and noted.

    *Strings* are literal, TRL's convention: BOS if the tokenizer adds one, prompt, answer, EOS. With `template="chat"`
    they are wrapped as a user's message and an assistant's answer instead, or, of a transcript whose turns the format
    knows, each turn as a message.

    Prompt and prompt + answer are tokenised, and the answer is what follows the prompt's ids. Where the prompt's ids
    are no prefix (tokens merge across the boundary), the answer is tokenised alone: the prompt is always what the model
    sees when it generates. TRL cuts the prompt there instead. Such rows are noted. An empty literal prompt becomes BOS,
    or EOS where there is no BOS: a prompt always has a token that predicts the answer's first.

    Args:
        rows: as `otpo.data.load.load_rows` gives them.
        tokenizer: with an EOS token, and with a chat template if any row needs one.
        template: "auto" or "chat".
        max_length: tokens of prompt + answer; None: no limit.
        max_prompt_length: tokens of the prompt; None: no limit of its own.
        truncation: "keep_start" cuts a long prompt at its left (BOS is kept) and then the answers at their end. A cut
            answer loses its EOS, so that no false end is trained. A row whose prompt alone fills `max_length`, or whose
            answers are identical once cut, is left out. "drop" leaves out every row that is too long.
        source: what the report and errors call the rows.

    Raises:
        UserError: not pairs, no usable row, a setting that cannot be, or a tokenizer that lacks what is needed.
    """
    examples, report = convert(rows, source, pairs=True, template=template)
    encoded = _tokenize(examples, report, tokenizer, template, max_length, max_prompt_length, truncation)
    return [TokenPair(e.row, prompt, answers[0], answers[1]) for e, prompt, answers in encoded], report


def tokenize_completions(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "keep_start",
    source: str = "rows",
) -> tuple[list[TokenCompletion], DataReport]:
    """Turn `{prompt, completion}` rows, with or without `label`, into token ids; of preference rows the chosen answers.

    Everything else is as in `tokenize_pairs`.
    """
    examples, report = convert(rows, source, pairs=False, template=template)
    encoded = _tokenize(examples, report, tokenizer, template, max_length, max_prompt_length, truncation)
    return [TokenCompletion(e.row, prompt, answers[0], e.label) for e, prompt, answers in encoded], report


def tokenize_answers(
    prompts: Sequence[Text], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, template: str = "auto"
) -> list[TokenCompletion]:
    """Token ids of answers as `tokenize_pairs` reads them, to be scored: none is cut, and empty ones stay.

    Returns:
        An item an answer, in order; `row` is its number.

    Raises:
        UserError: a prompt that cannot be rendered.
    """
    report = DataReport("answers", "answers", "", n_rows=len(answers), n_groups=len(answers))
    encoder = _Encoder(tokenizer, template, report)
    examples = [
        Example(prompt, (answer,), row=i) for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    items: list[TokenCompletion] = []
    for start in range(0, len(examples), CHUNK):
        found = encoder.encode(examples[start : start + CHUNK])
        items += [TokenCompletion(example.row, prompt, ids[0]) for example, prompt, ids in found]
    for reason, rows in report.problems.items():
        raise UserError(f"expected prompts and answers that can be tokenised, found {reason} (answer {rows[0]})")
    return items


# ---- how ----

Encoded = tuple[Example, list[int], list[list[int]]]  # the example, its prompt's ids, each answer's ids


def _tokenize(
    examples: list[Example],
    report: DataReport,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int | None,
    max_prompt_length: int | None,
    truncation: str,
) -> list[Encoded]:
    if template not in ("auto", "chat"):
        raise UserError(f"data.template is 'auto' or 'chat', found {template!r}")
    if truncation not in ("keep_start", "drop"):
        raise UserError(f"data.truncation is 'keep_start' or 'drop', found {truncation!r}")
    for name, limit in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if limit is not None and limit < 2:
            raise UserError(f"data.{name} is a number of tokens of at least 2, found {limit}")
    encoder = _Encoder(tokenizer, template, report)
    kept: list[Encoded] = []
    lengths: list[list[int]] = []
    for start in range(0, len(examples), CHUNK):
        for example, prompt, answers in encoder.encode(examples[start : start + CHUNK]):
            lengths.append([len(prompt), *map(len, answers)])
            try:
                fitted = _fit(prompt, answers, max_length, max_prompt_length, truncation, encoder.bos, example, report)
            except BadRow as reason:
                report.problems.setdefault(str(reason), []).append(example.row)
            else:
                kept.append((example, *fitted))
    report.n_usable = len(kept)
    report.template = " and ".join(sorted(encoder.applied))
    check_usable(report)
    report.measure("tokens", lengths)
    return kept


def _fit(
    prompt: list[int],
    answers: list[list[int]],
    max_length: int | None,
    max_prompt_length: int | None,
    truncation: str,
    bos: int | None,
    example: Example,
    report: DataReport,
) -> tuple[list[int], list[list[int]]]:
    long_prompt = max_prompt_length is not None and len(prompt) > max_prompt_length
    long_answer = max_length is not None and len(prompt) + max(map(len, answers)) > max_length
    if truncation == "drop" and (long_prompt or long_answer):
        raise BadRow("longer than max_prompt_length" if long_prompt else "longer than max_length")
    cut_prompt = prompt
    if long_prompt and max_prompt_length is not None:
        head = [bos] if bos is not None and prompt[0] == bos else []
        cut_prompt = head + prompt[len(prompt) - max_prompt_length + len(head) :]
    if max_length is not None and len(cut_prompt) >= max_length:
        raise BadRow("prompt alone fills max_length")
    room = None if max_length is None else max_length - len(cut_prompt)
    cut = [answer[:room] for answer in answers]
    if len(cut) == 2 and cut[0] == cut[1]:
        raise BadRow("answers of identical tokens" if cut == answers else "answers identical once cut to max_length")
    if long_prompt:
        report.notes.setdefault("prompt cut at its left to max_prompt_length", []).append(example.row)
    sides = ("chosen", "rejected") if len(cut) == 2 else ("completion",)
    for side, before, after in zip(sides, answers, cut, strict=True):
        if len(after) < len(before):
            report.notes.setdefault(f"{side} answer cut to max_length, without EOS", []).append(example.row)
    return cut_prompt, cut


@dataclass
class _Encoder:
    """Renders and tokenises examples; notes in the report what is out of the ordinary."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    report: DataReport

    def __post_init__(self) -> None:
        self.eos = _eos_id(self.tokenizer)
        self.bos: int | None = self.tokenizer.bos_token_id
        self.adds_bos = self.bos is not None and self.tokenizer("a")["input_ids"][:1] == [self.bos]
        self.applied: set[str] = set()

    @cached_property
    def special(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder
        return {number: token.content for number, token in added.items() if token.special}

    def encode(self, examples: list[Example]) -> list[Encoded]:
        rendered: list[tuple[Example, bool, list[str]]] = []
        for example in examples:
            chat = self.template == "chat" or any(isinstance(t, list) for t in (example.prompt, *example.answers))
            try:
                texts = (
                    self._render_chat(example) if chat else [str(text) for text in (example.prompt, *example.answers)]
                )
            except BadRow as reason:
                self.report.problems.setdefault(str(reason), []).append(example.row)
                continue
            self.applied.add("chat" if chat else "literal")
            rendered.append((example, chat, texts))
        prompts = self._ids([texts[0] for _, _, texts in rendered])
        tails = [self._tail(texts[0], ids) for (_, _, texts), ids in zip(rendered, prompts, strict=True)]
        joined = self._ids(
            [tail + answer for (_, _, texts), (tail, _) in zip(rendered, tails, strict=True) for answer in texts[1:]]
        )
        each = iter(joined)
        return [
            self._join(example, chat, texts, ids, tail_ids, [next(each) for _ in texts[1:]])
            for (example, chat, texts), ids, (_, tail_ids) in zip(rendered, prompts, tails, strict=True)
        ]

    def _tail(self, prompt: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of the prompt that the answer's tokenisation can depend on: from its last special token.

        Tokenizers split text at special tokens first, so the tokens after one do not depend on what stands before.
        """
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] in self.special:
                start = prompt.rfind(self.special[ids[index]])
                if start >= 0:
                    return prompt[start:], ids[index:]
        return prompt, ids

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _render_chat(self, example: Example) -> list[str]:
        """The rendered prompt, then each answer as it follows it."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.report.source}: row {example.row} is to go through a chat template, and the tokenizer at "
                f"'{self.tokenizer.name_or_path}' has none. Give a tokenizer with a chat template (chat_template.jinja "
                "beside it), or rows whose prompt and answers are plain strings with data.template: auto."
            )
        if not example.prompt:
            raise BadRow("empty prompt")
        messages = _messages(example.prompt, "user")
        prompt = self._apply(messages, add_generation_prompt=True)
        texts = [prompt]
        for answer in (_messages(answer, "assistant") for answer in example.answers):
            full = self._apply(messages + answer, add_generation_prompt=False)
            if not full.startswith(prompt):
                # Some templates render earlier turns differently once there is an answer. Generation will see `prompt`.
                _, found, end = full.rpartition(answer[0]["content"].strip())
                if not found:
                    raise BadRow("the chat template changes the answer's text")
                self._note("chat template renders the prompt differently beside the answer", example)
                texts.append(found + end)
            else:
                texts.append(full[len(prompt) :])
        return texts

    def _apply(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise BadRow(f"the chat template refuses the messages: {error}") from None

    def _join(
        self,
        example: Example,
        chat: bool,
        texts: list[str],
        prompt: list[int],
        tail: list[int],
        joined: list[list[int]],
    ) -> Encoded:
        answers = []
        for text, ids in zip(texts[1:], joined, strict=True):
            if ids[: len(tail)] == tail:
                answer = ids[len(tail) :]
            else:
                answer = self._ids([text])[0]
                self._note("tokens merge across the end of the prompt: answer tokenised alone", example)
            answers.append(self._end_turn(answer, example) if chat else self._end_text(answer))
        if not chat and self.adds_bos and prompt[:1] != [self.bos]:
            prompt = [self.bos, *prompt]  # type: ignore[list-item]
        if not texts[0]:
            self._note("empty prompt", example)
            prompt = prompt or [self.eos if self.bos is None else self.bos]
        return example, prompt, answers

    def _end_text(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def _end_turn(self, ids: list[int], example: Example) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] not in self.special and self._is_space(ids[end - 1]):
            end -= 1
        if end and ids[end - 1] in self.special:
            return ids[:end]
        self._note("chat template ends the answer without a special token: EOS added", example)
        return [*ids, self.eos]

    def _is_space(self, token: int) -> bool:
        return str(self.tokenizer.decode([token])).isspace()

    def _note(self, remark: str, example: Example) -> None:
        rows = self.report.notes.setdefault(remark, [])
        if rows[-1:] != [example.row]:
            rows.append(example.row)


def _messages(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer at '{tokenizer.name_or_path}' has no EOS token, so no answer could be taught to end: set "
            "`eos_token` in its tokenizer_config.json to the token that ends an answer"
        )
    return tokenizer.eos_token_id

"""Rows become token pairs and token completions, with a report; long ones are cut or dropped."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from otpo.data.convert import read_examples
from otpo.data.encoder import REWRITES, REWRITTEN, Encoded, Encoder
from otpo.data.formats.reading import Columns
from otpo.data.report import DataReport, check_usable
from otpo.data.rows import BadRow, Example, Row, Text, sides
from otpo.data.template import of_rows
from otpo.errors import UserError, first_line
from otpo.records import TokenCompletion, TokenPair

SHOWN = 3  # tokens in a message
CHUNK = 256  # examples handed to the tokenizer at a time: enough for its threads, little enough for memory


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a model folder or hub name.

    Raises:
        UserError: none there.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"expected a tokenizer (tokenizer.json, tokenizer_config.json) at {path}, found none that loads: "
            f"{reason:.300}. Save the tokenizer into the model's folder, or make both with `otpo fresh`."
        ) from error


def check_same_tokens(where: str, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that is to read the token ids of another model's tokenizer and would take them for other tokens.

    Args:
        where: begins the message: what names the model.
        path: the model's folder or hub name.
        tokenizer: that the ids are of. The model's own may have more tokens.

    Raises:
        UserError: a token of `tokenizer` has another id there, or none; or the model has no tokenizer to compare.
    """
    theirs = load_tokenizer(path).get_vocab()
    apart = sorted((i, token) for token, i in tokenizer.get_vocab().items() if theirs.get(token) != i)
    if apart:
        shown = ", ".join(f"{token!r} is {i}, there {theirs.get(token, 'none')}" for i, token in apart[:SHOWN])
        raise UserError(
            f"{where}: {path} has another tokenizer than {tokenizer.name_or_path}: {len(apart)} tokens have other ids"
            f" ({shown}), so it would read other texts than the rows hold. Give a model of the same tokenizer."
        )


def tokenize_pairs(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "keep_start",
    columns: Columns | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    rewritten: str = "refuse",
    source: str = "rows",
) -> tuple[list[TokenPair], DataReport]:
    """Turn preference rows into token pairs, and report what became of each row.

    *Chat* rows (messages) go through the tokenizer's chat template once. The prompt is rendered with the generation
    prompt, so that the assistant's header is in the prompt and never in a completion; BOS is there only if the template
    puts it there. A completion ends in the template's end of turn (white space that a template puts after it is cut: it
    is never generated); where a template has none, EOS is added and noted.

    *Literal* rows (strings) follow TRL's convention: BOS if the tokenizer adds one, prompt, completion, EOS. With
    `template="chat"` strings are wrapped as a user's message and an assistant's completion instead; in a transcript
    whose turns the format knows, each turn becomes a message.

    Prompt and prompt + completion are tokenised, and the completion is what follows the prompt's ids. Where the
    prompt's ids are no prefix (tokens merge across the boundary), the completion is tokenised alone: the prompt is
    always what the model sees when it generates. TRL cuts the prompt there instead. Such rows are noted. An empty
    literal prompt becomes BOS, or EOS where there is no BOS: a prompt always has a token that predicts the completion's
    first.

    Args:
        rows: as `otpo.data.load.load_rows` gives them.
        tokenizer: with an EOS token, and with a chat template if any row needs one.
        template: "auto", "chat" or "literal"; see `otpo.data.template`.
        max_length: tokens of prompt + completion; None: no limit.
        max_prompt_length: tokens of the prompt; None: no limit of its own.
        truncation: "keep_start" cuts a long prompt at its left (BOS is kept) and then the completions at their end. A
            cut completion loses its EOS, so that no false end is trained. A row whose prompt alone fills `max_length`,
            or whose completions are identical once cut, is left out. "drop" leaves out every row that is too long.
        columns: `data.columns`: what a column is -> its name in the rows; a name -> None leaves the column out.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`.
        rewritten: what becomes of completions that the chat template rewrites, for example by taking thoughts out.
            "refuse" raises, once all are counted; "drop" leaves the rows out; "template" trains what the template makes
            of them; "text" trains them as written, behind the rendered prompt.
        source: what the report and errors call the rows.

    Raises:
        UserError: not pairs, no usable row, a setting that cannot be, rewritten completions that are to be refused, or
            a tokenizer that lacks what is needed.
    """
    items, report = read_tokens(rows, tokenizer, pairs=True, template=template, max_length=max_length,
        max_prompt_length=max_prompt_length, truncation=truncation, columns=columns,
        chat_template_kwargs=chat_template_kwargs, rewritten=rewritten, source=source)  # fmt: skip
    return [item for item in items if isinstance(item, TokenPair)], report


def tokenize_completions(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "keep_start",
    columns: Columns | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    rewritten: str = "refuse",
    source: str = "rows",
) -> tuple[list[TokenCompletion], DataReport]:
    """Turn `{prompt, completion}` rows, with or without `label`, into token ids; preference rows give the chosen one.

    Everything else is as in `tokenize_pairs`.
    """
    items, report = read_tokens(rows, tokenizer, pairs=False, template=template, max_length=max_length,
        max_prompt_length=max_prompt_length, truncation=truncation, columns=columns,
        chat_template_kwargs=chat_template_kwargs, rewritten=rewritten, source=source)  # fmt: skip
    return [item for item in items if isinstance(item, TokenCompletion)], report


def read_tokens(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: bool,
    good: bool = False,
    template: str = "auto",
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "keep_start",
    columns: Columns | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    rewritten: str = "refuse",
    source: str = "rows",
) -> tuple[Iterator[TokenPair | TokenCompletion], DataReport]:
    """As `tokenize_pairs` (or else `tokenize_completions`), for rows that are read as they are asked for.

    Args:
        rows: can be iterated over again.
        pairs: whether pairs are made of them.
        good: of single completions, take those alone that no label calls bad.

    Returns:
        The items, made in chunks of rows; and the report, which is whole once all items were read. Errors about single
        rows come while they are read.
    """
    if rewritten not in REWRITES:
        raise UserError(f"data.rewritten is one of {', '.join(REWRITES)}; found {rewritten!r}")
    examples, report = read_examples(rows, source, pairs=pairs, good=good, template=template, columns=columns)
    encoder = Encoder(tokenizer, template, report, chat_template_kwargs or {}, rewritten)
    encoded = _tokenize(examples, encoder, max_length, max_prompt_length, truncation)
    if pairs:
        return (TokenPair(e.row, prompt, chosen, rejected) for e, prompt, (chosen, rejected) in encoded), report
    return (TokenCompletion(e.row, prompt, completions[0], e.label) for e, prompt, completions in encoded), report


def tokenize_outputs(
    prompts: Sequence[Text],
    outputs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenCompletion]:
    """Token ids of outputs that a reward model scores, as in `tokenize_pairs`: none is cut, and empty ones stay.

    Outputs that the chat template rewrites are scored as it renders them, and a warning says so.

    Returns:
        An item for each output, in order; `row` is its number.

    Raises:
        UserError: a prompt that cannot be rendered.
    """
    report = DataReport("outputs", "outputs", "", n_rows=len(outputs), n_groups=len(outputs))
    encoder = Encoder(tokenizer, template, report, chat_template_kwargs or {}, "template")
    examples = [
        Example(prompt, (output,), row=i) for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    items: list[TokenCompletion] = []
    for start in range(0, len(examples), CHUNK):
        found = encoder.encode(examples[start : start + CHUNK])
        items += [TokenCompletion(example.row, prompt, ids[0]) for example, prompt, ids in found]
    for reason, rows in report.problems.items():
        raise UserError(f"expected prompts and outputs that can be tokenised, found {reason} (output {rows[0]})")
    if changed := report.notes.get(REWRITTEN):
        logging.getLogger(__name__).warning(
            "note: the chat template rewrites %d of %d outputs, which are scored as it renders them: %s",
            len(changed), len(outputs), report.shown[REWRITTEN],
        )  # fmt: skip
    return items


def _tokenize(
    examples: Iterator[Example],
    encoder: Encoder,
    max_length: int | None,
    max_prompt_length: int | None,
    truncation: str,
) -> Iterator[Encoded]:
    if truncation not in ("keep_start", "drop"):
        raise UserError(f"data.truncation is 'keep_start' or 'drop', found {truncation!r}")
    for name, limit in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if limit is not None and limit < 2:
            raise UserError(f"data.{name} is a number of tokens of at least 2, found {limit}")
    report = encoder.report
    first: tuple[Example, list[int], list[list[int]]] | None = None
    lengths, usable = array("q"), 0
    while chunk := list(islice(examples, CHUNK)):
        for example, prompt, completions in encoder.encode(chunk):
            lengths.extend([len(prompt), *map(len, completions)])
            try:
                fitted = _fit(
                    prompt, completions, max_length, max_prompt_length, truncation, encoder.bos, example, report
                )
            except BadRow as reason:
                report.problems.setdefault(str(reason), []).append(example.row)
            else:
                usable += 1
                first = first or (example, *fitted)
                yield example, *fitted
    report.n_usable = usable
    encoder.check()
    report.choose(of_rows(encoder.template, encoder.applied, encoder.chat_template_kwargs))
    check_usable(report)
    assert first is not None
    example, prompt, completions = first
    report.measure("tokens", np.frombuffer(lengths, np.int64).reshape(-1, 1 + len(completions)))
    report.show(encoder.tokenizer, {"prompt": prompt} | dict(zip(sides(example.completions), completions, strict=True)))


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    max_length: int | None,
    max_prompt_length: int | None,
    truncation: str,
    bos: int | None,
    example: Example,
    report: DataReport,
) -> tuple[list[int], list[list[int]]]:
    long_prompt = max_prompt_length is not None and len(prompt) > max_prompt_length
    long_row = max_length is not None and len(prompt) + max(map(len, completions)) > max_length
    if truncation == "drop" and (long_prompt or long_row):
        raise BadRow("longer than max_prompt_length" if long_prompt else "longer than max_length")
    cut_prompt = prompt
    if long_prompt and max_prompt_length is not None:
        head = [bos] if bos is not None and prompt[0] == bos else []
        cut_prompt = head + prompt[len(prompt) - max_prompt_length + len(head) :]
    if max_length is not None and len(cut_prompt) >= max_length:
        raise BadRow("prompt alone fills max_length")
    room = None if max_length is None else max_length - len(cut_prompt)
    cut = [completion[:room] for completion in completions]
    if len(cut) == 2 and cut[0] == cut[1]:
        raise BadRow(
            "completions of identical tokens" if cut == completions else "completions identical once cut to max_length"
        )
    if long_prompt:
        report.notes.setdefault("prompt cut at its left to max_prompt_length", []).append(example.row)
    for side, before, after in zip(sides(example.completions), completions, cut, strict=True):
        if len(after) < len(before):
            report.notes.setdefault(f"{side} cut to max_length, without EOS", []).append(example.row)
    return cut_prompt, cut

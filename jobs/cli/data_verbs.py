"""Verbs about data and a model to start from: data, fresh."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.cli.options import (
    ChatTemplateKwargs,
    Column,
    MaxLength,
    Out,
    Rewritten,
    Seed,
    Template,
    columns_of,
    kwargs_of,
)
from jobs.cli.terminal import one_of, say, show
from otpo.errors import UserError


def data(
    source: Annotated[str, typer.Argument(help="a JSON, JSONL, CSV or parquet file (also .gz), or a hub name")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="count tokens with this model's tokenizer too, and show one training example"),
    ] = None,
    template: Template = "auto",
    max_length: MaxLength = 1024,
    split: Annotated[str, typer.Option("--split", help="of a hub data set")] = "train",
    column: Column = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    rewritten: Rewritten = "refuse",
) -> None:
    """What a data file holds: format, template, lengths, how often the longer completion is chosen, unusable rows."""
    from otpo.data.convert import convert
    from otpo.data.load import load_rows

    setting = one_of("--template", template, "auto", "chat", "literal")
    rows = load_rows(source, split)
    columns, kwargs = columns_of(column), kwargs_of(chat_template_kwargs)
    _, report = convert(rows, source, template=setting, columns=columns)
    if model:
        from otpo.data.template import trained_kwargs, trained_with
        from otpo.data.tokens import load_tokenizer, tokenize_completions, tokenize_pairs

        tokenize: Any = tokenize_pairs if "chosen characters" in report.lengths else tokenize_completions
        given = trained_kwargs(model) if kwargs is None else kwargs
        try:
            _, report = tokenize(
                rows, load_tokenizer(model), template=setting, max_length=max_length, columns=columns,
                chat_template_kwargs=given, rewritten=rewritten, source=source,
            )  # fmt: skip
        except UserError:
            for line in report.lines():
                show(line)
            raise
        if (trained := trained_with(model)) not in (None, report.template):
            say(f"note: {model} was trained with the template {trained}, and these rows are rendered otherwise")
    for line in report.lines():
        show(line)


def fresh(
    source: Annotated[str, typer.Argument(help="a preference file whose texts the tokenizer is trained on")],
    out: Out,
    architecture: Annotated[str, typer.Option("--architecture", help="llama or qwen3")] = "llama",
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="most tokens of the vocabulary")] = 4096,
    hidden: Annotated[int, typer.Option("--hidden", help="width of the hidden states")] = 128,
    layers: Annotated[int, typer.Option("--layers", help="number of layers")] = 2,
    heads: Annotated[int, typer.Option("--heads", help="attention heads")] = 4,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="heads of keys and values")] = 2,
    seed: Seed = 0,
) -> None:
    """Make a tokenizer and a small random model from a preference file: a start for trials without a download."""
    from otpo.models.fresh import fresh as make

    make(
        source,
        out,
        vocab_size=vocab_size,
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        seed=seed,
    )
    show(f"Model and tokenizer: {out.absolute()}")

"""Verbs about data and a model to start from: data, fresh."""

from __future__ import annotations

from collections import deque
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
from jobs.cli.terminal import one_of, say, show, writable
from otpo.errors import UserError


def data(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="JSON, JSONL, CSV or parquet files (also .gz), hub names, or a recipe (.yaml), which stands for its"
            " data sets and how it reads them"
        ),
    ],
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
    """What data files hold. Format, template, lengths, how often the longer completion is chosen, unusable rows."""
    asked: dict[str, Any] = {
        "template": one_of("--template", template, "auto", "chat", "literal"), "max_length": max_length,
        "columns": columns_of(column), "chat_template_kwargs": kwargs_of(chat_template_kwargs), "rewritten": rewritten,
    }  # fmt: skip
    sets: list[tuple[str, dict[str, Any]]] = []
    for source in sources:
        recipe = source.endswith((".yaml", ".yml"))
        sets += _sets_of(source) if recipe else [(source, {"split": split} | asked)]
    for number, (source, how) in enumerate(sets):
        if number:
            show("")
        _say_what_is_in(source, model, **how)


def _sets_of(recipe: str) -> list[tuple[str, dict[str, Any]]]:
    """The data sets of a recipe, each with the settings that it is read with."""
    from pipeline.recipe import load_recipe

    data = load_recipe(recipe).data
    names = ("template", "max_length", "max_prompt_length", "truncation", "chat_template_kwargs", "rewritten")
    how = {name: getattr(data, name) for name in names}
    sets: list[Any] = [*data.datasets.values()] or [data]
    if not data.given:
        raise UserError(f"{recipe}: expected a recipe with data.path or data.datasets, found neither.")
    return [(str(each.path), how | {k: getattr(each, k) for k in ("split", "limit", "columns")}) for each in sets]


def _say_what_is_in(
    source: str,
    model: str | None,
    *,
    split: str,
    template: str,
    columns: dict[str, str | None],
    chat_template_kwargs: dict[str, Any] | None,
    limit: int | None = None,
    **how: Any,
) -> None:
    """Show the report of one data set, whose rows are read one after the other."""
    from otpo.data.convert import read_examples
    from otpo.data.load import open_rows

    rows = open_rows(source, split, limit)
    examples, report = read_examples(rows, source, template=template, columns=columns)
    deque(examples, maxlen=0)
    if model:
        from otpo.data.template import trained_kwargs, trained_with
        from otpo.data.tokens import load_tokenizer, read_tokens

        given = trained_kwargs(model) if chat_template_kwargs is None else chat_template_kwargs
        items, report = read_tokens(
            rows, load_tokenizer(model), pairs="chosen characters" in report.lengths, template=template,
            columns=columns, chat_template_kwargs=given, source=source, **how,
        )  # fmt: skip
        try:
            deque(items, maxlen=0)
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
    """Make a small random model and its tokenizer from a data file. A start for trials without a download."""
    from otpo.models.fresh import fresh as make

    writable(out.parent)
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

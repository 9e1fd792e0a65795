"""The verb that shows token weights: weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import ChatTemplateKwargs, Column, MaxLength, Rewritten, Template, columns_of, kwargs_of, local
from jobs.cli.terminal import one_of, say, show, writable
from otpo.errors import UserError


def weights(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    source: Annotated[str, typer.Argument(metavar="DATA", help="a preference file or hub name")],
    hyperparameters: Annotated[
        list[str] | None, typer.Argument(help="of the method, for example reg=0.1", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="FILE.html or FILE.json", callback=local)] = Path("weights.html"),
    method: Annotated[str, typer.Option("--method", help="whose weight rule; `otpo methods` lists them")] = "otpo",
    limit: Annotated[int, typer.Option("--limit", help="how many pairs")] = 16,
    template: Template = "auto",
    max_length: MaxLength = 1024,
    column: Column = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    rewritten: Rewritten = "refuse",
) -> None:
    """The weight of each token, and the transport plan."""
    from otpo.methods.spec import resolve
    from pipeline.recipe import apply_overrides

    spec = resolve(method, apply_overrides({}, hyperparameters or []))
    if out.suffix not in (".html", ".json"):
        raise UserError(f"--out {out}: expected a name that ends in .html (a page) or .json (rows for programs).")
    setting = one_of("--template", template, "auto", "chat", "literal")
    columns, kwargs = columns_of(column), kwargs_of(chat_template_kwargs)
    writable(out.parent)
    from otpo.data.load import load_rows
    from otpo.data.template import AS_TRAINED, as_trained, trained_kwargs
    from otpo.data.tokens import load_tokenizer, tokenize_pairs
    from otpo.explain import model_token_weights

    used = as_trained(setting, model)
    items, report = tokenize_pairs(
        load_rows(source, limit=limit),
        load_tokenizer(model),
        template=used,
        max_length=max_length,
        columns=columns,
        chat_template_kwargs=trained_kwargs(model) if kwargs is None else kwargs,
        rewritten=rewritten,
        source=source,
    )
    say(f"template  {report.choice if used == setting else replace(report.choice, why=AS_TRAINED)}")
    page = out.suffix == ".html"
    rows = model_token_weights(model, items, spec, plan=page, grid=page)
    if page:
        from eval.board.weights_page import build_weights_page

        build_weights_page(rows, out)
    else:
        out.write_text(json.dumps(rows, ensure_ascii=False))
    from eval.board.effective_tokens import pairs_sentence

    if sentence := pairs_sentence(rows):
        show(sentence)
    show(f"{len(rows)} pairs: {out.absolute()}")

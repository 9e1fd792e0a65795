"""A data file becomes the token ids that the workers read. Needs no Ray: wrong data is found before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.batches import save_tokens, split_validation, tokens_hash
from otpo.data import DataReport, read_rows
from otpo.tokens import load_tokenizer, pad_id, tokenize_completions, tokenize_pairs
from pipeline.config import Recipe


@dataclass(frozen=True)
class Tokens:
    """A data file as the workers read it."""

    train: str
    validation: str | None
    n_train: int
    pad_id: int
    hash: str
    report: DataReport


def prepare_tokens(recipe: Recipe, folder: Path, *, model: str, source: str, supervised: bool) -> Tokens:
    """Read, check and tokenise a data file; write it where all workers can map it.

    Raises:
        UserError: the file, the tokenizer or the rows cannot be used.
    """
    tokenizer = load_tokenizer(model)
    rows = read_rows(source, recipe.data.split)
    if recipe.data.limit and not supervised:
        rows = rows[: recipe.data.limit]
    tokenize = tokenize_completions if supervised else tokenize_pairs
    made, report = tokenize(
        rows, tokenizer, template=recipe.data.template, max_length=recipe.data.max_length,
        max_prompt_length=recipe.data.max_prompt_length, truncation=recipe.data.truncation, source=source,
    )  # fmt: skip
    items: list[Any] = list(made)
    key = tokens_hash(items)[:16]
    validation: list[Any] = []
    wanted = recipe.data.validation
    if wanted and not supervised:
        fraction, count = (wanted, None) if wanted < 1 else (None, int(wanted))
        items, validation = split_validation(list(items), fraction=fraction, count=count, seed=recipe.train.seed)
    target = folder / "data" / f"{key}-{recipe.train.seed}-{wanted}"
    save_tokens(target / "train.safetensors", items)
    if validation:
        save_tokens(target / "validation.safetensors", validation)
    (target / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
    return Tokens(
        train=str(target / "train.safetensors"),
        validation=str(target / "validation.safetensors") if validation else None,
        n_train=len(items),
        pad_id=pad_id(tokenizer),
        hash=key,
        report=report,
    )

"""A data file becomes the token ids that the workers read. Needs no Ray: wrong data is found before anything starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from otpo.data.formats import FORMATS, recognise
from otpo.data.load import load_rows
from otpo.data.report import DataReport
from otpo.data.rows import Row
from otpo.data.token_file import Item, save_tokens, tokens_hash
from otpo.data.tokens import load_tokenizer, tokenize_completions, tokenize_pairs
from otpo.data.unpaired import mismatched, split_pairs
from otpo.data.validation import split_validation
from otpo.errors import UserError
from otpo.methods.spec import MethodSpec
from otpo.models.reward_model import pad_token
from otpo.training.objectives.reward import margins_of, save_margins
from pipeline.recipe import Recipe
from pipeline.run.folder import RunFolder


@dataclass(frozen=True)
class Tokens:
    """A data file as the workers read it.

    Attributes:
        score_pad: what answers are padded with that a reward model scores.
        unpaired: of pairs, the same as labelled completions, if a method of the recipe needs these.
        margins: of pairs, the file of their margins, if a method of the recipe is a reward model and rows have one.
    """

    train: str
    validation: str | None
    n_train: int
    score_pad: int | None
    hash: str
    report: DataReport
    unpaired: Tokens | None = None
    margins: str | None = None

    def of(self, spec: MethodSpec) -> Tokens:
        """The rows as a method needs them.

        Raises:
            UserError: they were not made for such a method.
        """
        needed, labelled = spec.method.objective == "unpaired", bool(self.report.labels)
        if needed and not labelled and self.unpaired is not None:
            return self.unpaired
        if needed != labelled:
            raise UserError(
                f"methods.{spec.label}: {spec.method.title} needs {'labelled completions' if needed else 'pairs'}, and"
                f" {self.report.source} was prepared as {'labelled completions' if labelled else 'pairs'}: give such a"
                " method a label of its own in `methods`."
            )
        return self


def prepare_tokens(recipe: Recipe, folder: Path, *, model: str, source: str, supervised: bool) -> Tokens:
    """Read, check and tokenise a data file; write it where all workers can map it.

    Pairs and the completions that they are split into have the same prompts held out.

    Raises:
        UserError: the file, the tokenizer or the rows cannot be used, or not by the recipe's methods.
    """
    tokenizer = load_tokenizer(model)
    rows = load_rows(source, recipe.data.split)
    if recipe.data.limit and not supervised:
        rows = rows[: recipe.data.limit]
    unpaired = not supervised and _check_methods(recipe, rows, source)
    paired = not supervised and (not unpaired or FORMATS[recognise(rows)].pairs)
    tokenize = tokenize_pairs if paired else tokenize_completions
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

    def save(key: str, train: Sequence[Item], held: Sequence[Item]) -> Tokens:
        target = RunFolder(folder).tokens / f"{key}-{recipe.train.seed}-{wanted}"
        save_tokens(target / "train.safetensors", train)
        if held:
            save_tokens(target / "validation.safetensors", held)
        (target / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
        return Tokens(
            train=str(target / "train.safetensors"),
            validation=str(target / "validation.safetensors") if held else None,
            n_train=len(train),
            score_pad=pad_token(tokenizer),
            hash=key,
            report=report,
        )

    def save_pairs() -> Tokens:
        saved = save(key, items, validation)
        scored = any(recipe.trains_rewards(label) for label in recipe.methods)
        margins = margins_of(rows, [*items, *validation], source) if scored and paired else None
        if margins is None:
            return saved
        file = Path(saved.train).with_name("margins.safetensors")
        save_margins(file, margins)
        return replace(saved, margins=str(file))

    if not unpaired:
        return save_pairs()
    sides = [split_pairs(side) if paired else side for side in (items, validation)]
    train, held = (
        mismatched(side, seed=recipe.train.seed, max_length=recipe.data.max_length) if side else [] for side in sides
    )
    completions = save(tokens_hash([*train, *held])[:16], train, held)
    return replace(save_pairs(), unpaired=completions) if paired else completions


def _check_methods(recipe: Recipe, rows: Sequence[Row], source: str) -> bool:
    """Whether a method of the recipe needs labelled completions; a UserError if a method cannot take these rows."""
    names = {label: recipe.method(label).method for label in recipe.methods}
    unpaired = [label for label, method in names.items() if method.objective == "unpaired"]
    known = recognise(rows)
    if known == "unpaired" and len(unpaired) < len(names):
        label = next(label for label in names if label not in unpaired)
        raise UserError(
            f"methods.{label}: {names[label].title} needs preference pairs (columns prompt, chosen, rejected), but"
            f" {source} holds single labelled completions (columns {', '.join(FORMATS[known].columns)}). Train on them"
            " with `method: kto`, or give pairs."
        )
    for label in unpaired:
        title = names[label].title
        if known != "unpaired" and not FORMATS[known].pairs:
            raise UserError(
                f"methods.{label}: {title} needs completions with a label (columns prompt, completion, label) or"
                f" preference pairs, but {source} has the columns {', '.join(FORMATS[known].columns)}. Add `label`,"
                " true for good completions and false for bad ones."
            )
        if recipe.train_of(label).best_metric == "eval_rewards/accuracies":
            raise UserError(
                f"methods.{label}: {title} has no reward accuracy, which is a figure of pairs: set"
                f" methods.{label}.best_metric to eval_loss (with best_mode: min) or eval_rewards/margins."
            )
    return bool(unpaired)

"""A data file becomes the token ids that the workers read. Needs no Ray: wrong data is found before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from otpo.data.formats import FORMATS
from otpo.data.formats.reading import recognise
from otpo.data.load import load_rows
from otpo.data.report import DataReport
from otpo.data.rows import Row
from otpo.data.sampler import split_validation
from otpo.data.template import trained_kwargs
from otpo.data.token_file import Item, save_tokens, tokens_hash
from otpo.data.tokens import load_tokenizer, tokenize_completions, tokenize_pairs
from otpo.data.unpaired import mismatched, split_pairs
from otpo.errors import UserError
from otpo.files import write_json
from otpo.methods.spec import MethodSpec
from otpo.models.disk.reward_tokenizer import pad_token
from otpo.records import TokenCompletion
from otpo.training.objectives.reward import margins_of, save_margins
from pipeline.recipe import Recipe
from pipeline.run.folder import RunFolder


@dataclass(frozen=True)
class Tokens:
    """A data file as the workers read it.

    Attributes:
        train, validation: files of token ids (`otpo.data.token_file`).
        n_train: rows of `train`.
        score_pad: what pads completions that a reward model scores.
        hash: of the ids of all rows.
        unpaired: the same pairs as labelled completions, if a method of the recipe needs these.
        margins: the file of the pairs' margins, if a method of the recipe is a reward model and the rows have margins.
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

    Args:
        folder: of the run. model: whose tokenizer is used. source: the data file or hub name.
        supervised: for the base, which trains on all rows; otherwise for the recipe's methods.

    Raises:
        UserError: the file, the tokenizer or the rows cannot be used, or not by the recipe's methods.
    """
    tokenizer = load_tokenizer(model)
    rows = load_rows(source, recipe.data.split)
    if recipe.data.limit and not supervised:
        rows = rows[: recipe.data.limit]
    asked = recipe.data.chat_template_kwargs
    kwargs = trained_kwargs(model) if asked is None else asked
    columns = (recipe.base or {}).get("columns") if supervised else recipe.data.columns
    unpaired = not supervised and _check_methods(recipe, rows, source)
    paired = not supervised and (not unpaired or FORMATS[recognise(rows, columns)].pairs)
    tokenize: Any = tokenize_pairs if paired else tokenize_completions
    items, report = tokenize(
        rows, tokenizer, template=recipe.data.template, max_length=recipe.data.max_length,
        max_prompt_length=recipe.data.max_prompt_length, truncation=recipe.data.truncation, columns=columns,
        chat_template_kwargs=kwargs, rewritten=recipe.data.rewritten, source=source,
    )  # fmt: skip
    train, held = (items, []) if supervised else _hold_out(items, recipe)
    name = f"{recipe.train.seed}-{recipe.data.validation}"
    rewards = paired and any(recipe.trains_rewards(label) for label in recipe.methods)
    ends = {ids[-1] for pair in items for ids in (pair.chosen_ids, pair.rejected_ids)} if rewards else ()
    pad = pad_token(tokenizer, ends) if rewards else None
    save = partial(_save, RunFolder(folder).tokens, name=name, score_pad=pad, report=report)
    labelled = None
    if unpaired:
        sides = [_labelled(side, paired, recipe) for side in (train, held)]
        labelled = save(*sides, key=tokens_hash([*sides[0], *sides[1]])[:16])
        if not paired:
            return labelled
    saved = replace(save(train, held, key=tokens_hash(items)[:16]), unpaired=labelled)
    if not rewards:
        return saved
    margins = margins_of(rows, [*train, *held], source)
    if margins is None:
        return saved
    file = Path(saved.train).with_name("margins.safetensors")
    save_margins(file, margins)
    return replace(saved, margins=str(file))


def _hold_out(items: list[Any], recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """(training, validation) rows, as `data.validation` asks."""
    wanted = recipe.data.validation
    if not wanted:
        return items, []
    fraction, count = (wanted, None) if wanted < 1 else (None, int(wanted))
    return split_validation(items, fraction=fraction, count=count, seed=recipe.train.seed)


def _labelled(items: Sequence[Any], paired: bool, recipe: Recipe) -> list[TokenCompletion]:
    """Rows as labelled completions, each beside the completion of another prompt."""
    completions = split_pairs(items) if paired else items
    if not completions:
        return []
    return mismatched(completions, seed=recipe.train.seed, max_length=recipe.data.max_length)


def _save(
    folder: Path,
    train: Sequence[Item],
    held: Sequence[Item],
    *,
    key: str,
    name: str,
    score_pad: int | None,
    report: DataReport,
) -> Tokens:
    target = folder / f"{key}-{name}"
    save_tokens(target / "train.safetensors", train)
    if held:
        save_tokens(target / "validation.safetensors", held)
    write_json(target / "report.json", report.to_dict())
    return Tokens(
        train=str(target / "train.safetensors"),
        validation=str(target / "validation.safetensors") if held else None,
        n_train=len(train),
        score_pad=score_pad,
        hash=key,
        report=report,
    )


def _check_methods(recipe: Recipe, rows: Sequence[Row], source: str) -> bool:
    """Whether a method of the recipe needs labelled completions; a UserError if a method cannot take these rows."""
    names = {label: recipe.method(label).method for label in recipe.methods}
    unpaired = [label for label, method in names.items() if method.objective == "unpaired"]
    known = recognise(rows, recipe.data.columns)
    if FORMATS[known].labelled and len(unpaired) < len(names):
        label = next(label for label in names if label not in unpaired)
        raise UserError(
            f"methods.{label}: {names[label].title} needs preference pairs (columns prompt, chosen, rejected), but"
            f" {source} holds single labelled completions (columns {', '.join(FORMATS[known].columns)}). Train on them"
            " with `method: kto`, or give pairs."
        )
    for label in unpaired:
        title = names[label].title
        if not FORMATS[known].labelled and not FORMATS[known].pairs:
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

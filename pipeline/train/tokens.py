"""A data file becomes the token ids that the workers read. Needs no Ray: wrong data is found before anything starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from otpo.data.formats import FORMATS
from otpo.data.report import DataReport
from otpo.data.template import trained_kwargs
from otpo.data.token_file import load_tokens, save_tokens, tokens_hash
from otpo.data.tokens import load_tokenizer
from otpo.data.unpaired import SplitPairs, each_mismatched
from otpo.errors import UserError
from otpo.files import write_json
from otpo.methods.spec import MethodSpec
from otpo.models.disk.reward_tokenizer import check_template, pad_token
from otpo.training.objectives.reward import save_margins
from pipeline.progress import Progress, silent
from pipeline.recipe import Recipe
from pipeline.recipe.rows import DataSet, check_methods, open_sets
from pipeline.run.folder import RunFolder
from pipeline.train.data_sets import (
    SetRows,
    Tokenised,
    margins_of_sets,
    report_of,
    set_rows,
    tokenise_sets,
)

FILES = ("train.safetensors", "validation.safetensors")


@dataclass(frozen=True)
class Tokens:
    """The data as the workers read it.

    Attributes:
        train, validation: files of token ids (`otpo.data.token_file`).
        n_train: rows of `train`.
        score_pad: what pads completions that a reward model scores.
        hash: of the ids of all rows.
        unpaired: the same pairs as labelled completions, if a method of the recipe needs these.
        margins: the file of the pairs' margins, if a method of the recipe is a reward model and the rows have margins.
        sets: the data sets of a mix, in the order of the files; empty for a single one.
    """

    train: str
    validation: str | None
    n_train: int
    score_pad: int | None
    hash: str
    report: DataReport
    unpaired: Tokens | None = None
    margins: str | None = None
    sets: tuple[SetRows, ...] = ()

    @property
    def epoch(self) -> int:
        """Rows of an epoch."""
        return sum(each.taken for each in self.sets) or self.n_train

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


def prepare_tokens(
    recipe: Recipe,
    folder: Path,
    *,
    model: str,
    source: str | Mapping[str, str],
    supervised: bool,
    progress: Progress = silent,
) -> Tokens:
    """Read, check and tokenise data sets; write them where all workers can map them.

    Rows are read one after the other: memory holds a few numbers of each. Pairs and the completions that they are split
    into have the same prompts held out.

    Args:
        folder: of the run. model: whose tokenizer is used.
        source: the data file or hub name; of a mix, that of each of `data.datasets`.
        supervised: for the base, which trains on all rows; otherwise for the recipe's methods.

    Raises:
        UserError: a file, the tokenizer or the rows cannot be used, or not by the recipe's methods.
    """
    tokenizer = load_tokenizer(model)
    sets = open_sets(recipe, source, supervised=supervised)
    unpaired = not supervised and any([check_methods(recipe, each.format, each.source) for each in sets])
    paired = not supervised and (not unpaired or _all_pairs(sets))
    place = RunFolder(folder).tokens
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".") as name:
        asked = recipe.data.chat_template_kwargs
        found = tokenise_sets(
            recipe, sets, tokenizer, Path(name), pairs=paired, supervised=supervised,
            kwargs=trained_kwargs(model) if asked is None else asked, progress=progress,
        )  # fmt: skip
        mix = set_rows(recipe, sets, found)
        report = report_of(found, sets, recipe.data.template)
        rewards = paired and any(recipe.trains_rewards(label) for label in recipe.methods)
        if rewards:
            check_template(tokenizer, report.rendering)
        pad = pad_token(tokenizer, found.items.last_ids()) if rewards else None
        made = Tokens("", None, 0, pad, "", report, sets=mix)
        if unpaired:
            labelled = _labelled(found, Path(name), paired, recipe)
            halves = replace(made, sets=tuple(each.times(2) for each in mix) if paired else mix)
            halves = _publish(halves, labelled, place, recipe, tokens_hash(*map(load_tokens, labelled)))
            if not paired:
                return halves
            made = replace(made, unpaired=halves)
        files = [Path(name) / file for file in FILES[: 1 + found.held.any()]]
        for side, file in enumerate(files):
            save_tokens(file, found.side(held=bool(side)))
        saved = _publish(made, files, place, recipe, tokens_hash(found.items))
        margins = margins_of_sets(sets, found) if rewards else None
    if margins is None:
        return saved
    file = Path(saved.train).with_name("margins.safetensors")
    save_margins(file, margins)
    return replace(saved, margins=str(file))


def _all_pairs(sets: Sequence[DataSet]) -> bool:
    """Whether the data sets hold pairs.

    Raises:
        UserError: some do and others do not.
    """
    kinds = {FORMATS[each.format].pairs: each.name for each in sets}
    if len(kinds) == 2:
        raise UserError(
            f"data.datasets: '{kinds[True]}' holds preference pairs and '{kinds[False]}' labelled completions: expected"
            " a mix of one kind. Write the pairs as labelled completions too (columns prompt, completion, label), or"
            " train on the sets in separate runs."
        )
    return True in kinds


def _labelled(found: Tokenised, work: Path, paired: bool, recipe: Recipe) -> list[Path]:
    """Files of the sides' rows as labelled completions, each beside the completion of another prompt."""
    files = []
    for side, name in enumerate(FILES[: 1 + found.held.any()]):
        files.append(work / f"labelled-{name}")
        save_tokens(work / "plain.safetensors", found.side(held=bool(side)))
        plain: Any = load_tokens(work / "plain.safetensors")
        rows = SplitPairs(plain) if paired else plain
        save_tokens(files[-1], each_mismatched(rows, seed=recipe.train.seed, max_length=recipe.data.max_length))
    return files


def _publish(made: Tokens, files: Sequence[Path], place: Path, recipe: Recipe, identity: str) -> Tokens:
    """Move the files of the sides to the folder that their content names, with the report."""
    target = place / f"{identity[:16]}-{recipe.train.seed}-{recipe.data.validation}"
    target.mkdir(parents=True, exist_ok=True)
    for file, name in zip(files, FILES, strict=False):
        os.replace(file, target / name)
    reports = {each.name: each.report.to_dict() for each in made.sets}
    write_json(target / "report.json", made.report.to_dict() | ({"datasets": reports} if reports else {}))
    train, validation = (str(target / name) for name in FILES)
    return replace(
        made,
        train=train,
        validation=validation if len(files) > 1 else None,
        n_train=len(load_tokens(train)),
        hash=identity[:16],
    )

"""Keeps a leaderboard: models come and go, are judged and judged again, and all pages follow.

board.yaml says which models there are before anything is asked about them. So a command that is killed leaves a board
that the next one goes on with: what has no verdict yet is asked, what was paid for lies in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval import layout
from eval.board.run_files import text_of_rows
from eval.judge.check import check_each
from eval.judge.config import JudgeConfig
from eval.judge.offline.batch_files import BatchReplies
from eval.judge.panels.members import judge_label
from eval.judge.protocols.registry import protocol_label
from eval.judge.table import verdict_table
from eval.outputs.columns import OutputColumns
from eval.outputs.reading import OutputFile
from jobs.batching import Asked, Offline, read_batch, without_calls
from jobs.boards.kept import Kept, sha256_of
from jobs.boards.making import with_files
from jobs.boards.mixing import refuse_another, refuse_mixed, tell_mixed
from jobs.boards.pages import write_board
from jobs.boards.state import Model, State, differences, digest_of, now, write_state
from jobs.judging import ask, read_models, tell_missing, tell_panel
from jobs.rejudging import Judged, ask_again
from otpo.errors import UserError
from otpo.files import Row, write_atomically, write_json
from pipeline.judge.board import write_panel
from pipeline.progress import Progress

NO_TEXT = ("no_output", "no_reference")
"""Errors of verdicts that no judge can give."""


def add(
    kept: Kept, files: Sequence[str], config: JudgeConfig, *, replace: bool, offline: Offline, progress: Progress
) -> pd.DataFrame | list[str]:
    """Add models by files of their outputs, and ask about them. What is there already is left as it is.

    Args:
        files: of outputs, each a path or NAME=FILE, as `otpo judge` takes them.
        config: the board's judge, as it is to be asked now, and how files are read.
        replace: new outputs may take the place of a model's.
        offline: write the questions to a batch file, or only say what they would cost, and leave the board as it is;
            or take a batch's replies.

    Returns:
        The leaderboard, or what to say of a batch or a price.

    Raises:
        UserError: another judge, files that do not fit the board, outputs that differ from those that are there, or a
            judge that cannot be asked; nothing was changed.
        WorkError: not one verdict came back; the same command asks again.
    """
    state, reference = kept.state, kept.reference()
    refuse_another(kept, config)
    stored = OutputFile(layout.reference_file(kept.folder, state.task), reference, OutputColumns(), Counter())
    otherwise = (
        f"{kept.folder} holds one set of prompts: generate outputs for all of them, and, where a file holds several "
        "generators that are one model, name it (NAME=FILE); or make a board for other prompts (`otpo board init`)."
    )
    given, against, sources = read_models(files, stored, config, False, progress, otherwise)
    if state.models and against != reference:
        raise UserError(
            f"{', '.join(files)}: the outputs have an `input` beside the instruction, and the prompts of {kept.folder} "
            "have none: they were asked something else. Give outputs of the board's prompts, or make a board of their "
            "own with `otpo board init`."
        )
    texts = {name: text_of_rows(rows) for name, rows in given.items()}
    changed = {
        name for name in texts if name not in state.models or state.models[name].sha256 != sha256_of(texts[name])
    }
    if others := [name for name in changed if name in state.models and not replace]:
        raise _others(kept, others[0], given[others[0]], sources[others[0]])
    refuse_mixed(kept, config, renew=False)
    if offline.asks_nothing:
        outputs = kept.outputs() | given
        lacking = _lacking(kept.verdicts(outputs), outputs, len(against))
        return without_calls(offline, _asked(kept, config, lacking, against), progress)
    replies = _replies(offline, config, kept, progress)
    if changed and replies is None and not config.own_model:
        check_each(config, kept.folder / layout.STORE)
    for name in changed:
        write_atomically(kept.path(name), texts[name])
    models = {
        name: Model(file=str(sources[name]), sha256=sha256_of(texts[name]), outputs=len(given[name]), added=now())
        for name in texts
        if name in changed
    }
    source = state.reference
    if against != reference:  # the first models say what else the prompts hold
        path = layout.reference_file(kept.folder, state.task)
        write_atomically(path, text_of_rows(against))
        source = source.model_copy(update={"sha256": digest_of(path)})
    state = state.model_copy(update={"models": state.models | models, "reference": source})
    write_state(kept.folder, state)
    return refresh(Kept(kept.folder, state), config, replies=replies, progress=progress)


def update(
    kept: Kept, config: JudgeConfig, *, renew: bool, offline: Offline, progress: Progress
) -> pd.DataFrame | list[str]:
    """Ask for every verdict that is missing, and make the pages.

    Args:
        renew: where the judge's name came to answer as another model, ask that one about everything.
        offline: as `add` takes it.

    Raises:
        UserError: another judge, or one that cannot be asked. WorkError: not one verdict came back.
    """
    refuse_another(kept, config)
    refuse_mixed(kept, config, renew=renew)
    if offline.asks_nothing:
        outputs, reference = kept.outputs(), kept.reference()
        lacking = outputs if renew else _lacking(kept.verdicts(outputs), outputs, len(reference))
        return without_calls(offline, _asked(kept, config, lacking, reference), progress)
    return refresh(kept, config, replies=_replies(offline, config, kept, progress), progress=progress, renew=renew)


def remove(kept: Kept, names: Sequence[str]) -> tuple[State, list[str]]:
    """Take models, or imported files, off the board; what was paid for them stays in the store.

    Returns:
        The board as it is then, and the names that were there.

    Raises:
        UserError: a name that is neither; nothing was changed.
    """
    state = kept.state
    known = {*state.models, *state.imported}
    files = {each.file: name for name, each in state.imported.items()}
    if unknown := [name for name in names if name not in known and name not in files]:
        there = ", ".join([*state.models, *state.imported]) or "none"
        raise UserError(f"'{unknown[0]}' is neither a model nor an imported file of {kept.folder}. There are: {there}.")
    gone = {files.get(name, name) for name in names}
    left = {
        "models": {name: each for name, each in state.models.items() if name not in gone},
        "imported": {
            name: each for name, each in state.imported.items() if name not in gone and each.model not in gone
        },
    }
    state = state.model_copy(update=left)
    write_state(kept.folder, state)
    return state, sorted(gone)


def rejudge(
    kept: Kept, config: JudgeConfig, *, offline: Offline, progress: Progress
) -> tuple[pd.DataFrame | list[str], dict[str, Any] | None]:
    """Let another judge judge all of the board in the old one's place; the old one's replies stay in the store.

    Args:
        offline: as `add` takes it.

    Returns:
        The leaderboard, or what to say of a batch or a price; and the figures of migration.json, None where the old
        judge had given no verdict.

    Raises:
        UserError: the judge is the board's own, or cannot be asked. WorkError: not one verdict came back.
    """
    state, there = kept.state, kept.state.config(kept.folder)
    if not differences(there, config):
        raise UserError(
            f"{kept.folder} is judged by {judge_label(there)} in this way already: `otpo board update {kept.folder}` "
            "asks for what is missing."
        )
    outputs, reference = kept.outputs(), kept.reference()
    if offline.asks_nothing:
        return without_calls(offline, _asked(kept, config, outputs, reference), progress), None
    replies = _replies(offline, config, kept, progress)
    before, answered, found = kept.verdicts(outputs), None, None
    if before["preference"].notna().any():
        old = Judged(state.task, outputs, reference, state.reference.name, before, judge_label(there), state.protocol)
        judge, new, found = ask_again(
            old, config, kept.folder, progress=progress, template=state.template, replies=replies
        )
        answered = judge.members, new
        write_json(kept.folder / layout.MIGRATION, found)
    made, label = with_files(kept.folder, config), protocol_label(config.protocol)
    kept = Kept(kept.folder, state.model_copy(update={"judge": made, "protocol": label}))
    # killed from here on, the next command finds no verdict of the old judge, and the new one's in the store
    (kept.folder / layout.VERDICTS).unlink(missing_ok=True)
    write_state(kept.folder, kept.state)
    if answered is None:
        return refresh(kept, config, replies=replies, progress=progress), found
    members, new = answered
    return _write(kept, config, outputs, reference, new, new, members, progress), found


def refresh(
    kept: Kept, config: JudgeConfig, *, replies: BatchReplies | None, progress: Progress, renew: bool = False
) -> pd.DataFrame:
    """Ask about every model that lacks a verdict, and write the board.

    Args:
        replies: of a batch, which answer in place of the endpoint.
        renew: ask about all; what the store has under the judge's present identity is not paid again.
    """
    outputs, reference = kept.outputs(), kept.reference()
    found = kept.verdicts(outputs)
    todo = outputs if renew else _lacking(found, outputs, len(reference))
    known = found[~found["generator"].isin(todo)]
    members = {name: [own] if len(own) else [] for name, own in kept.members(config, known).items()}
    if config.panel and not members:  # what each judge said is gone from the folder: the store has it
        todo, known = outputs, known.head(0)
    new = verdict_table([])
    if todo:
        asked = _asked(kept, config, todo, reference)
        judge, new = ask(asked, progress=progress, template=kept.state.template, replies=replies)
        members = {name: [*members.get(name, []), *own] for name, own in judge.members.items()}
    verdicts = _in_order([known, new], list(outputs))
    return _write(kept, config, outputs, reference, verdicts, new, members, progress)


def build(kept: Kept, progress: Progress) -> pd.DataFrame:
    """Make leaderboard and pages of the verdicts that are there, and ask nothing."""
    folder, state, config = kept.folder, kept.state, kept.state.config(kept.folder)
    outputs, reference = kept.outputs(), kept.reference()
    found = kept.verdicts(outputs)
    if unjudged := [name for name in outputs if name not in set(found["generator"])]:
        said = f"{', '.join(unjudged)}: not judged yet. `otpo board update {folder}` asks about them."
        progress(str(folder), 0, 0, said)
    judged = {name: rows for name, rows in outputs.items() if name not in unjudged}
    verdicts = _in_order([found], list(judged))
    members = kept.members(config, verdicts)
    if members and len(verdicts):
        write_panel(folder, {name: [own] for name, own in members.items()}, verdicts)
    return write_board(folder, state, config, verdicts, judged, reference)


def _lacking(found: pd.DataFrame, outputs: Mapping[str, list[Row]], prompts: int) -> dict[str, list[Row]]:
    """The models that lack a verdict which a judge can give."""
    whole = {
        name
        for name, own in found.groupby("generator")
        if own["index"].nunique() == prompts and (own["preference"].notna() | own["error"].isin(NO_TEXT)).all()
    }
    return {name: rows for name, rows in outputs.items() if name not in whole}


def _asked(kept: Kept, config: JudgeConfig, outputs: Mapping[str, list[Row]], reference: list[Row]) -> Asked:
    return Asked(outputs, reference, config, kept.folder, kept.state.task, kept.state.reference.name)


def _replies(offline: Offline, config: JudgeConfig, kept: Kept, progress: Progress) -> BatchReplies | None:
    return read_batch(offline.read, config, kept.folder, progress) if offline.read else None


def _write(
    kept: Kept,
    config: JudgeConfig,
    outputs: Mapping[str, list[Row]],
    reference: list[Row],
    verdicts: pd.DataFrame,
    new: pd.DataFrame,
    members: Mapping[str, list[pd.DataFrame]],
    progress: Progress,
) -> pd.DataFrame:
    """Write the board that some new verdicts make, and say what they lack.

    Args:
        verdicts: all, the new ones among them.
        members: judge of a panel -> its verdicts.
    """
    if members and len(verdicts):
        tell_panel(kept.folder, members, verdicts, config, progress)
    board = write_board(kept.folder, kept.state, config, verdicts, outputs, reference)
    if len(new):
        tell_missing(new, config, kept.folder, progress)
        tell_mixed(kept, config, verdicts, progress)
    return board


def _others(kept: Kept, name: str, rows: list[Row], source: Path) -> UserError:
    there = kept.rows(name)
    before = {(row["instruction"], row["output"]) for row in there}
    differ = sum((row["instruction"], row["output"]) not in before for row in rows)
    how = f"{differ} of {len(rows)} outputs differ" if differ else "they differ in other columns than the output"
    return UserError(
        f"{kept.folder} has a model '{name}' with outputs of {kept.state.models[name].file}, and {source} holds others "
        f"({how}). --replace takes them in its place; NEW_NAME={source} adds them as another model."
    )


def _in_order(frames: Sequence[pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """All verdicts, model by model, in the order in which the models came."""
    there = pd.concat([frame for frame in frames if len(frame)] or [verdict_table([])], ignore_index=True)
    place = there["generator"].map({name: n for n, name in enumerate(names)})
    return there.iloc[place.argsort(kind="stable")].reset_index(drop=True)

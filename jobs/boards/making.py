"""A new kept leaderboard: its folder takes over the reference, and a protocol or calibration of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from eval import layout
from eval.board.run_files import text_of_rows, write_outputs
from eval.judge.config import JudgeConfig
from eval.judge.protocols.files import is_file
from eval.judge.protocols.registry import find_protocol, protocol_label
from eval.outputs.columns import check_used
from eval.outputs.reading import read_outputs, whole_text
from eval.stats.length_control import load_calibration
from jobs.boards.state import FILE, Reference, State, differences, digest_of, read_state, write_state
from otpo.errors import UserError
from otpo.files import write_atomically
from pipeline.progress import Progress

PROTOCOL, CALIBRATION = "protocol", "calibration"
_OF_ANOTHER = (layout.LEADERBOARD, layout.VERDICTS, layout.MODELS, layout.RECIPE, layout.MANIFEST, layout.AGREEMENT)


def init(
    folder: Path, reference: Path, config: JudgeConfig, *, task: str, template: str, progress: Progress
) -> tuple[State, bool]:
    """Make a leaderboard without models. Where it is there already, keep how its judge is asked from now on.

    Args:
        folder: new or empty, or that of the same board.
        reference: outputs that all models are compared with.
        config: the judge, with the columns of the reference.
        task: its name on the board.
        template: how a reward model sees prompts.

    Returns:
        The board, and whether it is new.

    Raises:
        UserError: files that cannot be read, a folder that holds something else, or a board that is judged otherwise.
    """
    theirs = read_outputs(reference, config.columns, reference=True, count_missing=config.count_missing)
    check_used(config.columns, [theirs.columns])
    for remark in theirs.said:
        progress(str(reference), 0, 0, remark)
    task = whole_text(task)
    if config.protocol != "reward":
        find_protocol(config.protocol)
    if config.calibration:
        load_calibration(Path(config.calibration))
    if (folder / FILE).exists():
        state = read_state(folder)
        _same(folder, state, config, task, text_of_rows(theirs.rows))
    elif there := [name for name in _OF_ANOTHER if (folder / name).exists()]:
        raise UserError(
            f"{folder} holds a run, or what `otpo judge` wrote ({', '.join(there)}): name a new folder. What its judge "
            f"was paid for is kept if {layout.STORE} is copied there first."
        )
    else:
        state = None
    kept = with_files(folder, config)
    if state is None:
        write_outputs(folder, task, {}, theirs.rows)
        path = layout.reference_file(folder, task)
        by = str(theirs.rows[0].get("generator") or "reference")
        source = Reference(name=by, file=str(reference), sha256=digest_of(path), prompts=len(theirs.rows))
        label = protocol_label(config.protocol)
        made = State(task=task, judge=kept, protocol=label, template=template, reference=source)
    else:
        made = state.model_copy(update={"judge": kept})
    write_state(folder, made)
    return made, state is None


def _same(folder: Path, state: State, config: JudgeConfig, task: str, rows: str) -> None:
    """Refuse to make another board of one that is there."""
    found = differences(state.config(folder), config)
    if task != state.task:
        found.append(f"the task is {state.task} on the board, and {task} is asked for")
    if rows != layout.reference_file(folder, state.task).read_text("utf-8"):
        found.append(f"the reference is {state.reference.name} of {state.reference.file}, and another one is given")
    if found:
        raise UserError(
            f"{folder} is a leaderboard already, and is not judged as you ask: {'; '.join(found)}. Make this one in "
            f"another folder, or let another judge judge all of it: `otpo board rejudge {folder}`."
        )


def with_files(folder: Path, config: JudgeConfig) -> JudgeConfig:
    """The judge's settings with a protocol and a calibration that lie in the folder."""
    changed: dict[str, str] = {}
    if is_file(config.protocol):
        changed["protocol"] = _keep_protocol(folder, Path(config.protocol))
    if config.calibration:
        given = Path(config.calibration).expanduser()
        for path in (given / "instruction_difficulty.csv", *given.glob("df_gamed*.csv")):
            (folder / CALIBRATION).mkdir(parents=True, exist_ok=True)
            if path.absolute() != (folder / CALIBRATION / path.name).absolute():
                shutil.copyfile(path, folder / CALIBRATION / path.name)
        changed["calibration"] = CALIBRATION
    return config.model_copy(update=changed)


def _keep_protocol(folder: Path, given: Path) -> str:
    """Copy a protocol's file, with its template beside it; gives its path in the folder."""
    given = given.expanduser()
    name = f"{protocol_label(str(given))}.yaml"
    place = folder / PROTOCOL / name
    if given.absolute() != place.absolute():
        tree = yaml.safe_load(given.read_text("utf-8"))
        if template := tree.get("template"):
            tree["template"] = f"{place.stem}.txt"
            write_atomically(place.parent / tree["template"], (given.parent / template).read_text("utf-8"))
        write_atomically(place, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return f"{PROTOCOL}/{name}"

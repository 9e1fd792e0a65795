"""board.yaml: what a kept leaderboard is judged by, its models, and what was imported.

It is the truth about the folder: verdicts, leaderboard and pages are made from it, from the outputs and from the store
of replies. A person may read it; `otpo board` writes it.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.judge.config import JudgeConfig
from eval.judge.protocols.files import is_file
from eval.judge.protocols.registry import protocol_label
from otpo.errors import UserError
from otpo.files import write_atomically
from pipeline.recipe.identity import JUDGE_EXECUTION_KEYS

FILE = "board.yaml"
HEADER = "# A leaderboard that `otpo board` keeps. Change it by that command, so that verdicts and pages go with it.\n"
# What cannot change a verdict: where and how fast the judge is asked, what it costs, how files are read.
_WHERE = frozenset(
    (*JUDGE_EXECUTION_KEYS, "price_input", "price_output", "calibration", "reference", "columns", "count_missing")
)
_NOT_KEPT = {"reference", "columns", "count_missing", "each_other"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Reference(_Part):
    """What all models are compared with: its rows lie in the folder."""

    name: str
    file: str = Field(description="where it came from")
    sha256: str = Field(description="of the rows as they lie in the folder")
    prompts: int


class Model(_Part):
    """A model of the board: its outputs lie in the folder."""

    file: str = Field(description="where its outputs came from")
    sha256: str = Field(description="of the outputs as they lie in the folder")
    outputs: int
    added: str


class Import(_Part):
    """Figures of other people, as a copy of their file in imported/."""

    kind: Literal["alpaca_eval", "lm_eval"]
    file: str = Field(description="where it came from")
    sha256: str
    added: str
    judge: str | None = Field(None, description="of published rows: who judged them")
    only: list[str] = Field(default_factory=list, description="of published rows: these alone; empty is all")
    model: str | None = Field(None, description="of columns: whose they are")


class State(_Part):
    """What board.yaml holds.

    Attributes:
        judge: its settings; a protocol or calibration of one's own is a path in the folder.
        protocol: what boards call the protocol, with a part of its hash where it is a file.
        template: how a reward model sees prompts.
    """

    format: Literal[1] = 1
    task: str
    judge: JudgeConfig
    protocol: str
    template: str = "auto"
    reference: Reference
    models: dict[str, Model] = Field(default_factory=dict)
    imported: dict[str, Import] = Field(default_factory=dict)

    def config(self, folder: Path) -> JudgeConfig:
        """The judge's settings, with paths from here."""
        changed: dict[str, Any] = {}
        if is_file(self.judge.protocol):
            changed["protocol"] = str(folder / self.judge.protocol)
        if self.judge.calibration:
            changed["calibration"] = str(folder / self.judge.calibration)
        return self.judge.model_copy(update=changed)


def read_state(folder: Path) -> State:
    """The board that is kept in a folder.

    Raises:
        UserError: there is none, or its file is broken.
    """
    path = folder / FILE
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no kept leaderboard: expected {FILE} in it. `otpo board init {folder} --reference FILE "
            "--judge-url URL --judge-model NAME` makes one."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _broken(path, " ".join(str(error).split())[:200]) from None
    if not isinstance(tree, dict):
        raise _broken(path, f"expected keys such as judge and models, found {type(tree).__name__}")
    if tree.get("format", 1) != 1:
        raise UserError(f"{path}: expected format 1, found {tree['format']!r}: it was written by a later version.")
    try:
        return State(**{str(key): value for key, value in tree.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise _broken(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be read: {why}. Mend it by hand, or put an earlier copy in its place.")


def write_state(folder: Path, state: State) -> None:
    """Write board.yaml, atomically."""
    tree = state.model_dump(mode="json")
    tree["judge"] = state.judge.model_dump(mode="json", exclude_defaults=True, exclude=_NOT_KEPT)
    if state.judge.reward_model:
        tree["judge"].pop("protocol", None)  # follows from it
    tree["imported"] = {
        name: {key: value for key, value in each.items() if value not in (None, [])}
        for name, each in tree["imported"].items()
    }
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(folder / FILE, HEADER + text)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` says it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def now() -> str:
    """The time, for a person."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- one board is one judge's ----


def decides(config: JudgeConfig) -> dict[str, Any]:
    """What decides a judge's verdicts: key of the judge section -> value. The protocol is known by what it asks."""
    found = {key: value for key, value in config.model_dump(mode="json").items() if key not in _WHERE}
    found["protocol"] = protocol_label(config.protocol)
    found["panel"] = [{key: value for key, value in each.items() if key not in _WHERE} for each in found["panel"]]
    del found["each_other"]
    return found


def differences(there: JudgeConfig, asked: JudgeConfig) -> list[str]:
    """What of two judges' settings could change a verdict, in words: first what the board has, then what is asked."""
    ours, theirs = decides(there), decides(asked)
    return [
        f"judge.{key} is {_said(ours[key])} on the board, and {_said(theirs[key])} is asked for"
        for key in ours
        if ours[key] != theirs[key]
    ]


def _said(value: Any) -> str:
    return "not set" if value in (None, [], {}) else str(value).lower() if isinstance(value, bool) else str(value)

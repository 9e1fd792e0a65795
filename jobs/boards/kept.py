"""The folder of a kept leaderboard: what lies in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eval import layout
from eval.judge.config import JudgeConfig
from eval.judge.panels.members import members_of
from eval.judge.table import verdict_table
from jobs.boards.state import State, digest_of
from otpo.errors import UserError
from otpo.files import Row


@dataclass(frozen=True)
class Kept:
    """A leaderboard's folder with what lies in it."""

    folder: Path
    state: State

    def path(self, name: str) -> Path:
        """A model's outputs."""
        return layout.outputs_file(self.folder, layout.folder_name(name), self.state.task)

    def rows(self, name: str) -> list[Row]:
        """A model's outputs.

        Raises:
            UserError: the file is gone, or is not what was added.
        """
        return _rows(self.path(name), self.state.models[name].sha256, name)

    def outputs(self) -> dict[str, list[Row]]:
        """Model -> its outputs, in the order in which they came.

        Raises:
            UserError: a file is gone, or is not what was added.
        """
        return {name: self.rows(name) for name in self.state.models}

    def reference(self) -> list[Row]:
        """The rows that all models are compared with."""
        path = layout.reference_file(self.folder, self.state.task)
        return _rows(path, self.state.reference.sha256, "the reference")

    def written(self) -> pd.DataFrame:
        """The verdicts that were written last, on models that are there."""
        path = self.folder / layout.VERDICTS
        frame = pd.read_parquet(path) if path.is_file() else verdict_table([])
        return frame[frame["generator"].isin(self.state.models)]

    def members(self, config: JudgeConfig, verdicts: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Judge of a panel -> its own verdicts, those that the panel's are made of; empty where any lacks."""
        if not config.panel:
            return {}
        same = ["generator", "index", "order", "output_hash"]
        wanted, found = set(verdicts[same].itertuples(index=False, name=None)), {}
        for member in members_of(config):
            path = self.folder / layout.PANEL / f"{layout.folder_name(str(member.model))}.parquet"
            own = pd.read_parquet(path) if path.is_file() else verdict_table([])
            own = own[own["generator"].isin(verdicts["generator"])]
            if set(own[same].itertuples(index=False, name=None)) != wanted:
                return {}
            found[str(member.model)] = own
        return found

    def verdicts(self, outputs: Mapping[str, list[Row]]) -> pd.DataFrame:
        """The verdicts on the models' outputs as they are now."""
        frame = self.written()
        hashes = {name: {sha256_of(row["output"] or "") for row in rows} for name, rows in outputs.items()}
        current = [h in hashes.get(name, ()) for name, h in zip(frame["generator"], frame["output_hash"], strict=True)]
        stale = set(frame["generator"][~pd.Series(current, index=frame.index, dtype=bool)])
        return frame[frame["generator"].isin(set(outputs) - stale)]


def _rows(path: Path, sha256: str, owner: str) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path}: the outputs of {owner} are gone. Put the file back, or take the model off the board.")
    if digest_of(path) != sha256:
        raise UserError(
            f"{path}: the outputs of {owner} are not those that were added. Put the file back; add the outputs again "
            "(`otpo board add --replace`); or take the model off (`otpo board remove`)."
        )
    return json.loads(path.read_text("utf-8"))


def sha256_of(text: str) -> str:
    """Of a text, as the table of verdicts has it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

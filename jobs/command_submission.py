"""A command over files as a job: `otpo submit --verb judge -- OUTPUTS... --reference FILE --out DIR`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.submission import Job, place
from otpo.errors import UserError
from pipeline.recipe import digest

COMMANDS = ("generate", "pairs", "judge", "agreement", "report")


def prepare_command(
    verb: str, words: list[str], values: Mapping[str, Any], *, shared: list[Path], python: str, here: bool
) -> Job:
    """Turn a command's local paths into paths that are valid on the cluster.

    Args:
        words: of the command, after the verb.
        values: option or argument -> its value, as the command line was read.
        shared: folders that the cluster sees under the same path; files in them are not sent.
        here: whether the cluster is this machine alone.

    Raises:
        UserError: `--out` is relative, and the cluster is not this machine.
    """
    out = Path(values["out"])
    if not here and not out.is_absolute():
        raise UserError(f"--out {out}: on a cluster it must be an absolute path that every node sees.")
    results = str(out.absolute())
    inputs: dict[str, Path] = {}
    identities: list[str] = []

    def placed(word: str) -> str:
        before, path = _split(word)
        if path == str(values["out"]):
            return before + results
        if not path or not os.path.exists(Path(path).expanduser()):
            return word
        there, identity = place(Path(path).expanduser().absolute(), shared, inputs)
        identities.append(identity)
        return before + there

    command = [python, "-m", "jobs.cli", verb, *map(placed, words)]
    return Job(
        id=f"{verb}-{out.stem or verb}-{digest([command, identities])}",
        entrypoint=shlex.join(command),
        name=verb,
        results=results,
        texts={},
        inputs=inputs,
        judge_key="OPENAI_API_KEY" if values.get("judge_url") else None,
    )


def _split(word: str) -> tuple[str, str]:
    """What stands before a path in a word, and the path: `--out=board`, `NAME=FILE`, or the word itself."""
    before, equals, path = word.partition("=")
    return (before + equals, path) if equals and not os.path.exists(word) else ("", word)

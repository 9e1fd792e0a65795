"""A command over files as a job: `otpo submit --verb judge -- OUTPUTS... --reference FILE --out DIR`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.boards.state import FILE, read_state
from jobs.submission import Job, place, place_protocol
from otpo.errors import UserError
from pipeline.recipe import digest

COMMANDS = ("generate", "pairs", "judge", "agreement", "report", "board")


def prepare_command(
    verb: str, words: list[str], values: Mapping[str, Any], *, shared: list[Path], python: str, here: bool
) -> Job:
    """Turn a command's local paths into paths that are valid on the cluster.

    Args:
        verb: such as `judge`, or `board add`.
        words: of the command, after the verb.
        values: option or argument -> its value, as the command line was read. `out`, or a kept leaderboard's `folder`,
            is where it writes.
        shared: folders that the cluster sees under the same path; files in them are not sent.
        here: whether the cluster is this machine alone.

    Raises:
        UserError: the place to write to is relative, and the cluster is not this machine.
    """
    option, out = ("--out", Path(values["out"])) if "out" in values else ("DIR", Path(values["folder"]))
    if not here and not out.is_absolute():
        raise UserError(f"{option} {out}: on a cluster it must be an absolute path that every node sees.")
    results = str(out.absolute())
    inputs: dict[str, Path] = {}
    identities: list[str] = []

    def placed(word: str) -> str:
        before, path = _split(word)
        if path == str(out):
            return before + results
        local = Path(path).expanduser().absolute()
        if not path or not local.exists():
            return word
        is_protocol = path == values.get("protocol") or before.endswith("judge.protocol=")
        how = place_protocol if is_protocol and local.is_file() else place
        there, identity = how(local, shared, inputs)
        identities.append(identity)
        return before + there

    command = [python, "-m", "jobs.cli", *verb.split(), *map(placed, words)]
    return Job(
        id=f"{verb.replace(' ', '-')}-{out.stem or verb}-{digest([command, identities])}",
        entrypoint=shlex.join(command),
        name=verb,
        results=results,
        texts={},
        inputs=inputs,
        judge_key=_judge_key(verb, out, values),
    )


def _judge_key(verb: str, out: Path, values: Mapping[str, Any]) -> str | None:
    """The environment variable with the judge's key, where one is asked: a kept leaderboard knows its judge itself."""
    if verb in ("board add", "board update", "board rejudge") and (out / FILE).is_file():
        judge = read_state(out).judge
        return judge.api_key_env if judge.url else None
    return "OPENAI_API_KEY" if values.get("judge_url") else None


def _split(word: str) -> tuple[str, str]:
    """What stands before a path in a word, and the path: `--out=board`, `NAME=FILE`, or the word itself."""
    before, equals, path = word.partition("=")
    return (before + equals, path) if equals and not os.path.exists(word) else ("", word)

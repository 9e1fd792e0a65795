"""Prompt sets and model outputs: what is asked of the models, and whose answer is compared with whose.

`load_task` reads a prompt set (AlpacaEval, TL;DR, or your own file), `load_outputs` reads AlpacaEval's
`model_outputs.json`, `match_outputs` lays a model's outputs beside the reference's.
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from otpo.errors import UserError

Kind = Literal["instruction", "summarization"]
Row = dict[str, Any]

SUMMARIZE = (
    "Write a summary of the following post in one or two sentences. Keep what matters most to its author, leave out "
    "minor details, and add nothing that the post does not say."
)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        id: the row's own `id`, or its position.
        instruction: the text that the judge is shown; a conversation is written out as a transcript.
        dataset: the sub-set it belongs to (AlpacaEval's column of that name), the task's name where there is none.
        reference: an answer that came with the prompt, if any.
        messages: the conversation to be completed, only where the row gave one.
    """

    id: str
    instruction: str
    dataset: str
    reference: str | None = None
    messages: list[dict] | None = None


@dataclass(frozen=True)
class Task:
    """A prompt set. `duplicates` counts prompts whose instruction had already been seen."""

    name: str
    prompts: list[Prompt]
    source: str
    kind: Kind
    duplicates: int = 0


@dataclass(frozen=True)
class Pair:
    """A model's answer beside the reference's answer to the same instruction; `index` is its place in the reference."""

    index: int
    instruction: str
    reference: str
    output: str
    generator: str
    reference_generator: str
    dataset: str


@dataclass(frozen=True)
class Matched:
    """Pairs in the order of the reference, how many repeat an instruction, how many references had no answer."""

    pairs: list[Pair]
    duplicates: int
    unanswered: int


def load_task(name_or_path: str, name: str | None = None, limit: int | None = None) -> Task:
    """Read a prompt set.

    Args:
        name_or_path: "alpaca_eval" or "tldr" (fetched from the Hugging Face hub), or a JSON, JSONL, CSV or parquet file
            (also `.gz`) whose rows have `instruction`, `prompt` or `messages`, or `post` (a text to summarize); and
            optionally `output`, `reference` or `summary` (an answer to compare with), `dataset` and `id`.
        name: the task's name; the known name or the file's stem unless given.
        limit: only the first so many prompts.

    Raises:
        UserError: the source is missing, cannot be read, is empty or has rows without a prompt.
    """
    fetch = HUB_TASKS.get(name_or_path)
    if fetch is not None:
        rows, source, kind = (
            fetch(),
            f"hub:{name_or_path}",
            "summarization" if name_or_path == "tldr" else "instruction",
        )
        name = name or name_or_path
    else:
        path = Path(name_or_path)
        if not path.exists() and not path.suffix:
            known = ", ".join(HUB_TASKS)
            raise UserError(
                f"Unknown task '{name_or_path}': expected one of {known}, or a file of prompts. No such file."
            )
        rows, source = read_rows(path), str(path)
        kind = "summarization" if all("post" in row for row in rows) else "instruction"
        name = name or path.name.split(".")[0]
    _refuse_bad_rows(rows, source, lambda row: _instruction(row) is not None, "instruction, prompt, messages or post")
    prompts = [_prompt(row, position, name) for position, row in enumerate(rows[:limit])]
    seen = Counter(prompt.instruction for prompt in prompts)
    return Task(
        name, prompts, source, "summarization" if kind == "summarization" else "instruction", len(prompts) - len(seen)
    )


def load_outputs(path: str | Path) -> list[Row]:
    """Read model outputs in AlpacaEval's format: rows with `instruction`, `output` and usually `generator`, `dataset`.

    Raises:
        UserError: the file is missing, is not JSON, is empty, or rows have no text `instruction` or `output`.
    """
    rows = read_rows(Path(path))
    _refuse_outputs_without_text(rows, str(path))
    return rows


def match_outputs(outputs: list[Row], reference: list[Row], *, subset: bool = False) -> Matched:
    """Pair outputs with the reference's by instruction (as AlpacaEval: the same set of instructions).

    An instruction that occurs several times is matched in the order of occurrence.

    Args:
        outputs: the model's rows.
        reference: the rows to compare with.
        subset: let `outputs` answer only a part of the reference's instructions.

    Raises:
        UserError: an output has no reference, or (unless `subset`) a reference has no output, or a row has no text.
    """
    for name, rows in (("The outputs", outputs), ("The reference", reference)):
        _refuse_outputs_without_text(rows, name)
    waiting: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(reference):
        waiting[row["instruction"]].append(index)
    for places_left in waiting.values():
        places_left.reverse()
    partner: dict[int, Row] = {}
    strangers = []
    for row in outputs:
        if places := waiting.get(row["instruction"]):
            partner[places.pop()] = row
        else:
            strangers.append(row["instruction"])
    unanswered = [row["instruction"] for index, row in enumerate(reference) if index not in partner]
    if strangers or (unanswered and not subset) or not partner:
        raise UserError(_mismatch(len(outputs), len(reference), strangers, unanswered, subset))
    pairs = [
        Pair(
            index=index,
            instruction=reference[index]["instruction"],
            reference=reference[index]["output"],
            output=row["output"],
            generator=str(row.get("generator") or "model"),
            reference_generator=str(reference[index].get("generator") or "reference"),
            dataset=str(row.get("dataset") or reference[index].get("dataset") or ""),
        )
        for index, row in sorted(partner.items())
    ]
    return Matched(pairs, len(pairs) - len({pair.instruction for pair in pairs}), len(unanswered))


def transcript(messages: list[dict]) -> str:
    """A conversation as text: the user's words alone where that is all there is, else one named turn after another."""
    turns = [(str(message.get("role", "user")), _content(message)) for message in messages]
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON list, JSONL, CSV or parquet file, each also gzipped.

    Raises:
        UserError: the file is missing, is not what its name says, or is empty.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Expected a JSON, JSONL, CSV or parquet file (.gz is fine).")
    data = path.read_bytes()
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            data, suffix = gzip.decompress(data), Path(path.stem).suffix.lower()
        if suffix == ".parquet":
            rows: list[Any] = pd.read_parquet(io.BytesIO(data)).to_dict("records")
        elif suffix == ".csv":
            rows = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False).to_dict("records")
        else:
            rows = _json_rows(data.decode("utf-8-sig"), lines=suffix == ".jsonl")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as {suffix.lstrip('.') or 'JSON'} ({error}).") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a non-empty list of rows, found {'none' if not rows else 'other values'}.")
    return rows


def _json_rows(text: str, lines: bool) -> list[Row]:
    if lines:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if "Extra data" not in error.msg:
            raise
        return _json_rows(text, lines=True)
    return rows if isinstance(rows, list) else [rows]


def _content(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def _messages(row: Row) -> list[dict] | None:
    """The row's conversation, under `messages` or as a list in `prompt` (parquet gives arrays for lists)."""
    for key in ("messages", "prompt"):
        value: Any = row.get(key)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            return value
    return None


def _instruction(row: Row) -> str | None:
    for key in ("instruction", "prompt"):
        if isinstance(row.get(key), str) and row[key].strip():
            return row[key]
    messages = _messages(row)
    if messages is not None:
        return transcript(messages)
    post = row.get("post")
    return f"{SUMMARIZE}\n\n{post}" if isinstance(post, str) and post.strip() else None


def _prompt(row: Row, position: int, task: str) -> Prompt:
    reference = next((row[key] for key in ("output", "reference", "summary") if isinstance(row.get(key), str)), None)
    instruction = _instruction(row)
    assert instruction is not None  # rows without one were refused
    identity = row.get("id")
    return Prompt(
        id=str(position if identity is None else identity),
        instruction=instruction,
        dataset=str(row.get("dataset") or task),
        reference=reference,
        messages=_messages(row),
    )


def _refuse_outputs_without_text(rows: list[Row], source: str) -> None:
    _refuse_bad_rows(rows, source, lambda row: isinstance(row.get("instruction"), str), "instruction")
    _refuse_bad_rows(rows, source, lambda row: isinstance(row.get("output"), str), "output")


def _refuse_bad_rows(rows: list[Row], source: str, good: Callable[[Row], bool], wanted: str) -> None:
    bad = [number for number, row in enumerate(rows) if not good(row)]
    if bad:
        shown = ", ".join(map(str, bad[:5]))
        raise UserError(
            f"{source}: {len(bad)} of {len(rows)} rows have no text under {wanted} (rows {shown}, counted from 0). "
            f"Row {bad[0]} has the keys: {', '.join(map(str, rows[bad[0]])) or 'none'}."
        )


def _mismatch(n_outputs: int, n_reference: int, strangers: list[str], unanswered: list[str], subset: bool) -> str:
    def examples(texts: list[str]) -> str:
        return "; ".join(repr(text[:80]) for text in texts[:3])

    parts = [
        f"The outputs ({n_outputs} rows) and the reference ({n_reference} rows) do not answer the same instructions."
    ]
    if strangers:
        parts.append(f"{len(strangers)} outputs have no reference, e.g. {examples(strangers)}.")
    if unanswered and not subset:
        parts.append(f"{len(unanswered)} instructions of the reference have no output, e.g. {examples(unanswered)}.")
    parts.append("Generate both from the same prompts; to judge only a part of them, ask for a subset explicitly.")
    return " ".join(parts)


def _fetch_alpaca_eval() -> list[Row]:
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", repo_type="dataset")
    except Exception as error:
        raise _unreachable("alpaca_eval", "tatsu-lab/alpaca_eval", error) from error
    return read_rows(Path(path))


def _fetch_tldr() -> list[Row]:
    try:
        from datasets import load_dataset

        rows = [dict(row) for row in load_dataset("trl-lib/tldr", split="test")]
    except Exception as error:
        raise _unreachable("tldr", "trl-lib/tldr", error) from error
    return [{"instruction": row["prompt"], "output": row["completion"], "dataset": "tldr"} for row in rows]


def _unreachable(task: str, repository: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"The prompts of '{task}' could not be fetched from the Hugging Face hub ({repository}): {reason}. "
        "Give a file of prompts instead (JSON, JSONL, CSV or parquet with a column `instruction`)."
    )


HUB_TASKS = {"alpaca_eval": _fetch_alpaca_eval, "tldr": _fetch_tldr}

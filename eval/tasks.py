"""Prompt sets: what the models are asked. AlpacaEval, TL;DR summarization, or your own file.

A row's prompt is read as training reads it: with its `input`, system prompt, tools and earlier turns.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from otpo.data.formats.prompts import prompt_of
from otpo.data.rows import BadRow
from otpo.errors import UserError
from otpo.files import Row, read_rows

Kind = Literal["instruction", "summarization"]

SUMMARIZE = (
    "Write a summary of the following post in one or two sentences. Keep what matters most to its author, leave out "
    "minor details, and add nothing that the post does not say."
)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        id: the row's `id`, or its position.
        instruction: the text that the judge sees. A conversation becomes a transcript.
        dataset: the subset it belongs to (AlpacaEval's column of that name); the task's name if the row has none.
        reference: an output that came with the prompt, if any.
        messages: the conversation to continue, if the row has one, or a system prompt, tools or earlier turns.
        tools: JSON schemas of functions, which the chat template shows to the model.
        template_kwargs: the row's own variables of the chat template.
    """

    id: str
    instruction: str
    dataset: str
    reference: str | None = None
    messages: list[dict] | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Task:
    """A prompt set.

    Attributes:
        name: what the board calls it.
        prompts: in the order of the source.
        source: the file, or "hub:" and the known name.
        kind: "summarization" where every row is a post to be summarized.
    """

    name: str
    prompts: list[Prompt]
    source: str
    kind: Kind


def load_task(name_or_path: str, name: str | None = None, limit: int | None = None) -> Task:
    """Read a prompt set.

    Args:
        name_or_path: "alpaca_eval" or "tldr" (fetched from the Hugging Face hub), or a JSON, JSONL, CSV or parquet file
            (also `.gz`). Its rows have `instruction` (and `input`, which follows it after a blank line), `prompt` or
            `messages`, or `post` (a text to summarize); and optionally `system`, `tools`, `history`, `output`,
            `reference` or `summary` (an output to compare with), `dataset` and `id`.
        name: the task's name. Default: the known name, or the file's name without its suffixes.
        limit: read only the first so many prompts.

    Raises:
        UserError: the source cannot be found or read, or it has rows without a prompt, or with one that is not what it
            should be.
    """
    fetch = HUB_TASKS.get(name_or_path)
    if fetch is not None:
        rows, source, name = fetch(), f"hub:{name_or_path}", name or name_or_path
        summarize = name_or_path == "tldr"
    else:
        path = Path(name_or_path).expanduser()
        if not path.exists() and not path.suffix:
            raise UserError(
                f"unknown task '{name_or_path}': expected one of {', '.join(HUB_TASKS)}, or a file of prompts; there "
                "is no such file."
            )
        rows, source, name = read_rows(path), str(path), name or path.name.split(".")[0]
        summarize = all("post" in row for row in rows)
    prompts = _prompts(rows, name, source)[:limit]
    return Task(name, prompts, source, "summarization" if summarize else "instruction")


def transcript(messages: list[dict]) -> str:
    """A conversation as text: each turn with its role, or just the text if a user's message is all there is."""
    turns = [(str(message.get("role", "user")), content_of(message)) for message in messages]
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def content_of(message: dict) -> str:
    """A message as text, with its calls of tools as JSON."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
    calls = message.get("tool_calls")
    return f"{text}\n{json.dumps(calls, ensure_ascii=False)}".lstrip() if calls else text


def _prompts(rows: list[Row], task: str, source: str) -> list[Prompt]:
    prompts, bad = [], []
    for position, row in enumerate(rows):
        try:
            prompts.append(prompt_in(row, position, task))
        except BadRow as reason:
            bad.append((position, str(reason)))
    if bad:
        shown = ", ".join(str(position) for position, _ in bad[:5])
        reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(reason for _, reason in bad).items())
        raise UserError(
            f"{source}: {len(bad)} of {len(rows)} rows are no prompt (rows {shown}, counted from 0): {reasons}. "
            f"Row {bad[0][0]} has the keys: {', '.join(map(str, rows[bad[0][0]])) or 'none'}."
        )
    return prompts


def prompt_in(row: Row, position: int, task: str) -> Prompt:
    """The prompt of a row of a task or of a file of labelled pairs. Raises BadRow where there is none."""
    parts, post = prompt_of(row), row.get("post")
    if parts is None and not (isinstance(post, str) and post.strip()):
        raise BadRow("no text under instruction, prompt, messages or post")
    asked = parts.prompt if parts else f"{SUMMARIZE}\n\n{post}"
    tools = parts.tools if parts else None
    written = next((row[key] for key in ("instruction", "prompt") if isinstance(row.get(key), str)), "")
    shown = asked if isinstance(asked, str) else written if row.get("messages") and written else transcript(asked)
    return Prompt(
        id=str(position if row.get("id") is None else row["id"]),
        instruction=f"Tools: {json.dumps(tools, ensure_ascii=False)}\n\n{shown}" if tools else shown,
        dataset=str(row.get("dataset") or task),
        reference=next((row[key] for key in ("output", "reference", "summary") if isinstance(row.get(key), str)), None),
        messages=None if isinstance(asked, str) else asked,
        tools=tools,
        template_kwargs=parts.template_kwargs if parts else None,
    )


def _fetch_alpaca_eval() -> list[Row]:
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", repo_type="dataset")
    except Exception as error:
        raise _unreachable("alpaca_eval", "tatsu-lab/alpaca_eval", error) from error
    return read_rows(path)


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

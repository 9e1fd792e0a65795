"""The files of one generation: answers as they arrive; `model_outputs.json` and `generation.json` when all are in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import layout
from otpo.files import write_atomically
from pipeline.generate.engine import Completion

if TYPE_CHECKING:
    from eval.tasks import Prompt


@dataclass(frozen=True)
class GenerationResult:
    """What a call of `EnginePool.generate` made.

    Attributes:
        outputs: rows {dataset, instruction, output, generator, id, n_tokens, truncated}, in the order of the prompts;
            with `sample` where there are several answers a prompt, and with `error` where there is none.
        report: the contents of `generation.json`.
    """

    path: Path
    outputs: list[dict[str, Any]]
    report: dict[str, Any]


@dataclass(frozen=True)
class Files:
    """Where a generation writes: the answers, how they were made, and the answers so far."""

    outputs: Path
    report: Path
    partial: Path

    @classmethod
    def at(cls, out: str | Path) -> Files:
        """In a folder, or around a file that ends in .json; the folder is made."""
        out = Path(out)
        outputs = out if out.suffix == ".json" else out / layout.OUTPUTS
        outputs.parent.mkdir(parents=True, exist_ok=True)
        report = "generation.json" if outputs.name == layout.OUTPUTS else f"{outputs.stem}.generation.json"
        return cls(outputs, outputs.with_name(report), outputs.with_name(f"{outputs.stem}.partial.jsonl"))


class Partial:
    """Answers on disk as they arrive: a line each, after a first line that says how they were made."""

    def __init__(self, path: Path, made_with: str, prompts: dict[tuple[str, int], str]) -> None:
        self.path, self.made_with, self.prompts = path, made_with, prompts

    def read(self) -> list[Completion]:
        """The answers of an earlier call that were made the same way to the same prompts."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        done = []
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill cut
            if number == 0 and values != {"made_with": self.made_with}:
                break
            prompt = values.pop("prompt", None)
            if prompt is not None and self.prompts.get((values["id"], values["sample"])) == prompt:
                done.append(Completion(**values))
        self.path.write_text(json.dumps({"made_with": self.made_with}) + "\n")
        self.append(done)
        return done

    def append(self, completions: Sequence[Completion]) -> None:
        """Add answers; what is written survives the process."""
        with open(self.path, "a") as file:
            for completion in completions:
                line = {**asdict(completion), "prompt": self.prompts[completion.id, completion.sample]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def row(prompt: Prompt, completion: Completion, label: str, n: int) -> dict[str, Any]:
    """An answer in AlpacaEval's format, with what we know of it."""
    values: dict[str, Any] = {
        "dataset": prompt.dataset,
        "instruction": prompt.instruction,
        "output": completion.output,
        "generator": label,
        "id": prompt.id,
        "n_tokens": completion.n_tokens,
        "truncated": completion.truncated,
    }
    if n > 1:
        values["sample"] = completion.sample
    if completion.error:
        values["error"] = completion.error
    return values


def finished(files: Files, key: str) -> GenerationResult | None:
    """The result of an earlier call, when it was asked for the very same thing."""
    if not files.report.is_file() or not files.outputs.is_file():
        return None
    report = json.loads(files.report.read_text())
    if report.get("key") != key:
        return None
    return GenerationResult(files.outputs, json.loads(files.outputs.read_text()), report)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

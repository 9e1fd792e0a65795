"""The files of one generation: outputs as they arrive; `model_outputs.json` and `generation.json` when all are in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import layout
from pipeline.generate.engine import Output

if TYPE_CHECKING:
    from eval.tasks import Prompt


@dataclass(frozen=True)
class GenerationResult:
    """What a call of `EnginePool.generate` made.

    Attributes:
        outputs: rows {dataset, instruction, output, generator, id, n_tokens, truncated}, in the order of the prompts;
            with `sample` where a prompt has several outputs, and with `error` where it has none.
        report: the contents of `generation.json`.
    """

    path: Path
    outputs: list[dict[str, Any]]
    report: dict[str, Any]


@dataclass(frozen=True)
class OutputFiles:
    """Where a generation writes: the outputs, how they were made, and the outputs so far."""

    outputs: Path
    report: Path
    partial: Path

    @classmethod
    def at(cls, out: str | Path) -> OutputFiles:
        """In a folder, or around a file that ends in .json; the folder is made."""
        out = Path(out)
        outputs = out if out.suffix == ".json" else out / layout.OUTPUTS
        outputs.parent.mkdir(parents=True, exist_ok=True)
        report = "generation.json" if outputs.name == layout.OUTPUTS else f"{outputs.stem}.generation.json"
        return cls(outputs, outputs.with_name(report), outputs.with_name(f"{outputs.stem}.partial.jsonl"))


class PartialOutputs:
    """Outputs on disk as they arrive: a line each, after a first line that says how they were made."""

    def __init__(self, path: Path, made_with: str, prompts: dict[tuple[str, int], str]) -> None:
        self.path, self.made_with, self.prompts = path, made_with, prompts

    def read(self) -> list[Output]:
        """The outputs of an earlier call that were made the same way for the same prompts."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        done = []
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that a kill cut short
            if number == 0 and values != {"made_with": self.made_with}:
                break
            prompt = values.pop("prompt", None)
            if prompt is not None and self.prompts.get((values["id"], values["sample"])) == prompt:
                done.append(Output(**values))
        self.path.write_text(json.dumps({"made_with": self.made_with}) + "\n")
        self.append(done)
        return done

    def append(self, outputs: Sequence[Output]) -> None:
        """Add outputs; what is written survives the process."""
        with open(self.path, "a") as file:
            for output in outputs:
                line = {**asdict(output), "prompt": self.prompts[output.id, output.sample]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def output_row(prompt: Prompt, output: Output, label: str, n: int) -> dict[str, Any]:
    """An output in AlpacaEval's format, with its id, its tokens and whether it was cut."""
    values: dict[str, Any] = {
        "dataset": prompt.dataset,
        "instruction": prompt.instruction,
        "output": output.output,
        "generator": label,
        "id": prompt.id,
        "n_tokens": output.n_tokens,
        "truncated": output.truncated,
    }
    if n > 1:
        values["sample"] = output.sample
    if output.error:
        values["error"] = output.error
    return values


def finished(files: OutputFiles, key: str) -> GenerationResult | None:
    """The result of an earlier call with the same key; None if there is none."""
    if not files.report.is_file() or not files.outputs.is_file():
        return None
    report = json.loads(files.report.read_text())
    if report.get("key") != key:
        return None
    return GenerationResult(files.outputs, json.loads(files.outputs.read_text()), report)

"""Recipes of small sweeps, and a sweep's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe, make_recipe

REGS = "methods.otpo.reg"
PROMPTS = [f"What is {n} plus {n}? " for n in range(12)]


def sweep_tree(model: Path, folder: Path) -> dict[str, Any]:
    """A recipe of a few steps on made-up pairs, swept over OTPO's `reg`."""
    rows = [
        {
            "prompt": f"What is {n} plus {n}? ",
            "chosen": f"It is {2 * n}.",
            "rejected": f"I think that it may be {2 * n + 1}, or so.",
        }
        for n in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "tiny",
        "model": {"path": str(model)},
        "data": {"path": str(folder / "pairs.jsonl"), "max_length": 96, "validation": 8},
        "methods": {"dpo": {}, "otpo": {}},
        "train": {
            "max_steps": 4,
            "eval_every": 2,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "workers": 1,
            "use_gpu": False,
            "dtype": "fp32",
            "learning_rate": 1e-3,
            "max_failures": 0,
        },
        "sweep": {"params": {REGS: [0.1, 1.0]}, "metric": "eval_loss"},
    }


def judged_tree(model: Path, folder: Path, url: str) -> dict[str, Any]:
    """A sweep whose trials are judged on nine of twelve prompts."""
    rows = [json.dumps({"instruction": prompt}) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    tree = sweep_tree(model, folder)
    tree["train"] |= {"max_steps": 2}
    return tree | {
        "generate": {"tasks": {"sums": str(folder / "prompts.jsonl")}, "backend": "transformers", "max_tokens": 8}
        | {"temperature": 1.0},
        "judge": {"url": url, "model": "test", "reference": "base"},
    }


def swept(tree: dict[str, Any], **sweep: Any) -> Recipe:
    return make_recipe({**tree, "sweep": {**tree["sweep"], **sweep}})


def silent(*_: Any) -> None:
    pass


def trial(folder: Path, name: str) -> dict[str, Any]:
    """The record of a trial of the run in `folder`; empty before it starts."""
    path = folder / "sweep" / "models" / name / "trial.json"
    return json.loads(path.read_text()) if path.exists() else {}


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The metrics of a trial, as far as they are whole."""
    path = folder / "sweep" / "models" / name / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]

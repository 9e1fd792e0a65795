"""Small preference data, recipes on it, and what they left: shared by the tests of training, faults and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from conftest import SENTENCES

from otpo.data.token_file import load_tokens
from otpo.records import TokenPair


def write_pairs(path: Path, n: int = 60, seed: int = 0) -> Path:
    """Pairs of differently long completions cut from the sentences that the tiny tokenizer was made of."""
    draw = random.Random(seed)

    def words() -> str:
        return " ".join(draw.choice(SENTENCES).split()[: draw.randint(2, 9)])

    rows = [{"prompt": f"Question {i}: {words()}", "chosen": f"{words()} a", "rejected": words()} for i in range(n)]
    path.write_text(json.dumps(rows))
    return path


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's tree on the small data; `train` is merged."""
    train = {
        "max_steps": 20,
        "learning_rate": 1e-3,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "workers": 2,
        "use_gpu": False,
        "dtype": "fp32",
        "seed": 3,
        "max_failures": 0,
    }
    data = folder / "pairs.json"
    if not data.exists():
        write_pairs(data)
    return {
        "name": "small",
        "model": {"path": str(model)},
        "data": {"path": str(data), "validation": 0.2},
        **changes,
        "train": train | changes.get("train", {}),
    }


def metrics(label: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(training lines, evaluation lines) of `models/<label>/metrics.jsonl`."""
    lines = [json.loads(line) for line in (label / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def losses(label: Path) -> list[float]:
    """The loss of each step; the steps are 1, 2, ... without a gap or a repetition."""
    lines, _ = metrics(label)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def pairs_of(tokens: str) -> list[TokenPair]:
    """The pairs of a token file."""
    return [item for item in load_tokens(tokens) if isinstance(item, TokenPair)]

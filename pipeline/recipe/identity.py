"""The keys of a recipe that decide a result, and their hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.recipe.recipe import Recipe

# Keys that say where and how fast, not what: they may change while the run keeps its name.
JUDGE_EXECUTION_KEYS = (
    "url",
    "api_key_env",
    "ca_file",
    "concurrency",
    "max_retries",
    "timeout",
    "budget_usd",
    "max_requests_per_minute",
    "max_tokens_per_minute",
    "vllm.tensor_parallel_size",
    "vllm.data_parallel_size",
    "vllm.gpu_memory_utilization",
    "vllm.start_timeout",
)
EXECUTION_KEYS = (
    "cluster",
    "sweep",
    "study",
    "tracking",
    *(f"{section}.{key}" for section in ("judge", "pairs.scorer") for key in JUDGE_EXECUTION_KEYS),
    *("train.max_failures", "train.keep_checkpoints", "generate.workers", "generate.gpu_memory_utilization"),
    "generate.template",  # follows from data.template and the rows; stages keep what was rendered among their inputs
)
# Keys that finished runs did not have: with these values they change nothing.
LATER_KEYS_OF_JUDGES: dict[str, Any] = {
    "vllm": None,
    "verdict": "auto",
    "samples": 1,
    "columns": {},
    "count_missing": False,
    "panel": [],
    "panel_vote": "mean",
}
LATER_KEYS_OF_TRAINING = {"optimizer": "adamw"}
EXECUTION_KEYS_OF_TRAINING = (
    "workers", "min_workers", "use_gpu", "micro_batch_size", "micro_batch_tokens", "activation_checkpointing",
    "sharding", "torch_compile", "save_every", "save_minutes", "async_save", "keep_checkpoints", "max_failures",
)  # fmt: skip


def identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the keys that cannot change a result."""
    tree = recipe.model_dump(mode="json")
    for key in EXECUTION_KEYS:
        *parents, last = key.split(".")
        section: Any = tree
        for parent in parents:
            section = (section or {}).get(parent)
        if section:
            section.pop(last, None)
    for section in (tree["judge"], (tree["pairs"] or {}).get("scorer") or {}):
        for key, default in LATER_KEYS_OF_JUDGES.items():
            if key in section and section[key] == default:
                del section[key]
    trainings = (tree["train"], tree["base"] or {}, *tree["methods"].values())
    defaults = LATER_KEYS_OF_TRAINING.items()
    unset = [key for key, default in defaults if all(section.get(key, default) == default for section in trainings)]
    for section in trainings:
        for key in (*EXECUTION_KEYS_OF_TRAINING, *unset):
            section.pop(key, None)
    return tree


def digest(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

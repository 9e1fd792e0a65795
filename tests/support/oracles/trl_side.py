"""TRL's own trainers, run over rows in their order: the oracle of `test_trl_curves`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.data.tokens import load_tokenizer
from otpo.models.loading import load_causal_lm

STEPS = 20
PEAK = 1e-3  # learning rate: linear to 0 after 2 steps of warm-up
CLIP = 0.1  # of the gradient's norm
Ids = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


@dataclass(frozen=True)
class Curve:
    """The loss of each step, and the norm of its gradient before it is clipped."""

    losses: list[float]
    norms: list[float]


def train_with_trl(
    kind: str, start: Path, rows: Sequence[dict[str, Any]], out: Path, *, batch: int, micro: int, **settings: Any
) -> tuple[Curve, list[dict[str, Any]]]:
    """The curve of one of TRL's trainers as it is, and the rows as it tokenised them.

    Args:
        kind: "dpo", "cpo", "orpo" or "kto". start: the folder of the model and its tokenizer. out: where TRL may write.
        batch: rows a step. micro: rows that pass through the model together. settings: of TRL's configuration.
    """
    from datasets import Dataset

    trainer_class, config_class = _classes(kind)
    found: list[float] = []

    class Recording(trainer_class):  # type: ignore[misc,valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            found.append(loss.item())
            return loss

    config = config_class(
        str(out), max_steps=STEPS, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
        learning_rate=PEAK, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=CLIP, weight_decay=0.0,
        train_sampling_strategy="sequential", max_length=1024, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Recording(
        load_causal_lm(start), args=config, train_dataset=Dataset.from_list(list(rows)),
        processing_class=load_tokenizer(start),
    )  # fmt: skip
    tokenised = list(trainer.train_dataset)
    trainer.train()
    parts = batch // micro
    losses = [sum(found[i : i + parts]) / parts for i in range(0, len(found), parts)]
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return Curve(losses, norms), tokenised


def pair_ids(rows: Sequence[dict[str, Any]]) -> list[Ids]:
    """The ids of pairs that TRL tokenised: DPOTrainer's columns, or those of CPOTrainer and ORPOTrainer."""
    if "prompt_ids" in rows[0]:
        return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    found = []
    for row in rows:
        prompts, answers = [], []
        for side in ("chosen", "rejected"):
            answers.append([i for i in row[f"{side}_labels"] if i != -100])
            prompts.append(row[f"{side}_input_ids"][: -len(answers[-1])])
        assert prompts[0] == prompts[1]
        found.append((prompts[0], answers[0], answers[1]))
    return found


def _classes(kind: str) -> tuple[type, type]:
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig
    if kind == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig

"""What travels from the driver to the training workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from otpo.data.template import Rendering
from pipeline.run.folder import LabelFolder


@dataclass(frozen=True)
class TrainJob:
    """One model to train, as plain values.

    Attributes:
        label: names the model and its folder.
        model: folder or hub name of the model that training starts from, which is also the reference.
        model_fingerprint: identity of that model. Every checkpoint keeps it: resuming must not change the reference.
        tokens, validation_tokens: files of token ids: pairs, completions, or labelled completions, as the method's
            objective needs them.
        out: the folder `models/<label>`.
        events: the run's file of what happened (`pipeline.events.log`).
        train: a `TrainConfig` as a dict.
        total_steps: of the whole job.
        method: settings of the label's method (`otpo.methods.spec.resolve`); None for supervised training.
        frozen_models: name of a frozen model -> its folder or hub name.
        caches: the folder of frozen models' log-probabilities.
        tokens_hash: of the token ids of all rows.
        card: the text of the model card.
        template: how the rows' prompts are rendered; the exported model's folder says it.
        lora: settings of adapters; only these are trained then.
        quantization: of the weights beside the adapters.
        margins: for a reward model, the file of its pairs' margins, if they have any.
        score_pad: for a reward model, the token that pads what it scores (`otpo.models.disk.reward_tokenizer`).
        sets: of a mix of data sets, in the order of the files: the `name` of each, the `items` of it in `tokens`, how
            many of them are `taken` in an epoch, and its `rows` (numbered from, to before).
        milestones: steps between models that are exported on the way; None exports the trained model alone.
    """

    label: str
    model: str
    model_fingerprint: str
    attn_implementation: str
    tokens: str
    validation_tokens: str | None
    out: str
    events: str
    train: dict[str, Any]
    total_steps: int
    method: dict[str, Any] | None
    frozen_models: dict[str, str]
    caches: str
    tokens_hash: str
    card: str
    template: Rendering | str = ""
    lora: dict[str, Any] | None = None
    quantization: str = "none"
    margins: str | None = None
    score_pad: int | None = None
    sets: list[dict[str, Any]] = field(default_factory=list)
    milestones: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.template, dict):  # a job travels to the workers as plain values
            object.__setattr__(self, "template", Rendering(**self.template))

    @property
    def folder(self) -> LabelFolder:
        """`models/<label>`."""
        return LabelFolder(Path(self.out))

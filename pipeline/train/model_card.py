"""The model card of an exported model."""

from __future__ import annotations

import json
from importlib.metadata import version

from huggingface_hub import ModelCardData

from otpo.data.report import DataReport
from otpo.methods.spec import MethodSpec
from pipeline.recipe import Recipe, TrainConfig

SCORING = """- Scores a completion at its last token (EOS, or what ends the turn; {template} template): load it with
  `AutoModelForSequenceClassification`; its one logit is the score. Compare only scores of the same prompt.
"""


def model_card(
    recipe: Recipe, label: str, *, start: str, train: TrainConfig, spec: MethodSpec | None, report: DataReport
) -> str:
    """README.md of `models/<label>/model`: what the model was made from, how, and with which versions."""
    method = "supervised training" if spec is None else f"{spec.method.title} ({spec.method.paper})"
    settings = {"method": method, **({} if spec is None else spec.hyperparameters), **train.model_dump()}
    if recipe.model.lora:
        settings |= {"lora": recipe.model.lora.model_dump(), "quantization": recipe.model.quantization}
    rewards = recipe.trains_rewards(label)
    versions = {name: version(name) for name in ("torch", "transformers", "ray")}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if rewards else "text-generation",
        tags=["otpo", "reward-model" if rewards else "preference-optimization"],
    )
    return f"""---
{data.to_yaml()}
---

# {recipe.name}: {label}

Trained by the OTPO pipeline with {method}.

- Start and reference: `{start}`
- Data: `{report.source}`, {report.n_usable} of {report.n_groups} {report.counted} used ({report.format})
- Prompts: {report.rendering}
{SCORING.format(template=report.template) if rewards else ""}
## Settings

```json
{json.dumps(settings, indent=1)}
```

## Versions

```json
{json.dumps(versions, indent=1)}
```
"""

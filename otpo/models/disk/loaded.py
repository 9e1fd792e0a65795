"""Whether a model was loaded as its files describe it. transformers only warns where it draws weights at random."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from otpo.errors import UserError

SHOWN = 4  # names of weights in a message


def check_precision(path: str | Path, config: PreTrainedConfig | None = None) -> None:
    """Refuse quantised weights: they cannot be trained, and nothing trained beside them can be exported whole.

    Args:
        config: of the model, where it is at hand.

    Raises:
        UserError: the configuration says that the weights are quantised, or there is no such model.
    """
    try:
        config = config or AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"No model could be loaded from '{path}': {error}") from error
    for part in (config, config.get_text_config()):
        quantised: Any = getattr(part, "quantization_config", None)
        if quantised:
            found = quantised if isinstance(quantised, Mapping) else quantised.to_dict()
            method = found.get("quant_method", "a method without a name")
            raise UserError(
                f"expected a model in full precision (float32, bfloat16 or float16) at '{path}', found one quantised by"
                f" {method} (`quantization_config` in config.json)."
                " Start from the model that it was quantised from; to train with little memory, give that one"
                " model.quantization=4bit with model.lora."
            )


def check_loaded(path: str | Path, info: Mapping[str, Any], *, new: Collection[str] = ()) -> None:
    """Refuse a model of which weights are not in its files: transformers has drawn these at random.

    Args:
        info: the loading info of `from_pretrained`, called with `ignore_mismatched_sizes=True`.
        new: weights that may be missing.

    Raises:
        UserError: weights are missing, or are of other sizes than the configuration says.
    """
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        found = "; ".join(f"{name} is {_by(there)}, not {_by(wanted)}" for name, there, wanted in wrong[:SHOWN])
        raise UserError(
            f"expected weights of the sizes that config.json gives at '{path}', found {len(wrong)} others: {found}."
            " Mend config.json (often `vocab_size`), or take the weights that belong to it."
        )
    missing = sorted(set(info["missing_keys"]) - set(new))
    if missing:
        head = (
            " If the head shares the embeddings' weight, say so in config.json: `tie_word_embeddings: true`."
            if missing == ["lm_head.weight"]
            else ""
        )
        raise UserError(
            f"expected all weights of the model at '{path}', found none for {', '.join(missing[:SHOWN])}"
            f"{f' and {len(missing) - SHOWN} more' if len(missing) > SHOWN else ''}: they would be drawn at random."
            f"{head} Otherwise copy the model anew, or take the architecture that its weights are of."
        )


def _by(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape))

"""Whether a model was loaded as its files describe it. transformers only warns where it draws weights at random."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from otpo.errors import UserError
from otpo.models.disk.stored import Place, model_places

SHOWN = 4  # names of weights in a message
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FULL = (
    "Start from the model that it was quantised from; to train with little memory, give that one"
    " model.quantization=4bit with model.lora."
)


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
                f" {FULL}"
            )
    check_stored(path)


def check_stored(path: str | Path) -> None:
    """Refuse files whose weights are no floats of at least 16 bits, where config.json does not say how they were
    quantised: transformers would take them for the weights' values.

    Raises:
        UserError: there are such weights in the safetensors files.
    """
    odd = {name: place.kind[0] for name, place in _stored(path).items() if _is_quantised(name, place.kind[0])}
    if odd:
        shown = ", ".join(f"{name} ({kind})" for name, kind in list(odd.items())[:SHOWN])
        raise UserError(
            f"expected weights in full precision (float32, bfloat16 or float16) at '{path}', found {len(odd)} others:"
            f" {shown}; and config.json has no `quantization_config` that says how to read them. {FULL}"
        )


def rounded_at_loading(path: str | Path) -> str:
    """A sentence where config.json names a lower precision than the files have; transformers then rounds them."""
    dtype = getattr(AutoConfig.from_pretrained(path).get_text_config(), "dtype", None)
    kinds = {FLOATS[place.kind[0]] for place in _stored(path).values() if place.kind[0] in FLOATS}
    if not isinstance(dtype, torch.dtype) or dtype.itemsize >= max((kind.itemsize for kind in kinds), default=0):
        return ""
    found, said = (", ".join(sorted(str(kind).removeprefix("torch.") for kind in each)) for each in (kinds, {dtype}))
    return (
        f"{path} has weights in {found}, and its config.json says {said}: they were rounded to that as they were read,"
        " as transformers does."
    )


def _stored(path: str | Path) -> dict[str, Place]:
    """The weights in a model's safetensors files; empty where there are none yet or they are torn."""
    folder = path if Path(path).is_dir() else Path(cached_file(str(path), "config.json") or path).parent
    try:
        return model_places(Path(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # said where the weights are read
        return {}


def _is_quantised(name: str, kind: str) -> bool:
    if kind in FLOATS:
        return False
    return kind.startswith("F") or name.endswith("weight")  # masks and counts are no weights


def check_loaded(
    path: str | Path, info: Mapping[str, Any], *, config: PreTrainedConfig | None = None, new: Collection[str] = ()
) -> None:
    """Refuse a model of which weights are not in its files: transformers has drawn these at random.

    Args:
        info: the loading info of `from_pretrained`, called with `ignore_mismatched_sizes=True`.
        config: of a language model, to compare its number of layers.
        new: weights that may be missing.

    Raises:
        UserError: weights are missing, of layers that the model does not have, quantised without saying so, or of
            other sizes than the configuration says.
    """
    check_stored(path)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None:
        layers += getattr(config, "num_nextn_predict_layers", None) or 0  # they only speed generation up
        more = {int(match[1]) for name in info["unexpected_keys"] if (match := LAYER.search(name))}
        if max(more, default=-1) >= layers:
            raise UserError(
                f"config.json of '{path}' says that the model has {layers} layers, and its files hold layer"
                f" {max(more) + 1}. Mend `num_hidden_layers`; if it was made smaller on purpose, save the smaller model"
                " with transformers, so that the files are what is trained."
            )
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

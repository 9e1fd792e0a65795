"""Causal language models read from a Hugging Face folder or the hub, ready to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from otpo.errors import UserError, first_line
from otpo.models.disk.architecture import is_multimodal, read_config, text_config
from otpo.models.disk.deferred import ON_META, defer
from otpo.models.disk.loaded import check_loaded, check_precision
from otpo.models.disk.text_model import load_text_model


def load_causal_lm(
    path: str | Path,
    *,
    attn_implementation: str | None = "sdpa",
    four_bit: torch.dtype | None = None,
    deferred: bool = False,
) -> PreTrainedModel:
    """A causal LM in the precision it was saved in. No code from the model's folder is run.

    Its attribute `weights_not_read` names weights in its files that it has no use for.

    Args:
        attn_implementation: transformers' name of the attention; None takes the best that the architecture has.
        deferred: leave the weights to be read when the model is sharded (`otpo.models.disk.deferred`). 4-bit weights
            and text models of multimodal ones are read at once all the same.
        four_bit: the precision to compute in with 4-bit weights (NF4 with doubly quantised scales, as in QLoRA,
            https://arxiv.org/abs/2305.14314), by bitsandbytes on this process's GPU; None does not quantise.

    Raises:
        UserError: there is no such model, it needs code of its own, it is quantised, or some of its weights are not in
            its files.
    """
    config = read_config(path)
    check_precision(path, config)
    options: dict[str, Any] = {"dtype": "auto"}
    if four_bit is not None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=four_bit,
        )
        device = torch.device("cuda", torch.cuda.current_device())
        options = {"dtype": four_bit, "quantization_config": quantization, "device_map": {"": device}}
    if is_multimodal(config):
        if four_bit is not None:
            raise UserError(
                f"{path} is a multimodal model ({config.model_type}): its text model cannot be read in 4 bits. Set"
                " model.quantization=none, or give a language model."
            )
        return load_text_model(path, attn_implementation=attn_implementation)
    deferred = deferred and four_bit is None
    if deferred:
        options |= ON_META
    try:
        with no_bars() if Path(path).is_dir() else nullcontext():  # the bar of a download is useful
            found: Any = AutoModelForCausalLM.from_pretrained(
                path,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # torn files, code in pickled weights, packages that are not there: of many types
        reason = first_line(error)
        raise UserError(f"No causal language model could be loaded from '{path}': {reason:.400}") from error
    lm, info = found
    check_loaded(path, info, config=lm.config)
    lm.weights_not_read = tuple(sorted(info["unexpected_keys"]))
    if deferred:
        defer(lm, path, partial(load_causal_lm, path, attn_implementation=attn_implementation))
    return lm


def layer_number(layer: int, layers: int) -> int:
    """The number of a decoder layer from 1; a negative `layer` is counted from the end of `layers`."""
    return layer if layer > 0 else layers + 1 + layer


def check_layer(where: str, path: str | Path, layer: int) -> None:
    """Raise a `UserError` if a model (its folder or hub name) has no such layer of hidden states."""
    layers = text_config(read_config(path)).num_hidden_layers
    if not 1 <= layer_number(layer, layers) <= layers:
        raise UserError(
            f"{where}: {path} has {layers} decoder layers: expected 1 to {layers}, or -1 (the last) to -{layers},"
            f" found {layer}."
        )


@contextmanager
def no_bars() -> Iterator[None]:
    """Transformers and the hub client draw no progress bars while the body runs."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

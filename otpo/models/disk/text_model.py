"""The text model of a multimodal model, read as a causal language model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from otpo.errors import UserError
from otpo.models.disk.architecture import language_config, read_config, skeleton
from otpo.models.disk.loaded import check_loaded

PROOF_TOKENS = 12


def load_text_model(path: str | Path, *, attn_implementation: str | None = "sdpa") -> PreTrainedModel:
    """Load a multimodal model and keep its text model and head, as a causal LM in the precision they were saved in.

    It is proved by the numbers: on a short text, its logits are those of the whole model.

    Raises:
        UserError: there is no such model, transformers has no causal LM of its text model, or the two differ (some
            multimodal models see a whole prompt at once).
    """
    config = read_config(path)
    text = language_config(config)
    try:
        whole, info = AutoModelForMultimodalLM.from_pretrained(
            path,
            dtype="auto",
            attn_implementation="eager",  # parts that read no text may have nothing else
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"No multimodal model could be loaded from '{path}': {error}") from error
    check_loaded(path, info)
    whole.eval()
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    lm = skeleton(text, "eager")
    if place := next((name for name, part in lm.named_modules() if name and type(part) is type(decoder)), None):
        lm.set_submodule(place, decoder)
        lm.config = decoder.config
    else:  # another architecture's name for the same computation
        lm = AutoModelForCausalLM.from_config(text, attn_implementation="eager", dtype=decoder.dtype)
        lm.get_decoder().load_state_dict(decoder.state_dict())
    if head is not None:
        lm.set_output_embeddings(head)
    if any(parameter.is_meta for parameter in lm.parameters()):
        raise UserError(f"{path}: {type(whole).__name__} lacks parts of {type(lm).__name__}. Give the language model.")
    lm.eval()
    lm.name_or_path = lm.config._name_or_path = str(path)
    lm.config.architectures = [type(lm).__name__]
    lm.config.tie_word_embeddings = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    lm.generation_config = whole.generation_config
    _prove(path, whole, lm)
    lm.set_attn_implementation(attn_implementation or ("sdpa" if lm._supports_sdpa else "eager"))
    return lm


@torch.no_grad()
def _prove(path: str | Path, whole: Any, lm: Any) -> None:
    rows = lm.get_input_embeddings().weight.shape[0]
    # spread over the vocabulary, below the ids at its end that multimodal models use for pictures
    ids = torch.arange(1, PROOF_TOKENS + 1)[None] * max(1, rows // (2 * PROOF_TOKENS)) % rows
    expected, found = (model(input_ids=ids, use_cache=False).logits.float() for model in (whole, lm))
    difference = (expected.log_softmax(-1) - found.log_softmax(-1)).abs().max().item()
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise UserError(
            f"{path}: the text model of {type(whole).__name__}, read as {type(lm).__name__}, gives other"
            f" log-probabilities than the whole model (difference {difference:.2g}, allowed {tolerance}). It cannot be"
            " trained alone; give a language model."
        )

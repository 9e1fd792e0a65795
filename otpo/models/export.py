"""A trained model written as Hugging Face folders.

models/<label>/model/      config, safetensors, tokenizer, model card, otpo.json; adapters merged
models/<label>/adapter/    the adapters alone, if the model has any, in peft's format
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoTokenizer, PreTrainedModel

from otpo.data.template import Rendering, write_template
from otpo.models.adapters import ADAPTER, gather_adapters, has_adapters, merge_adapters
from otpo.models.disk.reloaded import Trained, check_reloaded
from otpo.models.disk.reward_tokenizer import for_scoring
from otpo.models.loading import load_causal_lm, no_bars
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel


def export(
    model: PolicyModel | RewardModel,
    out: Path,
    *,
    tokenizer: str,
    card: str,
    dtype: torch.dtype,
    others: Mapping[str, torch.dtype] | None = None,
    pad_id: int | None = None,
    template: Rendering | str = "",
    trained: Trained | None = None,
) -> None:
    """Gather the weights and write a folder that transformers and vLLM load. All ranks must call it.

    The folder appears under its name only when it is whole and, loaded again, is what was trained. Adapters are written
    to `adapter` beside `out`, and merged into the weights that they were trained beside, in the precision those were
    saved in (even if training read them in 4 bits).

    Args:
        tokenizer: folder or hub name of the tokenizer to save with the model.
        card: the text of the model card.
        dtype: to save in; merged weights keep the precision of the model that training started from.
        others: weights that are saved in another precision (`other_precisions`).
        pad_id: for a reward model, what pads the texts that it scores (`otpo.models.disk.reward_tokenizer`).
        template: how training rendered prompts, for whoever uses the model (`otpo.data.template`).
        trained: what the trained model gives for a few rows; None compares weights alone, as for 4-bit weights, which
            the adapters are not merged into.

    Raises:
        WorkError: the folder, loaded again, is another model; it stays beside `out` as `model.partial`.
    """
    adapted = has_adapters(model.lm)
    state: dict[str, Any] = (
        gather_adapters(model.lm)
        if adapted
        else get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        partial, adapter = out.with_name(out.name + ".partial"), out.with_name("adapter.partial")
        for folder in (partial, adapter):
            shutil.rmtree(folder, ignore_errors=True)
        if adapted:
            weights = _save_merged(model.lm, state, partial, adapter)
        else:
            weights = _save_whole(model.lm, state, partial, dtype, others or {})
        saved_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if pad_id is not None:
            for_scoring(saved_tokenizer, pad_id, template)
        saved_tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        write_template(partial, template)
        with no_bars():
            # not its type: FSDP2 gives a sharded model a class of its own
            kind = RewardModel if isinstance(model, RewardModel) else PolicyModel
            check_reloaded(partial, kind, weights, trained)
        for folder, name in ((adapter, out.with_name("adapter")), (partial, out)):
            if folder.exists():
                shutil.rmtree(name, ignore_errors=True)
                os.replace(folder, name)
    if dist.is_initialized():
        dist.barrier()


def other_precisions(lm: PreTrainedModel) -> dict[str, torch.dtype]:
    """Weights and buffers of a model, as it was loaded, in another precision than most: float32 biases of routers."""
    return {name: tensor.dtype for name, tensor in lm.state_dict().items() if tensor.dtype != lm.dtype}


def _save_whole(
    lm: PreTrainedModel, state: dict[str, Any], folder: Path, dtype: torch.dtype, others: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    copies, weights = _copies(lm), {}
    for full_name in list(state):
        name, tensor = full_name.removeprefix("lm."), state.pop(full_name)  # one at a time: a copy of all takes memory
        if name not in copies:
            # numbers of experts and the like are no weights, and have no other precision
            weights[name] = tensor.to(others.get(name, dtype)) if tensor.is_floating_point() else tensor
    _say_ties(lm)
    lm.save_pretrained(folder, state_dict=dict(weights))
    lm.config.dtype = dtype  # transformers has written that of the master weights
    lm.config.save_pretrained(folder)
    return weights


def _save_merged(lm: PreTrainedModel, adapters: dict[str, Any], folder: Path, adapter: Path) -> dict[str, Tensor]:
    start = load_causal_lm(str(lm.name_or_path))
    merged = merge_adapters(start, lm.peft_config[ADAPTER], adapters, adapter)
    _say_ties(merged)
    merged.save_pretrained(folder)
    return merged.state_dict()


def _copies(lm: PreTrainedModel) -> list[str]:
    """Names of weights that are another's, by their storage. transformers ties them again when it loads the others."""
    owners = dict(lm.named_parameters(remove_duplicate=False))
    return [
        copy
        for copy, source in lm.all_tied_weights_keys.items()
        if copy in owners and owners[copy] is owners.get(source)
    ]


def _say_ties(lm: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to what is so.

    transformers loads a head that differs from the embeddings although the configuration says they are tied; vLLM goes
    by the configuration alone and would serve another model.
    """
    head, embeddings = (getattr(end, "weight", None) for end in (lm.get_output_embeddings(), lm.get_input_embeddings()))
    if head is None:
        return
    for config in (lm.config, lm.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", None) not in (None, head is embeddings):
            config.tie_word_embeddings = head is embeddings

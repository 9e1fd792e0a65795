"""A trained model written as Hugging Face folders.

models/<label>/model/      config, safetensors, tokenizer, model card, otpo.json; adapters merged
models/<label>/adapter/    the adapters alone, if the model has any, in peft's format
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from otpo.data.template import Rendering, write_template
from otpo.models.adapters import ADAPTER, gather_adapters, has_adapters, merge_adapters, save_adapters
from otpo.models.disk.reloaded import Trained, check_reloaded
from otpo.models.disk.reward_tokenizer import for_scoring
from otpo.models.disk.writer import write_weights
from otpo.models.gathered import gathered_weights
from otpo.models.loading import load_causal_lm, no_bars
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.ranks import barrier, rank


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
    """Gather the weights layer by layer and write a folder that transformers and vLLM load. All ranks must call it.

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
    adapters = gather_adapters(model.lm) if has_adapters(model.lm) else None
    first = rank() == 0
    source: PolicyModel | RewardModel | None = model
    if any(not p.is_floating_point() for p in model.lm.parameters()):  # 4 bits
        source = _merged_start(model.lm, adapters or {}) if first else None
    if source is not None and source is not model:
        dtype, others = source.lm.dtype, other_precisions(source.lm)

    def parts() -> Iterator[dict[str, Tensor]]:
        return iter(()) if source is None else gathered_weights(source, dtype, others)

    if source is not None and first:
        partial, adapter = out.with_name(out.name + ".partial"), out.with_name("adapter.partial")
        for folder in (partial, adapter):
            shutil.rmtree(folder, ignore_errors=True)
        if adapters is not None:
            save_adapters(model.lm, adapters, adapter)
        _save(source.lm, partial, parts(), dtype)
        saved_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if pad_id is not None:
            for_scoring(saved_tokenizer, pad_id, template)
        saved_tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        write_template(partial, template)
        with no_bars():
            # not its type: FSDP2 gives a sharded model a class of its own
            kind = RewardModel if isinstance(model, RewardModel) else PolicyModel
            check_reloaded(partial, kind, chain.from_iterable(part.items() for part in parts()), trained)
        for folder, name in ((adapter, out.with_name("adapter")), (partial, out)):
            if folder.exists():
                shutil.rmtree(name, ignore_errors=True)
                os.replace(folder, name)
    else:  # take part in gathering: once to write, once to compare
        for _ in chain(parts(), parts()):
            pass
    barrier()


def other_precisions(lm: PreTrainedModel) -> dict[str, torch.dtype]:
    """Weights and buffers of a model, as it was loaded, in another precision than most: float32 biases of routers."""
    return {name: tensor.dtype for name, tensor in lm.state_dict().items() if tensor.dtype != lm.dtype}


def _merged_start(lm: PreTrainedModel, adapters: Mapping[str, Tensor]) -> PolicyModel:
    """What 4-bit weights were quantised from, with the adapters that were trained beside them."""
    start = load_causal_lm(str(lm.name_or_path), attn_implementation=None)
    return PolicyModel(merge_adapters(start, lm.peft_config[ADAPTER], adapters))


def _save(lm: PreTrainedModel, folder: Path, parts: Iterable[Mapping[str, Tensor]], dtype: torch.dtype) -> None:
    """Write configurations and weights, as `save_pretrained` does, but a part of the weights at a time."""
    _say_ties(lm)
    with no_bars():
        lm.save_pretrained(folder, state_dict={})
    lm.config.dtype = dtype  # transformers has written that of the master weights
    lm.config.save_pretrained(folder)
    left_out = set(lm._keys_to_ignore_on_save or ())
    kept = ({name: tensor for name, tensor in part.items() if name not in left_out} for part in parts)
    write_weights(folder, (revert_weight_conversion(lm, part) for part in kept))


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

"""What a model's folder or hub name holds, told from its configuration before any weight is read.

Everything here raises `UserError` for what cannot be trained, in words: an adapter without its base, a masked language
model, an encoder-decoder, a classifier, quantised weights, code of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from otpo.errors import UserError, first_line
from otpo.models.disk.loaded import check_precision

ADAPTER_CONFIG = "adapter_config.json"
# Text models of multimodal wrappers that are another architecture with other names: for text alone their rotary
# positions are the ordinary ones. `otpo.models.disk.text_model` proves it on the weights each time.
SAME_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
TRAIN_MODE_ONLY = {"reformer": "its backward pass works in train mode alone, in which it drops activations out"}
"""Values of `model_type` that cannot be trained without the randomness of train mode, and why."""
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as Model; from transformers import AutoTokenizer as Tok;'
    " Model.from_pretrained('{path}').merge_and_unload().save_pretrained('merged');"
    " Tok.from_pretrained('{path}').save_pretrained('merged')\""
)

NOT_MERGED = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""Kinds of peft's adapters that are no change of weights."""

SAID = "config.json: max_position_embeddings; a model that was made for more says so there, with its rope scaling"
TABLE = "its table of positions has no more"
INDEXER = "config.json: index_topk; in longer rows attention leaves tokens out, and others where a batch is padded"


@dataclass(frozen=True)
class Limits:
    """What token ids a model can be given.

    Attributes:
        tokens: ids are smaller than this: the rows of the embeddings, which a padded vocabulary has more of than the
            tokenizer has tokens.
        positions: the most tokens of a sequence; None where nothing limits them.
        why: there are no more positions.
        recomputes: whether activation checkpointing is known to the architecture.
        text_model: class of the text model that is read out of a multimodal model; None for a language model.
    """

    tokens: int
    positions: int | None
    why: str = SAID
    recomputes: bool = True
    text_model: str | None = None


def read_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a model that transformers knows. No code from the model's folder is run.

    Raises:
        UserError: an adapter, no configuration, or one of an architecture that this transformers does not have.
    """
    if (Path(path) / ADAPTER_CONFIG).is_file():
        raise _adapter(Path(path))
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for one thing: the configuration cannot be used
        reason = first_line(error)
        raise UserError(
            f"expected a model of transformers (config.json with a known model_type) at {path}; it cannot be read:"
            f" {reason:.400}"
        ) from error


def _adapter(folder: Path) -> UserError:
    """What to do with an adapter, by its configuration."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text())
        base, kind = found.get("base_model_name_or_path"), found.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        return UserError(
            f"{folder} holds an adapter, and its {ADAPTER_CONFIG} cannot be read ({first_line(error)}): expected a"
            " whole model. Copy the adapter anew and merge it into its base, or remove the file from a whole model."
        )
    if kind in NOT_MERGED:
        return UserError(
            f"{folder} is an adapter of the model '{base}' ({ADAPTER_CONFIG}: {kind}), which cannot be merged into its"
            " weights: expected a whole model. Give the base."
        )
    if not base:
        return UserError(
            f"{folder} is an adapter, and its {ADAPTER_CONFIG} names no base: expected a whole model. Write the base's"
            " folder or hub name there as base_model_name_or_path; the next start then says how to merge the two."
        )
    away = str(base).startswith(("/", ".", "~")) and not Path(base).expanduser().is_dir()
    first = " The base is not there: write its folder into that file first." if away else ""
    return UserError(
        f"{folder} is an adapter of the model '{base}' ({ADAPTER_CONFIG}): expected a whole model.{first} Merge the"
        f" two, and give the merged folder: {MERGE.format(path=folder)}"
    )


def own_code(path: str | Path) -> str:
    """A sentence where a model's config names code of its own for an architecture that transformers knows."""
    config = read_config(path)
    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if not code:
        return ""
    return (
        f"{path} names code of its own for its model ({code}), which was not run: transformers' own"
        f" '{config.model_type}' was trained. Where that computes something else, it is another model."
    )


def _class_of(config: PreTrainedConfig) -> str:
    """The class that a configuration says its weights are of; "" where it says none."""
    named: Any = config.architectures or [""]
    return named if isinstance(named, str) else str(named[0] or "")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the language model; of most models it is the whole."""
    return config if config.is_encoder_decoder else config.get_text_config()


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a model has a text model inside, which alone is trained (`otpo.models.disk.text_model`)."""
    return text_config(config) is not config


def language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that the causal language model to train is built from.

    Raises:
        UserError: transformers has no causal language model for it.
    """
    inner = text_config(config)
    if inner is not config and type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        raise UserError(f"'{config.model_type}' is no language model, nor a multimodal one that answers with text.")
    if type(inner) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return inner
    if same := SAME_AS.get(inner.model_type):
        values = inner.to_diff_dict()
        values.pop("model_type", None)
        rope = dict(values.pop("rope_parameters", None) or {})
        rope.pop("mrope_section", None), rope.pop("mrope_interleaved", None)
        if rope.get("rope_type") in ("default", "mrope"):
            rope["rope_type"] = "default"
        return AutoConfig.for_model(same, **values, **({"rope_parameters": rope} if rope else {}))
    if inner is not config:
        raise UserError(
            f"'{config.model_type}' is a multimodal model, and transformers has no causal language model for its text"
            f" part '{inner.model_type}': it cannot be trained here. Give a language model, or a multimodal model whose"
            " text model is one (Gemma 3, Llava, Mistral 3, Qwen2-VL, Qwen3-VL, ...)."
        )
    raise UserError(
        f"'{config.model_type}' is no causal language model: transformers has none of this architecture. Give a model"
        " that AutoModelForCausalLM loads."
    )


def check_language_model(path: str | Path, *, attn_implementation: str = "sdpa") -> Limits:
    """Check that a model can be trained as a policy, from its configuration and the shapes that follow from it.

    Returns:
        What its token ids may be.

    Raises:
        UserError: it cannot be trained, and why.
    """
    config = read_config(path)
    check_precision(path, config)
    try:
        _check_purpose(config)
        lm = skeleton(language_config(config), attn_implementation)
        _check_embeddings(lm)
        _check_padding_row(lm)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return limits_of(lm, type(lm).__name__ if is_multimodal(config) else None)


def check_reward_start(path: str | Path, *, attn_implementation: str = "sdpa") -> Limits:
    """As `check_language_model`, for what gets a scalar head: a language model, or a classifier of one label."""
    config = read_config(path)
    check_precision(path, config)
    try:
        if config.is_encoder_decoder:
            raise UserError(f"'{config.model_type}' is an encoder-decoder; expected a decoder for a reward model.")
        if is_multimodal(config):
            raise UserError(
                f"'{config.model_type}' is a multimodal model, and a reward model reads text: give a language model."
            )
        if _class_of(config).endswith(CLASSIFIERS[0]) and config.num_labels != 1:
            raise UserError(
                f"expected a language model, or a classifier with one label, to start a reward model from; found a"
                f" classifier with {config.num_labels} labels. Give the language model that it was trained from."
            )
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"transformers has no classifier of the architecture '{config.model_type}', and a reward model is"
                " saved as one. Give a model of another architecture."
            )
        skeleton(config, attn_implementation, AutoModelForSequenceClassification)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Limits(tokens=config.vocab_size, positions=positions_of(config))


def skeleton(
    config: PreTrainedConfig, attn_implementation: str = "sdpa", kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model without weights: a causal language model, or of another of transformers' auto classes.

    Raises:
        UserError: it cannot be built: attention that it does not have, or a package that is not installed.
    """
    try:
        with torch.device("meta"):
            return kind.from_config(config, attn_implementation=attn_implementation)
    except Exception as error:  # each architecture has its own complaints about what it cannot be built with
        reason = first_line(error)
        if attn_implementation != "eager" and "attention implementation" in str(error):
            raise UserError(
                f"'{config.model_type}' has no {attn_implementation} attention in transformers: set"
                " model.attn_implementation=eager."
            ) from error
        raise UserError(f"transformers cannot build a '{config.model_type}' from this config: {reason:.400}") from error


def limits_of(lm: PreTrainedModel, text_model: str | None = None) -> Limits:
    """What the token ids of a model may be, from the shapes of its weights."""
    config = text_config(lm.config)
    embeddings: Any = lm.get_input_embeddings()
    tables = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in lm.named_modules()
        if isinstance(module, nn.Embedding) and module is not embeddings and _is_position_table(name)
    ]
    said = (min(tables), TABLE) if tables else (positions_of(config), SAID)
    known = [(n, why) for n, why in (said, (getattr(config, "index_topk", None), INDEXER)) if n]
    positions, why = min(known, default=(None, SAID))
    return Limits(
        tokens=min(rows for end in (embeddings, lm.get_output_embeddings()) if (rows := _rows(end))),
        positions=positions,
        why=why,
        recomputes=lm.supports_gradient_checkpointing,
        text_model=text_model,
    )


def _is_position_table(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "wpe" or "position" in last


def positions_of(config: PreTrainedConfig) -> int | None:
    """Positions that a text model's configuration names, under whichever name; None where nothing limits them."""
    if getattr(getattr(config, "attn_config", config), "alibi", False):
        return None  # a bias by distance, which has no end
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _check_purpose(config: PreTrainedConfig) -> None:
    """Refuse models that `AutoModelForCausalLM` would load, but that are made for something else."""
    kind, name = config.model_type, _class_of(config)
    if kind in TRAIN_MODE_ONLY:
        raise UserError(f"'{kind}' cannot be trained here: {TRAIN_MODE_ONLY[kind]}. Give another architecture.")
    if config.is_encoder_decoder or text_config(config).is_encoder_decoder:
        raise UserError(
            f"'{kind}' is an encoder-decoder: its prompt goes through an encoder, and a causal language model was"
            " expected, which reads the prompt and its completion in one row."
        )
    if name.endswith(CLASSIFIERS):
        raise UserError(
            f"{name} has no head over the vocabulary: a policy would start with a random one. Give the language model"
            " itself."
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UserError(
            f"'{kind}' is a masked language model: each token sees those after it, so it gives no log-probabilities of"
            " a completion. Expected a causal language model (in config.json of a decoder: is_decoder true)."
        )


def _check_embeddings(lm: PreTrainedModel) -> None:
    """Refuse models that do not begin with a table of embeddings. Other oddities are found when the model computes."""
    try:
        rows = _rows(lm.get_input_embeddings())
    except (NotImplementedError, AttributeError):
        rows = None
    if rows is None:
        raise UserError(f"{type(lm).__name__} does not say where its table of input embeddings is.")


def _check_padding_row(lm: PreTrainedModel) -> None:
    """Refuse models whose padding token loses its embedding, and with a tied head its logit, each time they are loaded.

    Some classes set that row to zero although it was read from a file. Their own code is asked, with a small table.
    """
    index = getattr(lm.get_input_embeddings(), "padding_idx", None)
    if index is None:
        return
    table = nn.Embedding(1, 2, padding_idx=0)
    with torch.no_grad():
        table.weight.fill_(1.0)
    table.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what it has read
    lm._init_weights(table)
    if not bool((table.weight == 1).all()):
        raise UserError(
            f"transformers' {type(lm).__name__} sets the embedding of the padding token (id {index}) to zero whenever"
            " it loads a model, so what is trained there would be lost in the exported one. Remove `pad_token_id` from"
            " its config.json: the tokenizer says what pads."
        )


def _rows(end: Any) -> int | None:
    """Rows of an embedding or a head, one for each token."""
    weight = getattr(end, "weight", None)
    return None if weight is None or weight.dim() != 2 else weight.shape[0]

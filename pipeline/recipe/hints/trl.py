"""Keys of TRL's trainers (DPO, KTO, CPO, SimPO, ORPO, rewards, supervised), its scripts, and peft's adapters."""

from __future__ import annotations

from pipeline.recipe.hints.convert import (
    above_zero,
    attention,
    beta,
    choice,
    loss,
    nothing,
    of_method,
    only_if,
    peft,
    simpo_margin,
    smoothing,
    source,
    target_modules,
)
from pipeline.recipe.hints.hint import Hint, each, not_needed

_CACHED = not_needed("the reference's log-probabilities are always computed once and cached on disk, whatever the run")
_FIXED = not_needed("the reference is the model that training starts from, and stays fixed")
_FROM_CONFIG = not_needed(
    "a model is loaded as its own folder says; model.attn_implementation and train.dtype can be set"
)
_TOKENIZER = not_needed(
    "the tokenizer's own special tokens and chat template are used; data.template says whether they render prompts"
)
_NO_PADDING = not_needed(
    "batches hold no padding and compute each prompt once where the model allows it; no key is needed"
)
_TOKENS = not_needed("rows become token ids once, before training, and are kept in the run's folder")
_DROPOUT = not_needed(
    "dropout is off, so that the policy starts as the reference; adapters have model.lora.lora_dropout"
)
_KIND = not_needed("of LoRA's kinds the plain one is built in: model.lora.r, lora_alpha, lora_dropout, target_modules")
_BITS = Hint("model.quantization", "4bit is QLoRA: frozen weights in NF4 beside adapters", nothing)
_SUPERVISED = not_needed("supervised training (`base`) takes {prompt, completion} rows and trains on the completion")
_GENERATED = Hint("generate.tasks", "outputs are generated and judged after training", nothing)
_LENGTH = Hint("data.max_length", "most tokens of a prompt and one completion together", nothing)

TRL: dict[str, Hint] = {
    # ---- the loss ----
    "loss_type": Hint("", "each loss is a method: a label of `methods` (`otpo methods` lists them)", loss),
    "loss_weights": Hint("methods.LABEL.sft_weight", "the chosen completion's likelihood beside a loss", nothing),
    "beta": Hint("", "`methods.LABEL.beta`; ORPO's is orpo_lambda", beta),
    "label_smoothing": Hint("", "`methods.LABEL.label_smoothing`; EXO's is exo_epsilon", smoothing),
    "ld_alpha": Hint("", "`methods.LABEL.ld_alpha` of the method ld-dpo", of_method("ld_alpha", "ld-dpo")),
    "f_divergence_type": Hint(
        "methods.f-dpo.divergence",
        "of the method f-dpo",
        choice(
            {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
        ),
    ),
    "f_alpha_divergence_coef": Hint("methods.f-dpo.divergence_alpha", "of the method f-dpo"),
    "use_weighting": Hint("methods.wpo", "WPO is a method of its own", only_if(True, {})),
    "discopop_tau": Hint("methods.discopop.discopop_tau", "of the method discopop"),
    "rpo_alpha": Hint("", "`methods.LABEL.sft_weight` of any method", of_method("sft_weight")),
    "cpo_alpha": Hint("methods.cpo.cpo_alpha", "of the method cpo"),
    "simpo_gamma": Hint("", "`methods.simpo.gamma_beta_ratio`, which is simpo_gamma / beta", simpo_margin),
    "gamma_beta_ratio": Hint("methods.simpo.gamma_beta_ratio", "of the method simpo"),
    "alpha": Hint("methods.alphapo.alphapo_alpha", "of the method alphapo"),
    "desirable_weight": Hint("methods.kto.desirable_weight", "of the method kto"),
    "undesirable_weight": Hint("methods.kto.undesirable_weight", "of the method kto"),
    "center_rewards_coefficient": Hint("methods.reward-model.center_rewards_coefficient", "of the method reward-model"),
    "reference_free": not_needed("methods without a reference are simpo, cpo, orpo and others (`otpo methods`)"),
    "router_aux_loss_coef": not_needed("a load-balancing loss of experts is not built in"),
    # ---- the reference ----
    **each("precompute_ref_log_probs precompute_ref_batch_size reference_model ref_model_init_kwargs", _CACHED),
    **each("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps force_use_ref_model", _FIXED),
    **each(
        "model_adapter_name ref_adapter_name", not_needed("with model.lora the reference is the model without adapters")
    ),
    # ---- the model ----
    "model_name_or_path": Hint("model.path"),
    "model_revision": Hint(
        "model.path", "a folder, which `hf download NAME --revision R --local-dir FOLDER` makes", nothing
    ),
    **each("model_init_kwargs ref_model_revision model_type", _FROM_CONFIG),
    **each(
        "torch_dtype model_dtype",
        Hint(
            "train.dtype",
            "of the computation; trained weights stay in fp32",
            choice({"bfloat16": "bf16", "float32": "fp32", "bf16": "bf16", "fp32": "fp32"}),
        ),
    ),
    "dtype": Hint(
        "train.dtype",
        "of the computation; trained weights stay in fp32",
        choice({"bfloat16": "bf16", "float32": "fp32", "bf16": "bf16", "fp32": "fp32"}),
    ),
    "attn_implementation": Hint("model.attn_implementation", "as transformers names it", attention),
    "trust_remote_code": not_needed("code from the hub is never run: models are those that transformers knows"),
    "disable_dropout": _DROPOUT,
    "activation_offloading": Hint(
        "train.activation_checkpointing", "computes again what offloading moves", only_if(True, True)
    ),
    "is_encoder_decoder": not_needed("models are decoders"),
    # ---- adapters ----
    "use_peft": Hint("model.lora", "`{}` takes every default", only_if(True, {})),
    **each(
        "peft_config peft lora lora_config",
        Hint("", "`model.lora` takes r, lora_alpha, lora_dropout and target_modules", peft),
    ),
    **each("lora_r lora_rank", Hint("model.lora.r")),
    "lora_alpha": Hint("model.lora.lora_alpha"),
    "lora_dropout": Hint("model.lora.lora_dropout"),
    **each("lora_target_modules target_modules", Hint("model.lora.target_modules", "", target_modules)),
    **each(
        "lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora lora_bias modules_to_save",
        _KIND,
    ),
    "load_in_4bit": Hint(_BITS.key, f"{_BITS.note}, with model.lora", only_if(True, "4bit")),
    **each(
        "load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype"
        " bnb_4bit_use_double_quant",
        _BITS,
    ),
    # ---- the data ----
    "dataset_name": Hint("", "`data.path`: a file, or a hub name", source),
    "dataset_config": not_needed("a hub name is read in its default configuration: save another as a file"),
    "dataset_train_split": Hint("data.split", "of a hub data set"),
    "dataset_test_split": Hint("data.validation", "rows held out of the training rows", nothing),
    "dataset_streaming": _TOKENS,
    **each("dataset_num_proc dataset_kwargs dataset_batch_size skip_prepare_dataset shuffle_dataset", _TOKENS),
    "ignore_bias_buffers": not_needed("it mends a fault of DDP, which is not used"),
    "max_length": Hint("data.max_length", _LENGTH.note, above_zero),
    "max_seq_length": Hint("data.max_length", _LENGTH.note, above_zero),
    "max_prompt_length": Hint("data.max_prompt_length", "", above_zero),
    **each("max_completion_length max_target_length", _LENGTH),
    "truncation_mode": Hint(
        "data.truncation",
        "keep_start cuts a prompt at its beginning, a completion at its end; drop leaves the row out",
        only_if("keep_start", "keep_start"),
    ),
    **each(
        "padding_free pad_to_multiple_of padding_value label_pad_token_id packing packing_strategy eval_packing"
        " use_logits_to_keep use_num_logits_to_keep",
        _NO_PADDING,
    ),
    **each("pad_token eos_token chat_template_path chat_template tokenizer_name_or_path", _TOKENIZER),
    **each("dataset_text_field completion_only_loss assistant_only_loss train_on_inputs formatting_func", _SUPERVISED),
    **each("generate_during_eval base_model_attribute_name", _GENERATED),
}

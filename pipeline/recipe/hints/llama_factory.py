"""Keys of LLaMA-Factory that transformers, TRL and axolotl do not have."""

from __future__ import annotations

from pipeline.recipe.hints.axolotl import AXOLOTL
from pipeline.recipe.hints.convert import (
    METHODS,
    above_zero,
    attention,
    choice,
    nothing,
    of_method,
    only_if,
    source,
    target_modules,
)
from pipeline.recipe.hints.hint import Config, Hint, each, not_needed
from pipeline.recipe.hints.transformers import TRANSFORMERS
from pipeline.recipe.hints.trl import TRL


def _stage(value: object, config: Config) -> dict[str, dict] | None:
    """`stage: dpo` is the method of pref_loss, where that is given."""
    if config.get("pref_loss") or not isinstance(value, str) or value not in METHODS:
        return None
    return {f"methods.{METHODS[value]}": {}}


_SOLVERS = not_needed("of the optimizers AdamW is built in (train.optimizer), its states sharded over train.workers")
_LORA = TRL["use_dora"]
_TEMPLATE = "data.chat_template_kwargs"
_PREPARED = TRL["dataset_num_proc"]

LLAMA_FACTORY: dict[str, Hint] = {
    "stage": Hint("", "each loss is a label of `methods`; supervised training is the section `base`", _stage),
    "finetuning_type": Hint("model.lora", "unset trains all weights", only_if("lora", {})),
    **each("lora_target", Hint("model.lora.target_modules", "", target_modules)),
    "adapter_name_or_path": AXOLOTL["lora_model_dir"],
    **each(
        "additional_target pissa_init pissa_iter pissa_convert loraplus_lr_ratio freeze_trainable_layers"
        " freeze_trainable_modules freeze_extra_modules create_new_adapter lora_ga",
        _LORA,
    ),
    "quantization_bit": Hint("model.quantization", "4bit, with model.lora", only_if(4, "4bit")),
    **each("quantization_method quantization_type double_quantization quantization_device_map", TRL["load_in_8bit"]),
    "pref_beta": Hint("", "`methods.LABEL.beta`; ORPO's is orpo_lambda", TRL["beta"].convert),
    "pref_loss": Hint("", "each loss is a label of `methods` (`otpo methods` lists them)", TRL["loss_type"].convert),
    "pref_ftx": Hint("", "`methods.LABEL.sft_weight` of any method", of_method("sft_weight")),
    "pref_bco_weight": not_needed("bco-pair is a method of its own, and is not added to another loss"),
    "kto_chosen_weight": Hint("methods.kto.desirable_weight", "of the method kto"),
    "kto_rejected_weight": Hint("methods.kto.undesirable_weight", "of the method kto"),
    **each("ref_model ref_model_adapters ref_model_quantization_bit", TRL["sync_ref_model"]),
    **each(
        "reward_model_adapters reward_model_quantization_bit reward_model_type ppo_score_norm ppo_epochs",
        not_needed("PPO is not built in; a reward model judges (judge.reward_model) or scores pairs"),
    ),
    "dataset": Hint(
        "", "`data.path`, or `data.datasets` for a mix: files or hub names, recognised by their columns", source
    ),
    "dataset_dir": Hint("data.path", "a path of its own; no dataset_info.json is read", nothing),
    **each("eval_dataset", TRL["dataset_test_split"]),
    "val_size": Hint("data.validation", "a fraction if below 1, else a number of rows"),
    "max_samples": Hint("data.limit", "uses only the first rows", above_zero),
    "cutoff_len": Hint("data.max_length", "most tokens of a prompt and one completion together"),
    "template": Hint("data.template", "chat, literal or auto: the chat template is the tokenizer's own", nothing),
    **each(
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path cache_dir"
        " data_shared_file_system buffer_size",
        _PREPARED,
    ),
    "mix_strategy": Hint(
        "data.stopping_strategy",
        "of a mix with fractions",
        choice({"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}),
    ),
    "interleave_probs": Hint("data.datasets", "`fraction` of each data set", nothing),
    **each("mask_history train_on_prompt efficient_eos ignore_pad_token_for_loss", TRL["completion_only_loss"]),
    **each("neat_packing", TRL["packing"]),
    "default_system": TRL["chat_template"],
    "enable_thinking": Hint(
        "",
        "`data.chat_template_kwargs` of the whole run",
        lambda value, config: {_TEMPLATE: {"enable_thinking": value}},
    ),
    "flash_attn": Hint("model.attn_implementation", "sdpa is the default", attention),
    **each("enable_liger_kernel", TRANSFORMERS["use_liger_kernel"]),
    **each(
        "shift_attn rope_scaling mixture_of_depths use_unsloth use_unsloth_gc print_param_status moe_aux_loss_coef",
        TRL["model_init_kwargs"],
    ),
    **each(
        "disable_gradient_checkpointing use_reentrant_gc",
        Hint("train.activation_checkpointing", "off unless set", only_if(True, False)),
    ),
    **each(
        "pure_bf16 upcast_layernorm upcast_lmhead_output",
        not_needed("train.dtype: bf16 computes in bf16 on fp32 weights, because small updates vanish in bf16 weights"),
    ),
    **each("use_galore galore_target galore_rank use_apollo use_badam badam_mode use_adam_mini use_muon", _SOLVERS),
    **each(
        "plot_loss compute_accuracy predict_with_generate include_effective_tokens_per_second",
        TRANSFORMERS["logging_steps"],
    ),
    **each(
        "export_dir export_size export_device export_legacy_format export_hub_model_id",
        not_needed("a trained model is always exported to runs/NAME/models/LABEL/model, adapters merged"),
    ),
    **each(
        "infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank",
        Hint("generate.backend", "keys of `generate` set the engines", nothing),
    ),
    **each("hf_hub_token ms_hub_token om_hub_token", TRANSFORMERS["hub_token"]),
    **each("use_swanlab swanlab_project swanlab_mode", AXOLOTL["wandb_project"]),
    **each(
        "ray_run_name ray_storage_path ray_num_workers resources_per_worker placement_strategy",
        Hint("train.workers", "every training runs on Ray, one GPU a worker", nothing),
    ),
}

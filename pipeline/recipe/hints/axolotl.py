"""Keys of axolotl that transformers and TRL do not have."""

from __future__ import annotations

from pipeline.recipe.hints.convert import (
    METHODS,
    adapter,
    attention,
    nothing,
    of_method,
    only_if,
    source,
)
from pipeline.recipe.hints.hint import Config, Hint, each, not_needed
from pipeline.recipe.hints.transformers import TRANSFORMERS
from pipeline.recipe.hints.trl import TRL


def _method(value: object, config: Config) -> dict[str, dict] | None:
    return {f"methods.{METHODS[value]}": {}} if isinstance(value, str) and value in METHODS else None


_LORA = TRL["use_dora"]
_ATTENTION = Hint("model.attn_implementation", "sdpa is the default", nothing)
_ENVIRONMENT = not_needed("`tracking` names trackers, and each reads its own environment variables (docs/tracking.md)")
_TOKENIZER = TRL["pad_token"]
_KERNELS = not_needed("kernels of other projects are not patched in; train.torch_compile compiles the layers")
_PACKED = TRL["packing"]
_SHARDED = TRANSFORMERS["fsdp"]
_A_NUMBER_OF_STEPS = "a number of steps, not of times an epoch"

AXOLOTL: dict[str, Hint] = {
    "base_model": Hint("model.path"),
    **each(
        "base_model_config tokenizer_type tokenizer_config tokenizer_use_fast is_llama_derived_model"
        " is_mistral_derived_model overrides_of_model_config model_config",
        TRL["model_init_kwargs"],
    ),
    "revision_of_model": TRL["model_revision"],
    "rl": Hint("", "each loss is a label of `methods` (`otpo methods` lists them)", _method),
    "reward_model": Hint("methods.reward-model", "a method of its own", only_if(True, {})),
    **each("rl_beta dpo_beta", Hint("", "`methods.LABEL.beta`", of_method("beta"))),
    "orpo_alpha": Hint("methods.orpo.orpo_lambda", "of the method orpo"),
    "kto_desirable_weight": Hint("methods.kto.desirable_weight", "of the method kto"),
    "kto_undesirable_weight": Hint("methods.kto.undesirable_weight", "of the method kto"),
    "dpo_label_smoothing": Hint("methods.dpo.label_smoothing"),
    "dpo_use_weighting": TRL["use_weighting"],
    "dpo_norm_loss": Hint("methods.dpo-norm", "a method of its own", only_if(True, {})),
    "dpo_use_logits_to_keep": _PACKED,
    "adapter": Hint("", "`model.lora: {}`, and `model.quantization: 4bit` for qlora", adapter),
    "lora_model_dir": Hint("model.path", "a folder of adapters, or of a merged model", nothing),
    "lora_target_linear": Hint("model.lora.target_modules", "", only_if(True, "all-linear")),
    **each(
        "lora_fan_in_fan_out peft_use_dora peft_use_rslora peft_layers_to_transform lora_target_layers"
        " peft_init_lora_weights peft_layer_replication loraplus_lr_ratio loraplus_lr_embedding relora relora_steps"
        " relora_warmup_steps lora_on_cpu unfrozen_parameters",
        _LORA,
    ),
    **each(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel cut_cross_entropy liger_rope liger_rms_norm"
        " liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy plugins",
        _KERNELS,
    ),
    **each("gptq bnb_config_kwargs", TRL["load_in_8bit"]),
    "datasets": Hint(
        "", "`data.path`, or `data.datasets` for a mix: files or hub names, recognised by their columns", source
    ),
    "test_datasets": TRL["dataset_test_split"],
    "val_set_size": Hint("data.validation", "a fraction if below 1, else a number of rows"),
    **each(
        "dataset_prepared_path shuffle_merged_datasets dataset_processes dataset_exact_deduplication"
        " dataset_keep_in_memory skip_prepare_dataset streaming pretraining_dataset",
        TRL["dataset_num_proc"],
    ),
    "sequence_len": Hint("data.max_length", "most tokens of a prompt and one completion together"),
    "excess_length_strategy": Hint("data.truncation", "keep_start or drop", only_if("drop", "drop")),
    **each(
        "sample_packing eval_sample_packing pad_to_sequence_len sample_packing_eff_est total_num_tokens"
        " multipack_real_batches batch_flattening",
        _PACKED,
    ),
    "micro_batch_size": TRANSFORMERS["per_device_train_batch_size"],
    "batch_size": Hint("train.global_batch_size", "pairs of one step, over all workers and micro-batches"),
    "eval_batch_size": TRANSFORMERS["per_device_eval_batch_size"],
    "num_epochs": TRANSFORMERS["num_train_epochs"],
    "optimizer": TRANSFORMERS["optim"],
    "lr_scheduler": TRANSFORMERS["lr_scheduler_type"],
    **each(
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_groups lr_quadratic_warmup",
        TRANSFORMERS["lr_scheduler_kwargs"],
    ),
    **each("evals_per_epoch", Hint("train.eval_every", _A_NUMBER_OF_STEPS, nothing)),
    **each("saves_per_epoch", Hint("train.save_every", _A_NUMBER_OF_STEPS, nothing)),
    "early_stopping_patience": Hint("train.early_stopping_patience", "needs train.best_metric and train.eval_every"),
    **each(
        "eval_table_size eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval do_bench_eval",
        TRL["generate_during_eval"],
    ),
    **each("flash_attention flash_attn_fuse_mlp", Hint("model.attn_implementation", "sdpa is the default", attention)),
    **each(
        "xformers_attention sdp_attention s2_attention flex_attention eager_attention flash_attn_cross_entropy"
        " flash_attn_rms_norm",
        _ATTENTION,
    ),
    "bfloat16": TRANSFORMERS["bf16"],
    "float16": TRANSFORMERS["fp16"],
    **each(
        "fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size tensor_parallel_size"
        " sequence_parallel_degree context_parallel_size gpu_memory_limit device_map world_size",
        _SHARDED,
    ),
    **each(
        "special_tokens tokens added_tokens_overrides default_system_message chat_template_jinja"
        " fix_untrained_tokens resize_token_embeddings_to_32x shrink_embeddings roles_to_train"
        " train_on_eos",
        _TOKENIZER,
    ),
    **each("wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_log_model wandb_mode", _ENVIRONMENT),
    **each(
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts comet_project_name"
        " comet_api_key use_mlflow use_comet use_wandb",
        _ENVIRONMENT,
    ),
    "use_tensorboard": Hint("tracking", "", only_if(True, ["tensorboard"])),
    "auto_resume_from_checkpoints": TRANSFORMERS["resume_from_checkpoint"],
    "hf_use_auth_token": TRANSFORMERS["hub_token"],
    "strict": not_needed("unknown keys are always refused"),
    **each(
        "profiler_steps loss_watchdog_threshold loss_watchdog_patience gc_steps",
        not_needed("a loss that is not finite stops the training, and says which rows were in the batch"),
    ),
}

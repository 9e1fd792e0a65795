"""Keys of transformers' `TrainingArguments`, which every trainer of TRL takes, of this version and earlier ones."""

from __future__ import annotations

from pipeline.recipe.hints.convert import (
    above_zero,
    batch,
    best_metric,
    choice,
    dtype,
    name_of,
    nothing,
    only_if,
    optimizer,
    trackers,
    warmup,
    whole,
)
from pipeline.recipe.hints.hint import Hint, each, not_needed

_SHARDED = not_needed(
    "the model is sharded over train.workers by FSDP2, one worker a GPU; train.sharding chooses HSDP on several nodes"
)
_LOADER = not_needed("token ids are prepared once and read from disk, so no loader has to be tuned")
_LOGGED = not_needed("every step is a line of runs/NAME/models/LABEL/metrics.jsonl; `tracking` copies it to trackers")
_SAVED = Hint("train.save_every", "steps between checkpoints; the trained model is always exported")
_EVALUATED = Hint("train.eval_every", "steps between evaluations on data.validation")
_PUSHED = not_needed("`otpo push RUN LABEL --to OWNER/NAME` pushes a trained model, when you ask for it")
_TRACKER = not_needed("`tracking` names trackers, and each reads its own environment variables (docs/tracking.md)")
_ALWAYS = not_needed("there is nothing to set: `otpo train` trains and evaluates, `otpo run` also generates and judges")
_ADAMW = not_needed("the optimizer is AdamW with betas 0.9 and 0.999 and epsilon 1e-8")
_RESUMED = not_needed("the same command goes on from the newest checkpoint")
_STEP = not_needed("figures are of the whole global batch, over all workers")
_MEMORY = Hint("train.activation_checkpointing", "less memory for more time; train.micro_batch_tokens too bounds it")
_CARD = not_needed("the figures of an evaluation are always the same: eval_loss, eval_rewards/accuracies and others")

TRANSFORMERS: dict[str, Hint] = {
    # ---- how long, how much at once ----
    "per_device_train_batch_size": Hint(
        "train.micro_batch_size", "a step's batch is train.global_batch_size, over all workers and micro-batches"
    ),
    "gradient_accumulation_steps": Hint(
        "train.global_batch_size",
        "accumulation follows from it: set it to per_device_train_batch_size x gradient_accumulation_steps x GPUs",
        batch,
    ),
    "num_train_epochs": Hint("train.epochs", "may be a fraction", above_zero),
    "max_steps": Hint("train.max_steps", "unset, not -1, trains for train.epochs", above_zero),
    "auto_find_batch_size": Hint("train.micro_batch_tokens", "bounds what a worker computes at once", nothing),
    "per_device_eval_batch_size": not_needed("an evaluation takes twice train.micro_batch_size at once"),
    # ---- learning rate and optimizer ----
    "learning_rate": Hint("train.learning_rate"),
    "lr_scheduler_type": Hint(
        "train.lr_scheduler",
        "cosine, linear or constant, each after the warm-up",
        choice({"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}),
    ),
    "lr_scheduler_kwargs": not_needed("the schedulers are cosine, linear and constant, which take none"),
    "warmup_steps": Hint("train.warmup_ratio", "the fraction of all steps", warmup),
    "warmup_ratio": Hint("train.warmup_ratio"),
    "weight_decay": Hint("train.weight_decay"),
    "max_grad_norm": Hint("train.max_grad_norm"),
    "optim": Hint("train.optimizer", "AdamW with betas 0.9 and 0.999 and epsilon 1e-8", optimizer),
    **each("optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon adafactor", _ADAMW),
    "label_smoothing_factor": Hint("methods.LABEL.label_smoothing", "of the preference loss", nothing),
    "neftune_noise_alpha": not_needed("noise on embeddings is not built in"),
    # ---- precision and memory ----
    "bf16": Hint("train.dtype", "", dtype),
    "fp16": Hint("train.dtype", "bf16 or fp32; fp16 and its loss scaling are not built in", only_if(True, "bf16")),
    **each(
        "bf16_full_eval fp16_full_eval half_precision_backend fp16_opt_level fp16_backend",
        not_needed("an evaluation computes in train.dtype"),
    ),
    "tf32": not_needed("train.dtype is bf16 or fp32, and fp32 is computed in full"),
    "gradient_checkpointing": Hint("train.activation_checkpointing"),
    "gradient_checkpointing_kwargs": not_needed("train.activation_checkpointing is the non-reentrant kind"),
    "torch_compile": Hint("train.torch_compile"),
    **each(
        "torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval use_ipex",
        Hint("train.torch_compile", "true or false", nothing),
    ),
    **each(
        "use_liger_kernel liger_kernel_config",
        not_needed("log-probabilities are always computed without the whole logits, as Liger's fused loss does"),
    ),
    "use_cache": not_needed("training keeps no key-value cache"),
    "torch_empty_cache_steps": Hint(_MEMORY.key, _MEMORY.note, nothing),
    **each("eval_accumulation_steps prediction_loss_only", not_needed("an evaluation keeps no logits")),
    # ---- devices ----
    **each(
        "use_cpu no_cuda", Hint("train.use_gpu", "auto takes GPUs where there is one a worker", only_if(True, False))
    ),
    **each(
        "fsdp fsdp_config deepspeed accelerator_config parallelism_config local_rank ddp_find_unused_parameters"
        " ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp_min_num_params"
        " fsdp_transformer_layer_cls_to_wrap sharded_ddp tpu_num_cores xpu_backend mp_parameters ray_scope",
        _SHARDED,
    ),
    # ---- what is written ----
    "output_dir": Hint("name", "a run writes to runs/NAME below the folder that --runs names", name_of),
    "overwrite_output_dir": not_needed("--redo does changed stages again in the same folder; another name= keeps both"),
    "run_name": Hint("name", "", name_of),
    **each(
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level"
        " log_level_replica disable_tqdm include_num_input_tokens_seen include_tokens_per_second logging_dir",
        _LOGGED,
    ),
    "report_to": Hint("tracking", "one of tensorboard, wandb, mlflow, trackio, or a list", trackers),
    **each("project trackio_space_id trackio_bucket_id trackio_static_space_id", _TRACKER),
    "save_steps": Hint(_SAVED.key, _SAVED.note, whole),
    "save_strategy": Hint(_SAVED.key, _SAVED.note, nothing),
    "save_total_limit": Hint("train.keep_checkpoints", "the best one is kept beside them", above_zero),
    **each(
        "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint",
        not_needed("checkpoints hold the sharded model and optimizer, and the export is safetensors"),
    ),
    **each("resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint", _RESUMED),
    **each(
        "push_to_hub hub_model_id hub_strategy hub_always_push hub_revision hub_private_repo push_to_hub_model_id"
        " push_to_hub_organization",
        _PUSHED,
    ),
    **each("hub_token push_to_hub_token", not_needed("the token is read from HF_TOKEN in the environment alone")),
    # ---- evaluation ----
    "eval_steps": Hint(_EVALUATED.key, _EVALUATED.note, whole),
    **each(
        "eval_strategy evaluation_strategy eval_on_start eval_delay", Hint(_EVALUATED.key, _EVALUATED.note, nothing)
    ),
    "metric_for_best_model": Hint("train.best_metric", "needs train.eval_every", best_metric),
    "load_best_model_at_end": Hint("train.best_metric", "names the figure by which the best step is exported", nothing),
    "greater_is_better": Hint("train.best_mode", "", choice({True: "max", False: "min"})),
    **each(
        "eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics label_names"
        " include_inputs_for_metrics",
        _CARD,
    ),
    # ---- data ----
    "data_seed": Hint("train.seed", "one seed for the order of rows and everything random"),
    "seed": Hint("train.seed"),
    "full_determinism": not_needed("the same seed gives the same order of rows and the same dropout"),
    **each(
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers"
        " dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order past_index",
        _LOADER,
    ),
    "remove_unused_columns": not_needed("columns that training does not read are left alone"),
    **each(
        "train_sampling_strategy length_column_name group_by_length",
        not_needed("rows are shuffled by train.seed, and micro-batches are filled up to a number of tokens"),
    ),
    **each("average_tokens_across_devices", _STEP),
    **each("do_train do_eval do_predict debug skip_memory_metrics", _ALWAYS),
}

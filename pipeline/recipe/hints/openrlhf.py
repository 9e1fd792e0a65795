"""Keys of OpenRLHF's DPO, reward model, KTO and supervised training that the other trainers do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.recipe.hints.axolotl import AXOLOTL
from pipeline.recipe.hints.convert import above_zero, nothing, of_method, only_if
from pipeline.recipe.hints.hint import Config, Hint, Settings, each, not_needed
from pipeline.recipe.hints.llama_factory import LLAMA_FACTORY
from pipeline.recipe.hints.transformers import TRANSFORMERS
from pipeline.recipe.hints.trl import TRL


def _column(role: str) -> Callable[[Any, Config], Settings | None]:
    """The column that is the prompt, ...; nothing where it is called so."""
    return lambda value, config: (
        {f"data.columns.{role}": value} if isinstance(value, str) and value not in ("", role) else None
    )


_COLUMNS = "`data.columns` says which column is what; prompt, chosen, rejected and other usual names are known"
_LENGTH = TRL["max_length"]

OPENRLHF: dict[str, Hint] = {
    "pretrain": Hint("model.path"),
    "ref_pretrain": TRL["sync_ref_model"],
    "ref_offload": TRL["precompute_ref_log_probs"],
    "value_head_prefix": not_needed("a reward model is saved as transformers' classifier, whose head is called score"),
    # ---- the data ----
    **each("input_key prompt_key", Hint("", _COLUMNS, _column("prompt"))),
    "chosen_key": Hint("", _COLUMNS, _column("chosen")),
    "rejected_key": Hint("", _COLUMNS, _column("rejected")),
    "output_key": Hint("", _COLUMNS, _column("completion")),
    "label_key": Hint("", _COLUMNS, _column("label")),
    "apply_chat_template": Hint(
        "data.template", "messages always go through the chat template; chat wraps strings too", only_if(True, "chat")
    ),
    "input_template": Hint("data.template", "literal takes strings as they are: write it into the prompts", nothing),
    "tokenizer_chat_template": TRL["chat_template"],
    "disable_fast_tokenizer": TRL["chat_template"],
    "max_len": Hint(_LENGTH.key, _LENGTH.note, above_zero),
    "prompt_max_len": TRL["max_prompt_length"],
    "dataset_probs": LLAMA_FACTORY["interleave_probs"],
    **each("train_split dataset_split", TRL["dataset_train_split"]),
    "eval_split": TRL["dataset_test_split"],
    "packing_samples": TRL["packing"],
    "multiturn": not_needed("earlier answers of a conversation are context, and the last one is trained"),
    # ---- the loss ----
    "ipo": Hint("methods.ipo", "IPO is a method of its own", only_if(True, {})),
    "nll_loss_coef": Hint("", "`methods.LABEL.sft_weight` of any method", of_method("sft_weight")),
    "desirable_loss_weight": TRL["desirable_weight"],
    "undesirable_loss_weight": TRL["undesirable_weight"],
    "aux_loss_coef": TRL["router_aux_loss_coef"],
    "compute_fp32_loss": not_needed("losses are always computed in fp32"),
    # ---- the steps ----
    "train_batch_size": Hint("train.global_batch_size", "of one optimizer step over all GPUs"),
    "micro_train_batch_size": Hint("train.micro_batch_size", "most that one GPU computes at once"),
    "max_epochs": Hint("train.epochs", "may be a fraction"),
    "max_norm": Hint("train.max_grad_norm"),
    "l2": Hint("train.weight_decay"),
    "lr_warmup_ratio": Hint("train.warmup_ratio"),
    "adam_betas": TRANSFORMERS["adam_beta1"],
    # ---- memory and machines ----
    **each(
        "zero_stage zpg grad_accum_dtype overlap_comm dist_backend ds_tensor_parallel_size deepcompile"
        " use_ds_universal_ckpt disable_trace_cache",
        TRANSFORMERS["fsdp"],
    ),
    "adam_offload": Hint("train.optimizer", "adamw_8bit saves memory; nothing is moved to the CPU", nothing),
    "gradient_checkpointing_use_reentrant": TRANSFORMERS["gradient_checkpointing_kwargs"],
    **each(
        "ring_attn_size ring_head_stride", not_needed("a row stays on one GPU: context parallelism is not built in")
    ),
    # ---- what is left ----
    "save_path": TRANSFORMERS["output_dir"],
    **each("ckpt_path load_checkpoint", TRANSFORMERS["resume_from_checkpoint"]),
    "max_ckpt_num": TRANSFORMERS["save_total_limit"],
    **each("max_ckpt_mem save_hf_ckpt disable_ds_ckpt", LLAMA_FACTORY["export_dir"]),
    **each("wandb_org wandb_group wandb_run_name", AXOLOTL["wandb_project"]),
    "use_ms": LLAMA_FACTORY["ms_hub_token"],
}

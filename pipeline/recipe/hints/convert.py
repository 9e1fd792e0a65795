"""Values of other trainers as values of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.recipe.hints.hint import Config, Settings

METHODS = {
    # TRL's loss_type
    "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo", "nca_pair": "nca", "robust": "robust-dpo",
    "bco_pair": "bco-pair", "sppo_hard": "sppo-hard", "aot": "aot", "aot_pair": "aot", "aot_unpaired": "aot-unpaired",
    "apo_zero": "apo-zero", "apo_down": "apo-down", "discopop": "discopop", "sigmoid_norm": "dpo-norm",
    "kto": "kto", "simpo": "simpo", "alphapo": "alphapo", "cpo": "cpo",
    # axolotl's rl and LLaMA-Factory's stage and pref_loss
    "dpo": "dpo", "orpo": "orpo", "kto_pair": "kto", "rm": "reward-model", "reward": "reward-model",
}  # fmt: skip
"""Names of losses elsewhere -> methods here."""


def method_of(config: Config) -> str:
    """The method that a configuration trains; `dpo` where it says none."""
    for key in ("loss_type", "pref_loss", "rl", "stage"):
        names = config.get(key)
        for name in names if isinstance(names, list) else [names]:
            if name in METHODS and not (key == "stage" and config.get("pref_loss")):
                return METHODS[name]
    if config.get("ipo") is True:
        return "ipo"
    return "reward-model" if config.get("reward_model") is True or "value_head_prefix" in config else "dpo"


def of_method(name: str, method: str = "") -> Callable[[Any, Config], Settings]:
    """A hyperparameter of the method that the configuration trains, or of `method`."""
    return lambda value, config: {f"methods.{method or method_of(config)}.{name}": value}


def loss(value: Any, config: Config) -> Settings | None:
    """TRL's loss_type: a loss, or a list of them of which `sft` is the likelihood of the chosen completion."""
    names = value if isinstance(value, list) else [value]
    main = [name for name in names if name in METHODS]
    rest = [name for name in names if name not in METHODS]
    if len(main) != 1 or set(rest) - {"sft"}:
        return None
    method, found = METHODS[main[0]], dict[str, Any]()
    if rest:
        weights = config.get("loss_weights") or [1.0] * len(names)
        relative = weights[names.index("sft")] / weights[names.index(main[0])]
        found = {f"methods.{method}.sft_weight": relative}
    return found or {f"methods.{method}": {}}


def smoothing(value: Any, config: Config) -> Settings:
    """label_smoothing is EXO's epsilon, and of cDPO where the loss is DPO's."""
    method = method_of(config)
    name = {"exo": "exo_epsilon"}.get(method, "label_smoothing")
    return {f"methods.{method}.{name}": value}


def simpo_margin(value: Any, config: Config) -> Settings | None:
    """SimPO's margin is a ratio here: gamma / beta."""
    beta = config.get("beta", config.get("pref_beta", config.get("rl_beta", 0.1)))
    try:
        return {"methods.simpo.gamma_beta_ratio": round(float(value) / float(beta), 6)}
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def beta(value: Any, config: Config) -> Settings:
    """ORPO's beta is its lambda."""
    method = method_of(config)
    return {f"methods.{method}.{'orpo_lambda' if method == 'orpo' else 'beta'}": value}


def nothing(value: Any, config: Config) -> None:
    """No value here follows from that one."""


def only_if(wanted: Any, then: Any) -> Callable[[Any, Config], Any]:
    """`then` for one value, nothing for any other."""
    return lambda value, config: then if value == wanted else None


def choice(known: Mapping[Any, Any]) -> Callable[[Any, Config], Any]:
    """The value by a table; nothing for one that is not in it."""
    return lambda value, config: known.get(value) if isinstance(value, str | bool | int) else None


def above_zero(value: Any, config: Config) -> Any:
    """A number where it is one above 0; 0, -1 and nothing mean off or unset elsewhere."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def whole(value: Any, config: Config) -> int | None:
    """A count; a fraction of all steps is left to the reader."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 else None


def warmup(value: Any, config: Config) -> float | None:
    """Steps of warm-up as a fraction of all, which transformers 5 takes too."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    steps = config.get("max_steps")
    if value < 1:
        return value
    return round(value / steps, 4) if isinstance(steps, int) and steps >= value else None


def batch(value: Any, config: Config) -> int | None:
    """Accumulation times the batch of one device: what one GPU takes in a step."""
    size = config.get("per_device_train_batch_size", config.get("micro_batch_size"))
    return value * size if isinstance(value, int) and isinstance(size, int) else None


def trackers(value: Any, config: Config) -> list[str] | None:
    """report_to."""
    names = value if isinstance(value, list) else [value]
    known = [name for name in names if name in ("tensorboard", "wandb", "mlflow", "trackio")]
    return known if known or names in (["none"], [None]) else None


def best_metric(value: Any, config: Config) -> str:
    """Trainers of transformers take `loss` for `eval_loss`."""
    return str(value) if str(value).startswith("eval_") else f"eval_{value}"


def optimizer(value: Any, config: Config) -> str | None:
    """AdamW by any library's name, paged or not, with states in 32 or in 8 bits; no other optimizer."""
    found = re.fullmatch(
        r"(?:paged_)?adamw(?:_(?:bnb|torch|hf|fused|apex_fused|torch_fused|32bit))?(_8bit)?", str(value)
    )
    return None if found is None else "adamw" + (found[1] or "")


def dtype(value: Any, config: Config) -> str | None:
    """bf16: true or false."""
    return {True: "bf16", False: "fp32", "auto": "bf16", "full": "bf16"}.get(value)


def name_of(value: Any, config: Config) -> str | None:
    """A run's name, made of a path or a free text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(value)).name).strip(".-_") or None


def source(value: Any, config: Config) -> Settings | None:
    """Data sets: a name, names with commas between, or a list of names or of `{path: ...}`; several make a mix."""
    listed = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    sets = []
    for item in listed:
        named = item if isinstance(item, Mapping) else {"path": item.strip() if isinstance(item, str) else None}
        if not isinstance(named.get("path"), str) or not named["path"]:
            return None
        sets.append({key: named[key] for key in ("path", "split", "fraction") if named.get(key)})
    if len(sets) == 1:
        return {f"data.{key}": sets[0][key] for key in ("path", "split") if key in sets[0]}
    shares = config.get("interleave_probs", config.get("dataset_probs"))
    shares = shares.split(",") if isinstance(shares, str) else shares
    if isinstance(shares, list) and len(shares) == len(sets):
        sets = [each | {"fraction": float(share)} for each, share in zip(sets, shares, strict=True)]
    return {"data.datasets": sets} if sets else None


def target_modules(value: Any, config: Config) -> Any:
    """`all` and `all-linear`, names with commas between, or a list."""
    if value in ("all", "all-linear", True):
        return "all-linear"
    if isinstance(value, str) and "," in value:
        return [name.strip() for name in value.split(",")]
    return value if isinstance(value, str | list) and value else None


def attention(value: Any, config: Config) -> str | None:
    """flash_attn and attn_implementation."""
    known = {"fa2": "flash_attention_2", True: "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
    return known.get(value, value if isinstance(value, str) and value != "auto" else None)


def adapter(value: Any, config: Config) -> Settings | None:
    """The adapter of axolotl: lora or qlora."""
    if value == "qlora":
        return {"model.lora": {}, "model.quantization": "4bit"}
    return {"model.lora": {}} if value == "lora" else None


def peft(value: Any, config: Config) -> Settings | None:
    """A peft configuration as a section."""
    if not isinstance(value, Mapping):
        return {"model.lora": {}} if value else None
    known = ("r", "lora_alpha", "lora_dropout", "target_modules")
    return {"model.lora": {key: value[key] for key in known if key in value}}

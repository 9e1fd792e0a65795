"""LoRA and QLoRA by peft: small trained matrices beside frozen weights.

The adapters are put into the transformers model itself, so everything that works on a model (flat batches, FSDP2, the
fused log-probabilities) works on an adapted one. With its adapters off it is the model that training started from: the
reference needs no second copy.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from otpo.errors import UserError
from otpo.kernels.held_logits import Logits
from otpo.models.disk.architecture import language_config, read_config, skeleton
from otpo.models.disk.deferred import is_deferred
from otpo.models.policy import PolicyModel
from otpo.records import SequenceBatch

ADAPTER = "default"  # peft's name for a model's only adapter


def add_adapters(lm: PreTrainedModel, settings: Mapping[str, Any], *, seed: int) -> PreTrainedModel:
    """Put LoRA adapters into a model, in place: they are trained, in float32, and everything else is frozen.

    The second matrix of each adapter is zero, so the model still computes what it did before.

    Args:
        settings: `r`, `lora_alpha`, `lora_dropout` and `target_modules` of peft's `LoraConfig`. "all-linear" is every
            linear layer except the head, including the experts of mixture models.
        seed: of the first matrices, which must be the same on every rank.

    Raises:
        UserError: the model has no such modules, they include the head or the embeddings, or peft cannot adapt them
            with these settings (dropout on experts).
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared = {*lm.all_tied_weights_keys, *lm.all_tied_weights_keys.values()}
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    with torch.random.fork_rng(), without_memory(lm):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, lm, ADAPTER)
        except ValueError as error:
            reason = re.sub(r"\(\n.*\n\)", "", str(error), flags=re.DOTALL)  # a module with all that is inside of it
            raise UserError(f"model.lora: peft cannot adapt {_name(lm)}: {reason} {_others(lm, reason)}") from error
    if any(isinstance(end, BaseTunerLayer) for end in (lm.get_output_embeddings(), lm.get_input_embeddings())):
        raise UserError(
            f"model.lora.target_modules: {settings['target_modules']!r} includes the head or the embeddings of"
            f" {lm.name_or_path}. They cannot have adapters here: log-probabilities are computed from the head's weight"
            " itself, which many models share with the embeddings. Leave them out, or use all-linear, which does."
        )
    _check_named(lm, settings["target_modules"])
    _check_forwards(lm)
    _check_shared(lm, shared)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return lm


def _check_named(lm: PreTrainedModel, wanted: str | Collection[str]) -> None:
    """Refuse names of which the model has no module: peft adapts the others of a list without a word."""
    from peft.tuners.lora.layer import ParamWrapper

    modules = dict(lm.named_modules())
    if isinstance(wanted, str) or any(isinstance(module, ParamWrapper) for module in modules.values()):
        return  # experts in one weight are adapted under names that are no modules'
    absent = [each for each in wanted if not any(f".{name}".endswith(f".{each}") for name in modules)]
    if absent:
        raise UserError(
            f"model.lora.target_modules: {_name(lm)} has no module {', '.join(absent)}. {_others(lm, ' '.join(absent))}"
        )


def _check_forwards(lm: PreTrainedModel) -> None:
    """Refuse adapters of layers that do not compute a linear layer's output: Llama 4's router gives two, and Jamba
    multiplies by the weight of its `dt_proj` itself, so that adapters there would never be trained.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in lm.named_modules():
        base: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        if isinstance(base, nn.Linear) and (_computes_otherwise(base) or name.endswith(".dt_proj")):
            raise UserError(
                f"model.lora: {name} of {_name(lm)} is no plain linear layer, and adapters do not work there."
                f" {_others(lm, name)}"
            )


def _computes_otherwise(linear: nn.Linear) -> bool:
    kind = type(linear)
    return kind.__module__.startswith("transformers.models") and kind.forward is not nn.Linear.forward


def _check_shared(lm: PreTrainedModel, shared: Collection[str]) -> None:
    """Refuse adapters beside weights that several layers share (Zamba): each would have its own, and one weight can be
    merged with one of them alone.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {
        f"{name}.{getattr(layer, 'parameter_name', 'weight')}"
        for name, layer in lm.named_modules()
        if isinstance(layer, LoraLayer)
    }
    if found := sorted(adapted.intersection(shared)):
        raise UserError(
            f"model.lora: in {_name(lm)} several layers share one weight, as {found[0]}. Each would get adapters of its"
            f" own, which cannot be merged into that weight. {_others(lm, ' '.join(found))}"
        )


def _name(lm: PreTrainedModel) -> str:
    return lm.name_or_path or type(lm).__name__


def _others(lm: PreTrainedModel, refused: str) -> str:
    """What to do instead: the linear layers of a model that a refusal does not mention, by their names' last parts."""
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if type(module) is nn.Linear and module is not head]
    names = sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in linear})
    found = [name for name in names if not re.search(rf"\b{name}\b", refused) and name not in ("dt_proj", ADAPTER)]
    return f"Name others in model.lora.target_modules; it has {found}."


@contextmanager
def without_memory(lm: PreTrainedModel) -> Iterator[None]:
    """Let weights that are not read yet look as if they were on the CPU: peft makes adapters where the weights are."""
    stand_ins = [
        (module, name, weight)
        for module in (lm.modules() if is_deferred(lm) else ())
        for name, weight in module.named_parameters(recurse=False)
    ]
    for module, name, weight in stand_ins:
        value = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        setattr(module, name, nn.Parameter(value, requires_grad=weight.requires_grad))
    try:
        yield
    finally:
        for module, name, weight in stand_ins:
            setattr(module, name, weight.requires_grad_(getattr(module, name).requires_grad))


def check_adapters(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Try `add_adapters` on a model without weights, to find early what it would refuse.

    Raises:
        UserError: there is no such model, or it cannot have these adapters.
    """
    add_adapters(skeleton(language_config(read_config(path)), "eager"), settings, seed=0)


def check_quantization(quantization: str, *, gpu: bool) -> None:
    """Refuse 4-bit weights on machines that cannot compute with them.

    Args:
        quantization: `model.quantization` of the recipe.
        gpu: whether training will have a CUDA device.

    Raises:
        UserError: there is no GPU, or bitsandbytes is not installed.
    """
    if quantization == "none":
        return
    if not gpu:
        raise UserError(
            f"model.quantization is {quantization}, which needs a CUDA GPU for every training worker; found none. Set"
            " model.quantization=none: LoRA alone (model.lora) works on a CPU too."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization is {quantization}, which needs bitsandbytes; it is not installed. Run"
            " `pip install bitsandbytes` in this environment, or set model.quantization=none."
        )


def has_adapters(lm: nn.Module) -> bool:
    """Whether `add_adapters` was called on a model."""
    return ADAPTER in getattr(lm, "peft_config", {})


@contextmanager
def adapters_off(lm: nn.Module) -> Iterator[None]:
    """Switch a model's adapters off while the body runs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:
        parameter.requires_grad_(True)  # peft freezes adapters that it switches off; FSDP must see them as trained
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class UnadaptedReference:
    """The reference of an adapted policy: the policy's own weights with the adapters off."""

    def __init__(self, policy: PolicyModel):
        self.policy = policy

    def lazy_logits(self, batch: SequenceBatch) -> Logits:
        """The reference's logits for the completions' tokens; see `PolicyModel.lazy_logits`."""
        with adapters_off(self.policy):
            return self.policy.lazy_logits(batch)


def gather_adapters(lm: nn.Module) -> dict[str, Tensor]:
    """The unsharded adapters on the CPU, by the names that peft saves them under. All ranks must call it."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": _whole(parameter.detach()).cpu()
        for name, parameter in lm.named_parameters()
        if parameter.requires_grad
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_adapters(lm: PreTrainedModel, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model's adapters, from `gather_adapters`, to a folder in peft's format."""
    config: Any = copy(lm.peft_config[ADAPTER])  # type: ignore[index]
    config.inference_mode, config.base_model_name_or_path = True, lm.name_or_path
    config.save_pretrained(folder)
    save_file(dict(adapters), folder / "adapter_model.safetensors", {"format": "pt"})


def merged_weights(lm: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some weights of an adapted model, with their adapters merged into them: summed in float32 and rounded once.

    Args:
        tensors: the weights by name, not sharded, as they stand in the model; with those of their adapters, which are
            left out of the result.
    """
    from peft.tuners.lora import LoraLayer

    there, merged = {id(tensor) for tensor in tensors.values()}, {}
    for layer in lm.modules():
        if isinstance(layer, LoraLayer):
            name = getattr(layer, "parameter_name", "weight")  # layers of experts name theirs
            weight = getattr(layer.get_base_layer(), name)
            if id(weight) in there:
                delta = layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined,operator]  # every kind has it
                merged[id(weight)] = (weight.float() + delta).to(weight.dtype)
    return {name: merged.get(id(tensor), tensor) for name, tensor in tensors.items() if ".lora_" not in name}


@torch.no_grad()
def merge_adapters(lm: PreTrainedModel, config: Any, adapters: Mapping[str, Tensor]) -> PreTrainedModel:
    """Merge adapters into the model that they were trained beside, which is as it was saved and not sharded.

    Args:
        config: peft's configuration of the adapters.
        adapters: from `gather_adapters`.

    Returns:
        The merged model.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    adapted = get_peft_model(lm, config, adapter_name=ADAPTER)
    set_peft_model_state_dict(adapted, dict(adapters), adapter_name=ADAPTER)
    weights = dict(adapted.named_parameters())
    for name, merged in merged_weights(adapted, weights).items():
        weights[name].data = merged
    return adapted.unload()

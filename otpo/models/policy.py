"""Causal language models that answer one question: the log-probability of each completion token.

Shape legend: S sequences, T padded completion length, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from otpo.data.collate import padded
from otpo.errors import UserError
from otpo.kernels.cpu.buckets import filled
from otpo.kernels.mixed_precision import compute_in
from otpo.models.attention import share_prompts
from otpo.models.logprobs import Passes, Predictions
from otpo.models.quiet import no_bars
from otpo.records import LogProbs, PairLogProbs, SequenceBatch


def load_causal_lm(
    path: str | Path, *, attn_implementation: str = "sdpa", four_bit: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal LM in the precision it was saved in, dropout off. No code from the model's folder is run.

    Args:
        four_bit: the precision to compute in from weights of 4 bits (NF4 with doubly quantised scales, as in QLoRA,
            https://arxiv.org/abs/2305.14314), by bitsandbytes on this process's GPU; None leaves the weights alone.

    Raises:
        UserError: there is no such model, or it needs code of its own.
    """
    options: dict[str, Any] = {"dtype": "auto"}
    if four_bit is not None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=four_bit,
        )
        device = torch.device("cuda", torch.cuda.current_device())
        options = {"dtype": four_bit, "quantization_config": quantization, "device_map": {"": device}}
    try:
        with no_bars() if Path(path).is_dir() else nullcontext():  # a download shows how far it is
            lm = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attn_implementation, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"No causal language model could be loaded from '{path}': {error}") from error
    return without_dropout(lm)


def without_dropout(lm: PreTrainedModel) -> PreTrainedModel:
    """The same model; none of its dropout ever acts."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return lm


class PolicyModel(nn.Module):
    """A causal LM whose forward gives per-token log-probabilities; only completion positions meet the vocabulary.

    The head is applied inside this module's forward because that is where FSDP2 holds its weight whole.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        config = lm.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
            getattr(config, "logits_scaling", 1.0) or 1.0
        )
        self.shares_prompts = share_prompts(lm)
        self.passes = Passes()

    def forward(
        self, batch: SequenceBatch, wanted: Collection[str] = (), reference: Predictions | None = None, layer: int = -1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities of the completions and, of each token, what else is wanted; 0 where padded.

        Args:
            wanted: "hidden": states at the predicting positions, detached; "log_sum_squares": log sum_v p_v^2;
                "reference_kl": KL(reference | self).
            reference: what the reference predicts for this batch, for "reference_kl".
            layer: whose states are wanted, as an index into transformers' `hidden_states`; -1 are those after the final
                norm. No other layer's are kept.

        Returns:
            logps (S, T) float32; those of the other things that were wanted: hidden (S, T, D) float32, the rest (S, T).
        """
        hidden, predictions = self._predict(batch, layer if "hidden" in wanted else -1)
        values = predictions.logprobs(
            batch.targets[batch.mask],
            squares="log_sum_squares" in wanted,
            reference=reference if "reference_kl" in wanted else None,
        )
        logps, log_sum_squares, kl = (
            None if flat is None else flat.new_zeros(batch.mask.shape).masked_scatter(batch.mask, flat)
            for flat in values
        )
        assert logps is not None
        named = {"log_sum_squares": log_sum_squares, "reference_kl": kl}
        if "hidden" in wanted:
            named["hidden"] = hidden.detach().float() * batch.mask[..., None]
        return logps, {name: value for name, value in named.items() if value is not None}

    def predictions(self, batch: SequenceBatch) -> Predictions:
        """What this model predicts at the completions' positions, for another model's KL to it."""
        return self._predict(batch)[1]

    def _predict(self, batch: SequenceBatch, layer: int = -1) -> tuple[Tensor, Predictions]:
        """States (S, T, D) of a layer at the predicting positions, and what the last one's predict."""
        layers, kept = self.lm.config.num_hidden_layers, []
        number = _number(layer, layers)
        inner = number < layers  # transformers' last states are those after the norm
        if inner:
            hook = self.lm.get_decoder().layers[number - 1].register_forward_hook(lambda _, __, out: kept.append(out))
        states = self._decode(batch)
        predicting = self._pick(states, batch)
        if inner:
            hook.remove()
            states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        head = self.lm.get_output_embeddings()
        predictions = Predictions(predicting[batch.mask], head.weight, head.bias, self.scale, self.softcap, self.passes)
        return (self._pick(states.detach(), batch) if inner else predicting), predictions

    def states(self, batch: SequenceBatch, *, last: bool = False) -> Tensor:
        """Hidden states after the final norm: (S, T, D) at the predicting positions, or (S, D) of the last tokens."""
        return self._pick(self._decode(batch), batch, last=last)

    def _decode(self, batch: SequenceBatch) -> Tensor:
        """States after the final norm as the decoder lays them out: (1, N, D) flat, or (S, L, D) padded.

        N and L are filled up (`otpo.kernels.cpu.buckets`).
        """
        about: dict[str, Tensor]
        if self.shares_prompts:
            ids, about = batch.input_ids[None], {"position_ids": batch.position_ids[None]}
        else:
            ids, attention_mask, _ = padded(batch)
            about = {"attention_mask": attention_mask}
        embeddings: Any = self.lm.get_input_embeddings()
        filling = filled(ids.shape[1], embeddings.weight) - ids.shape[1]
        layout: dict[str, Any] = {name: nn.functional.pad(values, (0, filling)) for name, values in about.items()}
        # with a token that is there already: another one's embedding may not be finite
        layout["input_ids"] = torch.cat([ids, ids[:, :1].expand(-1, filling)], dim=1)
        if self.shares_prompts:
            layout["batch"] = batch
        return self.lm.get_decoder()(use_cache=False, **layout).last_hidden_state

    def _pick(self, states: Tensor, batch: SequenceBatch, *, last: bool = False) -> Tensor:
        if self.shares_prompts:
            ends = list(itertools.accumulate(batch.segments))
            return states[0][[ends[answer] - 1 for _, answer in batch.sequences] if last else batch.positions]
        sequences = torch.arange(len(states), device=states.device)
        if last:
            return states[sequences, torch.tensor(batch.lengths, device=states.device) - 1]
        return states[sequences[:, None], padded(batch)[2]]


def _number(layer: int, layers: int) -> int:
    """A decoder layer's number from 1, counted from the end where it is negative."""
    return layer if layer > 0 else layers + 1 + layer


def check_layer(where: str, path: str | Path, layer: int) -> None:
    """Raise a `UserError` if a model (its folder or hub name) has no such layer of hidden states."""
    layers = AutoConfig.from_pretrained(path).num_hidden_layers
    if not 1 <= _number(layer, layers) <= layers:
        raise UserError(
            f"{where}: {path} has {layers} decoder layers: expected 1 to {layers}, or -1 (the last) to -{layers},"
            f" found {layer}."
        )


def distribute(
    model: PolicyModel,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    keep_head: bool = False,
) -> PolicyModel:
    """Float32 master weights, compute in `dtype`: sharded over the workers of the mesh, or whole on a single one.

    Beside adapters (`otpo.models.adapters`) the frozen weights keep the precision they were saved in.

    Args:
        keep_head: see `shard`.
    """
    if mesh.size() > 1:
        return shard(model, mesh, dtype=dtype, activation_checkpointing=activation_checkpointing, keep_head=keep_head)
    _prepare(model, mesh.device_type, activation_checkpointing)
    compute_in(dtype, _mastered(model), decoder_layers(model), _other_passes(model))
    return model


def shard(
    model: PolicyModel,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    keep_head: bool = False,
) -> PolicyModel:
    """FSDP2 over the mesh: float32 master weights, compute in `dtype`, gradients reduced in float32.

    Each decoder layer is a unit of its own; embeddings, final norm and head belong to the root. Gradients come out as
    the mean over ranks: a loss divided by the global number of pairs must be multiplied by the world size.

    Beside adapters the frozen weights are sharded like the rest; those of 4 bits, which cannot be cut, lie whole on
    every rank.

    Args:
        keep_head: keep the root's weights whole after a forward pass. For a frozen model whose head the policy's
            backward pass reads (`Predictions`).
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = {p for p in model.parameters() if not p.is_floating_point()}
    _prepare(model, mesh.device_type, activation_checkpointing)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=whole)
    # Else the root would stay whole after a forward pass without a backward one (frozen, evaluation): an optimizer or
    # a checkpoint made then would hold the whole copies, which are never updated.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_head, ignored_params=whole)
    for name in _other_passes(model):
        register_fsdp_forward_method(model, name)
    return _mastered(model)  # only now: whole on every device, an 8B model in float32 would take 32 GB


def _mastered(model: PolicyModel) -> PolicyModel:
    return model.float() if all(p.requires_grad for p in model.parameters()) else model


def _prepare(model: PolicyModel, device: str, activation_checkpointing: bool) -> None:
    if all(p.is_floating_point() for p in model.parameters()):
        model.to(device)  # else loading has put it there
    if activation_checkpointing:
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def decoder_layers(model: PolicyModel) -> list[nn.Module]:
    """The layers of its language model, from the first to the last."""
    names = set(model.lm._no_split_modules or ())  # transformers' own word for a layer that stays in one piece
    # of a sharded layer FSDP2 has made a class of its own, which is derived from the layer's
    return [m for m in model.lm.modules() if names.intersection(kind.__name__ for kind in type(m).__mro__)]


def _other_passes(model: PolicyModel) -> list[str]:
    return [name for name in ("predictions", "scores") if hasattr(model, name)]


def pair_logprobs(
    logps: Tensor, extras: Mapping[str, Tensor], batch: SequenceBatch, frozen: Mapping[str, Tensor]
) -> PairLogProbs:
    """Cut a batch of 2B sequences (chosen first) into the two sides.

    Args:
        logps: (2B, T). extras: what else `PolicyModel` gave. frozen: name -> (2B, T).
    """
    half = len(logps) // 2

    def side(part: slice) -> LogProbs:
        width = max(1, int(batch.mask[part].sum(-1).max())) if half else 1
        cut = (part, slice(0, width))
        return LogProbs(
            policy=logps[cut],
            mask=batch.mask[cut],
            rows=batch.rows[part],
            frozen={name: values[cut] for name, values in frozen.items()},
            vocabulary={name: values[cut] for name, values in extras.items() if name != "hidden"},
            hidden=extras["hidden"][cut] if "hidden" in extras else None,
        )

    return PairLogProbs(chosen=side(slice(0, half)), rejected=side(slice(half, None)))

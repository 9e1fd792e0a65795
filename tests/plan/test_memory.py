"""A plan's bytes against what torch allocates: exactly for what is kept, within a few percent for activations."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from support.steps import go
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from otpo.data.collate import collate_pairs
from otpo.methods.weights.transport import cost_matrix, sinkhorn_unbalanced
from otpo.models import attention, backbone
from otpo.models.adapters import add_adapters
from otpo.models.policy import PolicyModel
from otpo.models.sharding import checkpoint_layers, distribute
from otpo.records import TokenPair
from otpo.training.optimizer import adamw
from pipeline.plan.memory import Load, activations, memory_parts, token_activations, transport
from pipeline.plan.shape import shape_of

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
}
LOAD = Load(
    dtype_bytes=2, adapters=False, four_bit=False, live_reference=False, states=False, tokens=1, sequence_tokens=1,
    completion_tokens=1, micro_batches=1, checkpointing=False,
)  # fmt: skip


def folder(where: Path, model_type: str = "llama", dtype: str = "bfloat16", **changes) -> Path:
    """A model folder in which there is nothing but a config."""
    AutoConfig.for_model(model_type, **SIZES | {"tie_word_embeddings": False} | changes, dtype=dtype).save_pretrained(
        where
    )
    return where


def random_model(path: Path):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path)
    return AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def kept_bytes(model, optimizer) -> dict[str, int]:
    """Bytes of a rank's weights, gradients (at the update) and optimizer states."""

    def size(tensors) -> int:
        local = [getattr(t, "_local_tensor", t) for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    found = {}
    optimizer.register_step_pre_hook(
        lambda *_: found.update(gradients=size(p.grad for p in model.parameters() if p.grad is not None))
    )
    go(model, optimizer)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return found | {"weights": size(model.parameters()), "optimizer": size(states)}


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_one_worker_keeps_what_is_planned(tmp_path: Path, model_type: str, tied: bool, lora) -> None:
    path = folder(tmp_path, model_type, tie_word_embeddings=tied)
    lm = random_model(path)
    if lora:
        add_adapters(lm, lora, seed=0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = distribute(PolicyModel(lm), init_device_mesh("cpu", (1,)), dtype=torch.bfloat16)
    found = kept_bytes(model, adamw(model, lr=1e-3, weight_decay=0.0))
    torch.distributed.destroy_process_group()
    shape = shape_of(path, lora)
    assert shape.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    assert shape.tied is tied
    planned = memory_parts(shape, replace(LOAD, adapters=lora is not None), ranks=1)
    assert found == {name: planned[name] for name in found}


def _rank(rank: int, path: str, out: str) -> None:
    store = torch.distributed.FileStore(f"{out}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name, lora in (("all", None), ("lora", LORA)):
        lm = random_model(Path(path))
        if lora:
            add_adapters(lm, lora, seed=0)
        model = distribute(PolicyModel(lm), init_device_mesh("cpu", (2,)), dtype=torch.bfloat16)
        found = kept_bytes(model, adamw(model, lr=1e-3, weight_decay=0.0))
        # a micro-batch that is not the last one: gradients are not reduced
        model.set_requires_gradient_sync(False)
        model(collate_pairs([TokenPair(0, [5, 6, 7], [8, 9], [10])]))[0].sum().backward()
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        whole = [p.unsharded_accumulated_grad for group in groups if group for p in group.fsdp_params]
        found["gradients between micro-batches"] = sum(t.numel() * t.element_size() for t in whole if t is not None)
        save_file({part: torch.tensor(value) for part, value in found.items()}, f"{out}/{name}{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_keep_what_is_planned(tmp_path: Path) -> None:
    """Every dimension is even, so both ranks hold exactly half."""
    path = folder(tmp_path / "model")
    mp.spawn(_rank, (str(path), str(tmp_path)), nprocs=2)
    for name, lora in (("all", None), ("lora", LORA)):
        load = replace(LOAD, adapters=lora is not None, micro_batches=2)
        planned = memory_parts(shape_of(path, lora), load, ranks=2, device="cpu")
        for rank in range(2):
            found = {part: int(value) for part, value in load_file(tmp_path / f"{name}{rank}.safetensors").items()}
            assert len(found) == 4 and found == {part: planned[part] for part in found}


PAIRS = [
    TokenPair(i, list(range(3, 3 + p)), list(range(5, 5 + c)), list(range(7, 7 + r)))
    for i, (p, c, r) in enumerate([(20, 40, 30), (12, 50, 8), (30, 21, 33)])
]


def saved_bytes(model: PolicyModel, batch) -> int:
    """Bytes that the decoder keeps for its backward pass, weights aside; the same memory is counted once."""
    seen: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(storage)  # memory that is given back may be given out again
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.backbone.decode(batch)
    return sum(seen.values())


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention that GPUs take, and no padding to sizes that a CPU likes."""
    monkeypatch.setattr(attention, "uses_cpu_kernels", lambda tensor: False)
    monkeypatch.setattr(backbone, "bucket_size", lambda size, weight: size)


@pytest.mark.parametrize(
    ("model_type", "dtype", "within"),
    [("llama", "bfloat16", 0.03), ("llama", "float32", 0.03), ("qwen2", "bfloat16", 0.03), ("qwen3", "bfloat16", 0.03),
     ("mixtral", "bfloat16", 0.1), ("qwen3_moe", "bfloat16", 0.1)],
)  # fmt: skip
def test_a_layer_keeps_what_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, dtype: str, within: float
) -> None:
    """What surrounds the layers is told apart from them by their number. Of experts, the router is not planned."""
    as_on_a_gpu(monkeypatch)
    batch = collate_pairs(PAIRS)
    found = []
    for layers in (1, 3):
        path = folder(
            tmp_path / str(layers), model_type, dtype, num_hidden_layers=layers, **EXPERTS.get(model_type, {})
        )
        found.append(saved_bytes(PolicyModel(random_model(path).train()), batch))
    per_layer = (found[1] - found[0]) / 2
    tokens, sequences = sum(batch.segments), sum(batch.lengths)
    of_token, of_sequence = token_activations(shape_of(path), replace(LOAD, dtype_bytes=2 if "b" in dtype else 4))
    planned = of_token * tokens + of_sequence * sequences
    print(
        f"{model_type} {dtype}: planned {planned:,.0f} B a layer, kept {per_layer:,.0f}: {planned / per_layer - 1:+.1%}"
    )
    assert planned == pytest.approx(per_layer, rel=within)


def peak_bytes(work) -> int:
    """Bytes that a function allocates at most, by the profiler's record of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize(("device", "precision"), [("cpu", torch.float64), ("cuda", torch.float32)])
@pytest.mark.parametrize(
    ("pairs", "tokens", "hidden"), [(4, 300, 64), (4, 100, 512), (4, 200, 256)], ids=["long", "wide", "between"]
)
def test_token_weights_take_what_is_planned(tmp_path: Path, pairs, tokens, hidden, device, precision) -> None:
    """A GPU's part is measured on the CPU too, with the precision that a GPU iterates in."""
    states = [torch.randn(pairs, tokens, hidden) for _ in range(2)]
    masks = [torch.ones(pairs, tokens, dtype=torch.bool) for _ in range(2)]
    masses = [mask.double() for mask in masks]

    def weigh():
        costs = cost_matrix(*states, *masks)
        return sinkhorn_unbalanced(costs, *masses, reg=0.1, reg_m=1.0, largest_cost=1.0, precision=precision)

    load = replace(LOAD, states=True, completion_tokens=2 * pairs * tokens, pair_tokens=2 * tokens)
    planned = transport(shape_of(folder(tmp_path, hidden_size=hidden)), load, device)
    found = peak_bytes(weigh)
    print(f"planned {planned:,} B, allocated {found:,}: {planned / found - 1:+.1%}")
    assert planned == pytest.approx(found, rel=0.04)
    assert transport(shape_of(tmp_path), replace(load, states=False), device) == 0


def test_token_weights_are_made_before_gradients_need_room(tmp_path: Path) -> None:
    """Of a single micro-batch on a GPU: gradients take the place of activations, and of what weighed the tokens."""
    shape = shape_of(folder(tmp_path))
    few = replace(LOAD, states=True, tokens=8, sequence_tokens=8, completion_tokens=8, pair_tokens=4)
    many = replace(few, tokens=4000, sequence_tokens=4000, completion_tokens=4000, pair_tokens=2000)
    assert memory_parts(shape, few, 1)["token weights"] == memory_parts(shape, few, 1)["activations"] == 0
    parts = memory_parts(shape, many, 1)
    assert parts["token weights"] == transport(shape, many, "cuda") and parts["activations"] > 0
    assert parts["gradients"] + parts["activations"] == activations(shape, many)
    assert memory_parts(shape, replace(few, micro_batches=2), 1)["token weights"] == transport(shape, few, "cuda") > 0


def test_checkpointing_keeps_a_layers_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    batch = collate_pairs(PAIRS)
    found = []
    for layers in (1, 3):
        model = PolicyModel(random_model(folder(tmp_path / str(layers), num_hidden_layers=layers)))
        checkpoint_layers(model)
        found.append(saved_bytes(model, batch))
    shape = shape_of(tmp_path / "3")
    load = replace(LOAD, tokens=sum(batch.segments), sequence_tokens=sum(batch.lengths), checkpointing=True)
    planned = activations(shape, load) - activations(replace(shape, layers=1), load)
    assert (found[1] - found[0]) == pytest.approx(planned, rel=0.01)


def test_the_figures_of_actmem(tmp_path: Path) -> None:
    """KiB a token and layer that were measured on the meta device for models of these widths, prompts shared."""
    measured = {"8B": 209.2, "3B": 138.2, "0.5B": 58.8}
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    middle = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
    small = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    sequences = 1.24  # tokens of sequences, prompts included, for each token that is computed
    for (name, kib), sizes in zip(measured.items(), (wide, middle, small), strict=True):
        head = {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "num_hidden_layers": 1}
        of_token, of_sequence = token_activations(shape_of(folder(tmp_path / name, **sizes | head)), LOAD)
        assert (of_token + sequences * of_sequence) / 1024 == pytest.approx(kib, rel=0.005)


def test_experts_count_whole_and_work_in_part(tmp_path: Path) -> None:
    path = folder(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    shape, lm = shape_of(path), random_model(path)
    assert shape.parameters == sum(p.numel() for p in lm.parameters())
    experts = 3 * 4 * (3 * 64 * 192)  # layers, experts, matrices
    assert shape.decoder - shape.active == experts // 2 and shape.middle == 2 * 192


def test_a_config_is_all_that_is_read(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert [file.name for file in path.iterdir()] == ["config.json"] and shape_of(path).layers == 3
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"

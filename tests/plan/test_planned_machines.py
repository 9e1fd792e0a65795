"""Plans of machines as people have them: kinds of GPUs by what a driver says, odd counts, engines that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from jobs.cli import app
from otpo.errors import UserError
from pipeline.plan import Plan, gpu_machine, known_gpu, plan, shape_of
from pipeline.plan.machine import GIB
from pipeline.plan.plan import duration
from pipeline.recipe import ModelConfig, load_recipe
from pipeline.train.launcher import padded_batches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the config of Llama 3 8B."""
    folder = tmp_path_factory.mktemp("8b")
    AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def planned(model: Path, nodes: int, per_node: int, *overrides: str) -> Plan:
    recipe = load_recipe("llama3_8b_otpo", [f"model.path={model}", *overrides])
    return plan(recipe, shape_of(model), gpu_machine("H100", nodes=nodes, per_node=per_node))


def otpo(model: Path, *words: str):
    return CliRunner().invoke(app, ["plan", "llama3_8b_otpo", f"model.path={model}", *words])


@pytest.mark.parametrize(
    ("name", "gib", "kind", "memory"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100", 79),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5, "H100", 9.5),
        ("NVIDIA A100-SXM4-40GB", 39.5, "A100-40G", 39),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100", 79),
        ("NVIDIA L40S", 44.4, "L40S", 44),
        ("NVIDIA L40", 44.4, None, None),  # no L4
        ("NVIDIA GH200 480GB", 95.0, None, None),  # no H200
        ("NVIDIA GeForce RTX 4090", 23.5, None, None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_memory(name: str, gib: float, kind: str | None, memory: float | None) -> None:
    found = known_gpu(name, int(gib * GIB))
    assert (found and found.name) == kind
    assert found is None or found.memory == int((memory or 0) * GIB)


def test_float32_is_planned_at_its_own_speed(model: Path) -> None:
    """It is computed in full: 67 TFLOP/s of an H100 where bfloat16 has 989."""
    half, full = (planned(model, 1, 8, f"train.dtype={dtype}", "train.save_every=null") for dtype in ("bf16", "fp32"))
    assert full.asked.step_seconds == pytest.approx(half.asked.step_seconds * 989 / 67)
    assert full.asked.mfu == pytest.approx(half.asked.mfu)
    assert full.hours > 10 * half.hours
    assert any("67 TFLOP/s of H100's data sheet in fp32" in line for line in full.assumptions)


def test_a_step_takes_as_long_as_the_gpu_with_most_rows(model: Path) -> None:
    few = [planned(model, 1, 8, f"train.global_batch_size={rows}") for rows in (8, 4, 12, 16)]
    seconds = [made.asked.step_seconds * made.asked.computing for made in few]
    assert seconds == pytest.approx([seconds[0], seconds[0], 2 * seconds[0], 2 * seconds[0]])


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 4)])
def test_an_engine_larger_than_a_node_is_told(model: Path, nodes: int, per_node: int) -> None:
    words = ("--gpu", "H100", "--nodes", str(nodes), "--gpus-per-node", str(per_node))
    shown = otpo(model, "generate.tensor_parallel_size=8", *words).output
    assert "no node has room for an engine of 8 GPUs (generate.tensor_parallel_size): each has 4" in shown
    assert "outputs in" not in shown
    assert "4 engines of 2 GPUs" in otpo(model, "generate.tensor_parallel_size=2", *words, "--nodes", "2").output
    small = otpo(model, "--gpu", "L4", "--gpus-per-node", "1", "model.lora={}", "generate.gpu_memory_utilization=0.5")
    assert "which do not fit: it takes larger nodes" in small.output


def test_a_model_that_training_refuses_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = otpo(tmp_path, "--gpu", "H100")
    assert isinstance(shown.exception, UserError) and "found one quantised by gptq" in str(shown.exception)
    AutoConfig.for_model("mamba", num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'mamba' has none"):
        shape_of(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_recipe_for_gpus_asks_for_their_kind_where_there_are_none(model: Path) -> None:
    shown = otpo(model)
    assert isinstance(shown.exception, UserError) and "name the kind that it will run on with --gpu" in str(
        shown.exception
    )


def test_an_elastic_group_is_planned_with_its_fewest_workers(model: Path) -> None:
    assert "otpo on 2 H100s" in otpo(model, "train.workers=[2,16]", "--gpu", "H100").output


def test_numbers_that_mean_nothing_are_refused(model: Path) -> None:
    for words in (("--rows", "0"), ("--rows", "-5"), ("--price", "-1")):
        assert otpo(model, "--gpu", "H100", *words).exit_code == 2


def test_short_times_are_seconds() -> None:
    found = [duration(hours) for hours in (2.04, 0.5, 1 / 60, 0.004, 0.0001)]
    assert found == ["2.0 h", "30 min", "1 min", "15 s", "1 s"]


@pytest.mark.parametrize(
    ("kind", "settings", "active", "middle"),
    [
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2 / 8, 2 * 48),
        ("qwen2_moe", {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24,
                       "shared_expert_intermediate_size": 96}, 4 / 8, 4 * 24 + 96),
        ("deepseek_v3", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
                         "n_shared_experts": 1, "first_k_dense_replace": 0, "topk_group": 1}, 2 / 8, 3 * 24),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": [2, 2], "head_dim": 8}, 2 / 8, 2 * 48),
        ("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2}, 2 / 8, (2 + 2) * 48),
    ],
)  # fmt: skip
def test_experts_are_counted_under_any_name(
    tmp_path: Path, kind: str, settings: dict, active: float, middle: int
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
    AutoConfig.for_model(kind, **sizes | settings).save_pretrained(tmp_path)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    experts = sum(p.numel() for n, p in lm.named_parameters() if ".experts." in n)
    found = shape_of(tmp_path)
    assert found.decoder - found.active == pytest.approx((1 - active) * experts, abs=1) and experts
    assert found.middle == middle


def test_keys_and_values_are_counted_as_a_model_has_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    latent = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": None}
    AutoConfig.for_model("deepseek_v2", **sizes | latent, pad_token_id=0).save_pretrained(tmp_path / "latent")
    AutoConfig.for_model("falcon", **sizes).save_pretrained(tmp_path / "one")
    found, one = shape_of(tmp_path / "latent"), shape_of(tmp_path / "one")
    # queries, keys, values and their result; an engine keeps what keys and values are made of, and the turned keys
    assert 2 * found.queries + 2 * found.keys == 4 * (10 + 10 + 8 + 8) and found.cached == 10 + 4
    assert (one.queries, one.keys, one.cached) == (32, 8, 16)


def test_of_a_multimodal_model_the_text_model_is_planned(tmp_path: Path) -> None:
    """It alone is trained: neither weights nor layers of the part that sees count."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}  # fmt: skip
    seeing = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoConfig.for_model("gemma3", text_config=sizes, vision_config=seeing).save_pretrained(tmp_path / "whole")
    AutoConfig.for_model("gemma3_text", **sizes).save_pretrained(tmp_path / "text")
    found, text = shape_of(tmp_path / "whole"), shape_of(tmp_path / "text")
    assert found == replace(text, name=found.name) and found.layers == 3 and found.tied and found.shares_prompts


def test_a_text_model_under_another_name_shares_prompts(tmp_path: Path) -> None:
    """Of Qwen2-VL it is a Qwen2: no run says that its batches were padded."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    seeing = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4}
    AutoConfig.for_model("qwen2_vl", text_config=sizes, vision_config=seeing).save_pretrained(tmp_path)
    assert padded_batches(ModelConfig(path=str(tmp_path))) == []
    assert shape_of(tmp_path).shares_prompts and shape_of(tmp_path).layers == 3

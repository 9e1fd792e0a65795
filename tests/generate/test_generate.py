"""Generation: real vLLM in real Ray actors against transformers, resumed, refused, and gone when its driver is."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from scipy.stats import chisquare
from support.oracles.greedy import PROMPTS, oracle
from transformers import AutoTokenizer

from eval.tasks import Prompt
from otpo.data.encoder import encode_prompt
from otpo.data.tokens import tokenize_completions
from otpo.errors import UserError, WorkError
from pipeline.generate.backends import TransformersEngine, resolve
from pipeline.generate.engine import EngineConfig, Output, Request, Sampling, generate_outputs
from pipeline.generate.model_folder import engine_sizes, open_model, tokenizer_of
from pipeline.generate.outputs import PartialOutputs
from pipeline.generate.pool import EnginePool, _identity, preflight
from pipeline.run.folder import name_of_model

ON_CPU = EngineConfig(backend="transformers", device="cpu", dtype="fp32")


# ---- what is refused before anything starts ----


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": 2.5}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"n": 0}, {"n": 2}],
)
def test_sampling_that_cannot_be_is_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings)) if settings != {"n": 2} else "greedy"):
        Sampling(**settings)


def broken_copy(source: Path, target: Path, **changes) -> Path:
    """A copy of a model folder; a key is a file's stem, None removes it, a dict updates its JSON."""
    shutil.copytree(source, target)
    for stem, change in changes.items():
        (path,) = target.glob(f"{stem}.*")
        if change is None:
            path.unlink()
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return target


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({"config": None}, {}, "config.json"),
        ({"model": None}, {}, "safetensors"),
        ({"tokenizer": None}, {}, "AutoTokenizer"),
        ({"chat_template": None}, {}, "data.template=literal"),
        ({"config": {"head_dim": 24}}, {}, "24 dimensions.*generate.backend=auto"),
        ({}, {"max_model_len": 1 << 20}, "positions"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(tiny_llama: Path, tmp_path: Path, changes, config, says):
    model = broken_copy(tiny_llama, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=says):
        preflight(model, EngineConfig(backend="vllm", device="cpu", **config), "chat")


def test_what_is_no_trouble_is_not_refused(tiny_llama: Path, tmp_path: Path):
    plain = broken_copy(tiny_llama, tmp_path / "plain", chat_template=None)
    preflight(plain, EngineConfig(device="cpu"), "literal")
    preflight(plain, EngineConfig(device="cpu"))
    odd = broken_copy(tiny_llama, tmp_path / "odd", config={"head_dim": 24})
    preflight(odd, EngineConfig(backend="transformers", device="cpu"))
    preflight(odd, EngineConfig(backend="vllm", device="gpu"))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_auto_takes_transformers_where_vllm_cannot_serve_a_model(tiny_llama: Path, tmp_path: Path, caplog):
    odd = broken_copy(tiny_llama, tmp_path / "odd", config={"head_dim": 24})
    for folder, device, backend in ((tiny_llama, "cpu", "vllm"), (odd, "cpu", "transformers"), (odd, "gpu", "vllm")):
        preflight(folder, EngineConfig(device=device))
        assert resolve(EngineConfig(device=device), open_model(folder)).backend == backend
    assert caplog.text.count("24 dimensions") == 1


def test_a_folder_that_is_not_there_and_an_adapter_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        preflight(tmp_path / "nowhere", EngineConfig(device="cpu"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it"):
        preflight(tmp_path, EngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "expected an object, found list"),
        ("generation_config.json", "[]", "expected an object, found list"),
        ("model.safetensors", "cut", "no whole header of safetensors"),
        ("model.safetensors", None, "is no file, but a folder or a link"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_before_an_engine_starts(tmp_path, tiny_llama, file, text, words):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / file).unlink(missing_ok=True)
    if text is None:
        (folder / file).symlink_to(tmp_path / "blob")
    else:
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=words):
        preflight(folder, EngineConfig(device="cpu"))


# ---- prompts and answers as token ids ----


def test_outputs_of_a_runs_model_are_called_by_its_label():
    assert name_of_model("runs/x/models/otpo-sharp/model") == "otpo-sharp"
    assert name_of_model("runs/x/models/otpo/model/") == "otpo"
    assert name_of_model("my/models/llama") == name_of_model("meta/llama") == "llama"
    assert name_of_model("somewhere/model") == "model"


def test_prompts_become_the_tokens_that_training_sees(tiny_llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [prompt.instruction for prompt in PROMPTS[:4]]
    rows = [{"prompt": text, "completion": " Yes."} for text in texts]
    for template, trained_as in (("chat", "chat"), ("literal", "auto")):
        trained, _ = tokenize_completions(rows, tokenizer, template=trained_as)
        assert [encode_prompt(tokenizer, text, template) for text in texts] == [item.prompt_ids for item in trained]


def test_the_chat_template_is_applied_once_and_bos_stands_once(tiny_llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = encode_prompt(tokenizer, messages, "chat")
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == list(wanted)
    for encoded in (ids, encode_prompt(tokenizer, "Hello", "literal"), encode_prompt(tokenizer, "", "literal")):
        assert encoded.count(tokenizer.bos_token_id) == 1 and encoded[0] == tokenizer.bos_token_id
    with pytest.raises(UserError, match=r"expected strings.* found a list of messages.*--template"):
        encode_prompt(tokenizer, messages, "literal")


def test_transformers_batches_with_padding_answer_like_single_prompts(sharp_models: list[Path]):
    folder = open_model(sharp_models[0])
    requests = [Request(p.id, 0, p.instruction) for p in PROMPTS[:8]]
    engine = TransformersEngine(ON_CPU, folder)
    answered = generate_outputs(engine, folder, requests, Sampling(max_tokens=16), "chat", 128)
    wanted = oracle(sharp_models[0], PROMPTS[:8], 16)
    assert {c.id: c.output for some in answered for c in some if c.id in wanted} == wanted


def test_seeded_samples_do_not_depend_on_the_batch(sharp_models: list[Path]):
    folder = open_model(sharp_models[0])
    engine = TransformersEngine(ON_CPU, folder)
    sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=12, seed=3)
    requests = [Request(p.id, sample, p.instruction) for p in PROMPTS[:4] for sample in range(2)]

    def outputs(requests, sampling):
        made = generate_outputs(engine, folder, requests, sampling, "chat", 128)
        return {(c.id, c.sample): c.output for some in made for c in some}

    together, alone = outputs(requests, sampling), {}
    for request in reversed(requests):
        alone |= outputs([request], sampling)
    assert len(together) == 8 and together == alone
    assert together != outputs(requests, replace(sampling, seed=4))


def test_seeded_samples_follow_the_models_distribution(tiny_llama: Path):
    folder = open_model(tiny_llama)
    engine = TransformersEngine(ON_CPU, folder)
    engine.batch_size = 500
    ids, temperature, top_p = encode_prompt(tokenizer_of(folder), "Where?", "chat"), 0.5, 0.1
    with torch.inference_mode():
        logits = engine.network(torch.tensor([ids])).logits[0, -1].double() / temperature
    probabilities, order = logits.softmax(-1).sort(descending=True)
    kept = int((probabilities.cumsum(-1) - probabilities < top_p).sum())
    expected = (probabilities[:kept] / probabilities[:kept].sum()).numpy()
    drawn = engine.complete([ids] * 3000, list(range(3000)), Sampling(temperature, top_p, max_tokens=1), [])
    counts = Counter(token for some in drawn for _, (token,) in some)
    assert set(counts) <= set(order[:kept].tolist())
    observed = np.array([counts[int(token)] for token in order[:kept]])
    assert chisquare(observed, 3000 * expected).pvalue > 1e-3


# ---- vLLM in Ray ----


def test_vllm_answers_like_transformers_from_one_engine_that_changes_models(vllm_pool, sharp_models, tmp_path: Path):
    sampling, seen = Sampling(max_tokens=24), []
    for turn, model in enumerate([*sharp_models, sharp_models[0]]):
        result = vllm_pool.generate(
            model, f"turn{turn}", PROMPTS, sampling, tmp_path / str(turn), progress=lambda *step: seen.append(step)
        )
        wanted = oracle(model, PROMPTS[:10], 24)
        assert {row["id"]: row["output"] for row in result.outputs if row["id"] in wanted} == wanted
    first, second, third = (
        [r["output"] for r in json.loads((tmp_path / d / "model_outputs.json").read_text())] for d in "012"
    )
    assert first == third != second
    assert seen[-1][:3] == ("generate", 24, 24) and float(seen[-1][3].removesuffix(" tokens/s").replace(",", "")) > 0


def test_files_are_alpaca_evals_with_ids_in_the_prompts_order(vllm_pool, sharp_models, tmp_path: Path):
    result = vllm_pool.generate(sharp_models[0], "mine", PROMPTS, Sampling(max_tokens=24), tmp_path)
    assert result.path == tmp_path / "model_outputs.json" and json.loads(result.path.read_text()) == result.outputs
    assert [row["id"] for row in result.outputs] == [p.id for p in PROMPTS]
    assert [row["instruction"] for row in result.outputs] == [p.instruction for p in PROMPTS]
    assert {row["generator"] for row in result.outputs} == {"mine"} and {row["dataset"] for row in result.outputs} == {
        "test"
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generation.json", "model_outputs.json"]
    report = json.loads((tmp_path / "generation.json").read_text())
    assert report == result.report
    assert report["model_sha256"] == open_model(sharp_models[0]).digest
    assert report["engine"]["backend"] == "vllm" and report["engine"]["dtype"] == "fp32"
    assert report["n"] == 24 and report["truncated"] == sum(row["truncated"] for row in result.outputs)
    assert report["tokens"] == sum(row["n_tokens"] for row in result.outputs)
    assert all(row["n_tokens"] == 24 for row in result.outputs if row["truncated"])


def test_what_is_finished_is_not_made_again_unless_something_changed(vllm_pool, sharp_models, tmp_path: Path):
    def outputs(**changes):
        values = {"model": sharp_models[0], "label": "a", "prompts": PROMPTS[:4], "sampling": Sampling(max_tokens=8)}
        return vllm_pool.generate(**{**values, **changes}, out=tmp_path / "own.json")

    first = outputs()
    stamp = (tmp_path / "own.json").stat().st_mtime_ns
    assert outputs() == first and (tmp_path / "own.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "own.generation.json").is_file()
    assert outputs(sampling=Sampling(max_tokens=9)).report["key"] != first.report["key"]
    assert outputs(model=sharp_models[1]).outputs != first.outputs


def test_several_samples_of_a_prompt_differ_and_can_be_repeated(vllm_pool, sharp_models, tmp_path: Path):
    sampling = Sampling(temperature=1.0, max_tokens=12, n=3, seed=5)
    first = vllm_pool.generate(sharp_models[0], "a", PROMPTS[:6], sampling, tmp_path / "one").outputs
    assert [(row["id"], row["sample"]) for row in first] == [(p.id, s) for p in PROMPTS[:6] for s in range(3)]
    assert len({row["output"] for row in first}) > 12
    # the same prompts among others, in another order: other batches, the same answers
    order = [*PROMPTS[6:12], *reversed(PROMPTS[:6])]
    second = vllm_pool.generate(sharp_models[0], "a", order, sampling, tmp_path / "two").outputs
    again = {(row["id"], row["sample"]): row["output"] for row in second}
    same = sum(again[row["id"], row["sample"]] == row["output"] for row in first)
    assert same >= 17, "one near-tie may fall otherwise in another batch"


def test_samples_of_more_prompt_tokens_than_vllm_takes_in_a_step(vllm_pool, sharp_models, tmp_path, monkeypatch):
    prompts = [Prompt(id=str(n), instruction=f"{n} " + "word " * 45, dataset="test") for n in range(72)]
    sampling = Sampling(temperature=1.0, max_tokens=4)
    apart = vllm_pool.generate(sharp_models[0], "a", prompts, sampling, tmp_path / "apart").outputs
    monkeypatch.setattr(vllm_pool, "config", replace(vllm_pool.config, batch_size=len(prompts)))
    together = vllm_pool.generate(sharp_models[0], "a", prompts, sampling, tmp_path / "together")
    tokenizer = AutoTokenizer.from_pretrained(sharp_models[0])
    assert sum(len(tokenizer(p.instruction)["input_ids"]) for p in prompts) > 4096 and not together.report["errors"]
    same = sum(one["output"] == other["output"] for one, other in zip(apart, together.outputs, strict=True))
    assert same >= 70, "near-ties may fall otherwise in another batch"


def test_a_prompt_that_is_too_long_costs_its_own_answer_alone(vllm_pool, sharp_models, tmp_path: Path):
    long = Prompt(id="long", instruction="word " * 200, dataset="test")
    result = vllm_pool.generate(sharp_models[0], "a", [PROMPTS[0], long, PROMPTS[1]], Sampling(max_tokens=8), tmp_path)
    assert [bool(row.get("error")) for row in result.outputs] == [False, True, False]
    assert result.outputs[1]["output"] == "" and "tokens, more than the 120" in result.outputs[1]["error"]
    assert result.report["errors"] == {"prompt too long": 1}
    with pytest.raises(UserError, match=r"lower generate\.max_tokens"):
        vllm_pool.generate(sharp_models[0], "a", PROMPTS, Sampling(max_tokens=128), tmp_path / "none")
    with pytest.raises(UserError, match="different id"):
        vllm_pool.generate(sharp_models[0], "a", [PROMPTS[0]] * 2, Sampling(max_tokens=8), tmp_path / "none")


def test_an_interrupted_generation_goes_on_where_it_was(vllm_pool, sharp_models, tmp_path: Path):
    def interrupt(what, done, total, remark):
        raise KeyboardInterrupt

    call = (sharp_models[0], "a", PROMPTS, Sampling(max_tokens=8))
    with pytest.raises(KeyboardInterrupt):
        vllm_pool.generate(*call, tmp_path / "stopped", progress=interrupt)
    partial = tmp_path / "stopped" / "model_outputs.partial.jsonl"
    kept = len(partial.read_text().splitlines()) - 1
    assert 0 < kept < 24
    with open(partial, "a") as file:
        file.write('{"id": "23", "sample": 0, "outp')  # a line that a kill cut
    resumed = vllm_pool.generate(*call, tmp_path / "stopped")
    whole = vllm_pool.generate(*call, tmp_path / "whole")
    assert resumed.outputs == whole.outputs
    assert resumed.report["reused"] == kept and whole.report["reused"] == 0
    assert not partial.exists()


def test_an_interrupted_generation_frees_its_engine_at_once(vllm_pool, sharp_models, tmp_path, monkeypatch):
    def interrupt(what, done, total, remark):
        raise KeyboardInterrupt

    monkeypatch.setattr(vllm_pool, "config", replace(vllm_pool.config, batch_size=4000))
    many = [Prompt(id=str(n), instruction=f"Question {n}?", dataset="test") for n in range(4000)]
    sampling = Sampling(temperature=1.0, max_tokens=96)  # minutes of work
    with pytest.raises(KeyboardInterrupt):
        vllm_pool.generate(sharp_models[0], "a", many, sampling, tmp_path, progress=interrupt)
    free, _ = ray.wait([vllm_pool._engines.actors[0].ready.remote()], timeout=30)
    assert free


def test_outputs_made_another_way_are_not_taken_over(tmp_path: Path):
    kept = Output("1", 0, "old", 3, False)
    PartialOutputs(tmp_path / "p.jsonl", "one way", {("1", 0): "prompt"}).append([kept])
    (tmp_path / "p.jsonl").write_text('{"made_with": "one way"}\n' + (tmp_path / "p.jsonl").read_text())
    assert PartialOutputs(tmp_path / "p.jsonl", "one way", {("1", 0): "prompt"}).read() == [kept]
    assert PartialOutputs(tmp_path / "p.jsonl", "one way", {("1", 0): "changed"}).read() == []
    PartialOutputs(tmp_path / "p.jsonl", "one way", {("1", 0): "prompt"}).append([kept])
    assert PartialOutputs(tmp_path / "p.jsonl", "another way", {("1", 0): "prompt"}).read() == []


def test_more_gpus_than_there_are_is_refused(ray_cluster, tiny_llama: Path):
    with pytest.raises(UserError, match=r"engines of 2 GPUs .* the largest node has 0"):
        EnginePool(EngineConfig(backend="vllm", device="gpu", tensor_parallel_size=2), tiny_llama)


def test_gpus_that_an_engine_could_not_use_are_refused(tiny_llama: Path):
    with pytest.raises(UserError, match=r"size is 4, and vLLM shares .*: 2 attention heads.* Set 1 or 2\."):
        preflight(tiny_llama, EngineConfig(backend="vllm", tensor_parallel_size=4))
    with pytest.raises(UserError, match="the transformers engine takes one GPU"):
        preflight(tiny_llama, EngineConfig(backend="transformers", tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("config", "heads", "sizes"),
    [
        ({"num_key_value_heads": 4, "intermediate_size": 18_944}, 28, [1, 2, 4]),  # Qwen2.5 7B: 28 do not share its MLP
        ({"num_key_value_heads": 2, "intermediate_size": 4864}, 14, [1, 2]),  # Qwen2.5 0.5B
        ({"num_key_value_heads": 8, "intermediate_size": 14_336}, 32, [1, 2, 4, 8, 16, 32]),  # Llama 3 8B
        ({"multi_query": True, "num_kv_heads": 71}, 71, [1, 71]),  # Falcon 7B
        (
            {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8},
            128,
            [1, 2, 4, 8, 16, 32, 64, 128],
        ),
        ({"num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768}, 32, [1, 2, 4, 8, 16, 32]),
        ({}, 12, [1, 2, 3, 4, 6, 12]),
    ],
)
def test_sizes_of_engines_share_heads_and_widths(config, heads, sizes):
    assert engine_sizes(config, heads) == sizes


def test_an_engine_that_is_not_ready_in_time_is_an_error_not_a_hang(ray_cluster, tiny_llama: Path, tmp_path: Path):
    config = replace(ON_CPU, start_timeout=0.01)
    with EnginePool(config, tiny_llama) as pool, pytest.raises(WorkError, match=r"no engine was ready after 0\.01 s"):
        pool.generate(tiny_llama, "a", PROMPTS[:2], Sampling(max_tokens=8), tmp_path)


def test_outputs_of_an_earlier_version_are_still_those_of_their_prompts():
    """They were made before prompts could have tools and variables."""
    plain = Prompt(id="0", instruction="q", dataset="d")
    assert _identity(plain) == {"id": "0", "instruction": "q", "dataset": "d", "reference": None, "messages": None}
    assert _identity(replace(plain, tools=[{"name": "f"}]))["tools"] == [{"name": "f"}]

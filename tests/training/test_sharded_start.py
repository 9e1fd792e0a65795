"""Two workers that are sent a start with fused experts, and its live reference, train as one worker does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.architectures import FAMILIES, SHAPE
from support.training import losses, settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.recipe import make_recipe
from pipeline.run.run import run
from pipeline.train.job_start import start_notes


@pytest.mark.slow
def test_a_start_that_is_converted_is_sent_and_trained_as_on_one_worker(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "initializer_range": 0.05}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad", "bos")}
    config = AutoConfig.for_model("qwen3_moe", **(SHAPE | FAMILIES["qwen3_moe"] | own | ids))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    found = {}
    for workers in (1, 2):
        train = {"workers": workers, "max_steps": 4, "save_every": 2}
        recipe = make_recipe(settings(tmp_path, tmp_path / "start", methods={"dpo": {}, "tdpo2": {}}, train=train))
        result = run(recipe, tmp_path / str(workers), world=None, progress=lambda *_: None, until="train")
        labels = [result.folder.label(label) for label in recipe.methods]
        found[workers] = [losses(label.path) for label in labels]
        sent = [note for note in start_notes(labels) if "sent each worker its part" in note]
        assert len(sent) == (0 if workers == 1 else 2)
    for one, two in zip(*found.values(), strict=True):
        assert two == pytest.approx(one, abs=1e-5)

"""A model is its weights, in whatever files they lie, and however these were replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.small_lm import small_lm

from otpo.identity import content_digest, model_fingerprint, weight_files
from otpo.models.loading import load_causal_lm


def pickled(folder: Path, seed: int) -> Path:
    """A model whose weights lie in pytorch_model.bin; only these depend on the seed."""
    lm = small_lm()
    lm.config.save_pretrained(folder)
    torch.manual_seed(seed)
    torch.save(
        {name: torch.randn_like(weight) for name, weight in lm.state_dict().items()}, folder / "pytorch_model.bin"
    )
    return folder


def test_models_that_differ_in_pickled_weights_only_are_two(tmp_path):
    one, two, again = (pickled(tmp_path / name, seed) for name, seed in (("one", 0), ("two", 1), ("again", 0)))
    assert model_fingerprint(one) != model_fingerprint(two)
    assert model_fingerprint(one) == model_fingerprint(again)


@pytest.mark.parametrize(
    "name", ["pytorch_model-00001-of-00002.bin", "adapter_model.bin", "consolidated.00.pth", "model.pt", "model.gguf"]
)
def test_every_weight_file_counts(tmp_path, name):
    small_lm().config.save_pretrained(tmp_path)
    found = []
    for content in (b"one", b"two"):
        (tmp_path / name).write_bytes(content)
        found.append(model_fingerprint(tmp_path))
    assert found[0] != found[1] and weight_files(tmp_path) == [tmp_path / name]


def test_files_of_one_size_and_one_time_are_told_apart(tmp_path, tiny_llama):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    before, stat = (model_fingerprint(folder), content_digest(folder)), weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = (model_fingerprint(folder), content_digest(folder))
    assert before[0] != after[0] and before[1] != after[1]


def test_a_folder_of_safetensors_keeps_the_identity_that_finished_runs_know_it_by(tmp_path, tiny_llama):
    """Its settings, weights and templates by name, size and content; what a trainer left beside them is no part."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    folder = tmp_path / "model"
    for name in ("training_args.bin", "optimizer.pt", "README.md"):
        (folder / name).write_text("left by a trainer")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    assert model_fingerprint(folder) == digest.hexdigest()[:16]
    total = hashlib.sha256()
    for name in sorted(p.name for p in tiny_llama.iterdir() if p.name != "README.md"):
        total.update(hashlib.sha256((folder / name).read_bytes()).digest())
    assert content_digest(folder) == total.hexdigest()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_in_a_subfolder_count(tmp_path, kind):
    """transformers reads whatever the index names."""
    lm = small_lm()
    shard = f"w/a{Path(kind).suffix}"
    (tmp_path / "w").mkdir()
    lm.config.save_pretrained(tmp_path)
    (tmp_path / f"{kind}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(lm.state_dict(), shard)})
    )
    seen = []
    for factor in (1, 2):
        weights = {name: factor * weight for name, weight in lm.state_dict().items()}
        if shard.endswith("bin"):
            torch.save(weights, tmp_path / shard)
        else:
            save_file(weights, tmp_path / shard, metadata={"format": "pt"})
        torch.testing.assert_close(load_causal_lm(tmp_path).state_dict(), weights)
        seen.append((model_fingerprint(tmp_path), content_digest(tmp_path)))
    assert seen[0][0] != seen[1][0] and weight_files(tmp_path) == [tmp_path / shard]
    assert shard.endswith("bin") or seen[0][1] != seen[1][1]


OF_A_HUB_NAME = """
import sys
from pathlib import Path
from otpo.identity import model_fingerprint
refs = Path(sys.argv[1])
for commit in "ab":
    refs.write_text(40 * commit)
    print(model_fingerprint("owner/name"))
"""


def test_a_hub_name_is_its_revision(tmp_path, tiny_llama):
    """The name stays when its owner uploads other weights; the commit does not."""
    cache = tmp_path / "hub" / "models--owner--name"
    for commit in "ab":
        shutil.copytree(tiny_llama, cache / "snapshots" / (40 * commit))
    (cache / "refs").mkdir()
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", OF_A_HUB_NAME, str(cache / "refs" / "main")]
    found = subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert found == [hashlib.sha256(f"owner/name@{c * 40}".encode()).hexdigest()[:16] for c in "ab"]

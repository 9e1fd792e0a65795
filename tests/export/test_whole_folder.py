"""Model folders that are not whole are refused before anything starts, and code in them is never run in silence."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.chat_templates import CHATML_TOOLS, tokenizer_with

from otpo.data.load import load_rows
from otpo.data.tokens import tokenize_pairs
from otpo.errors import UserError
from otpo.models.disk.architecture import own_code
from otpo.models.disk.present import check_present
from otpo.models.disk.trial_save import check_saving

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 16060522496\n"


@pytest.fixture
def folder(tmp_path, tiny_llama):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        check_present("model.path", str(folder))
    return str(error.value)


def sharded(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-1.safetensors": names[:4], "model-2.safetensors": names[4:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_whole_folder_passes_in_one_file_and_in_several(folder):
    check_present("model.path", str(folder))
    sharded(folder)
    check_present("model.path", str(folder))


def test_a_clone_without_its_large_files_is_told_how_to_fetch_them(folder):
    (folder / "model.safetensors").write_text(POINTER)
    assert "model.safetensors is what Git LFS leaves in place of the file" in refused(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert "`git lfs pull`" in refused(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_so_is_one_of_data(tmp_path, suffix):
    (tmp_path / f"rows.{suffix}").write_text(POINTER)
    with pytest.raises(UserError, match=f"rows.{suffix} is what Git LFS leaves in place of the file: fetch it"):
        load_rows(tmp_path / f"rows.{suffix}")


def test_a_file_of_weights_that_was_cut_is_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for left, words in ((len(whole) - 1000, "and its header names"), (200, "no whole header"), (0, "no whole header")):
        file.write_bytes(whole[:left])
        assert f"has {left:,} bytes" in (said := refused(folder)) and words in said
    file.write_bytes(whole + b"\0" * 8)
    assert "copy it anew" in refused(folder)


def test_a_shard_that_is_not_there_is_named(folder):
    sharded(folder)
    (folder / "model-2.safetensors").unlink()
    assert "lacks model-2.safetensors, which model.safetensors.index.json names" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_torn_index_is_refused(folder, text):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is torn: expected JSON with a weight_map" in refused(folder)


def test_weights_under_names_that_transformers_does_not_look_for_are_refused(folder):
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "found model-1.safetensors, model-2.safetensors, which transformers does not read" in refused(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf" in refused(folder)


def test_a_link_to_nothing_is_no_file_of_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob")
    assert "model.safetensors is no file, but a folder or a link" in refused(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "is no file" in refused(folder)


@pytest.mark.parametrize("text", ["{", ""])
def test_a_torn_generation_configuration_is_no_missing_one(folder, text):
    """transformers would leave it out in silence, and its end tokens with it."""
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot save the generation configuration .* Mend generation_config\.json"):
        check_saving(folder)
    (folder / "generation_config.json").unlink()
    check_saving(folder)


def test_code_beside_a_known_architecture_is_told_and_not_run(folder):
    assert own_code(folder) == ""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('run')")
    assert "code of its own for its model (own.Model), which was not run: transformers' own 'llama'" in own_code(folder)


@pytest.mark.parametrize("mistake", ["{{ 1 / 0 }}", "{{ ({})['a'].b }}", "{{ range(10 ** 9) }}"])
def test_a_mistake_in_a_template_leaves_rows_out_with_a_reason(mistake):
    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
             "rejected": [{"role": "assistant", "content": "b"}]}]  # fmt: skip
    with pytest.raises(UserError, match="none of the 1 rows can be used: 1 the chat template refuses the messages"):
        tokenize_pairs(rows, tokenizer_with(mistake + CHATML_TOOLS))

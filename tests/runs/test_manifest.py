"""What a run folder remembers: stages, their inputs, and whose recipe it holds."""

import json
from pathlib import Path

import pytest

from otpo.errors import UserError
from otpo.identity import model_fingerprint, source_identity
from pipeline.recipe import make_recipe
from pipeline.run.manifest import Manifest, differences, enter_recipe, open_run

TREE = {
    "name": "x",
    "model": {"path": "m"},
    "data": {"path": "d.json"},
    "methods": {"dpo": {"beta": 0.1}},
    "train": {"max_steps": 7, "seed": 1},
}


def recipe(**changes):
    return make_recipe({**TREE, **changes})


def begun(changed, folder: Path, *, redo: bool = False) -> Manifest:
    manifest = open_run(changed, folder, redo=redo)
    enter_recipe(changed, manifest)
    return manifest


def do(manifest: Manifest, stage: str, inputs, output: Path) -> None:
    manifest.starts(stage, inputs)
    with manifest.doing(stage, inputs, [output]) as figures:
        output.write_text("done")
        figures["n"] = 3


def test_a_stage_is_done_for_its_inputs_and_as_long_as_what_it_left_is_there(tmp_path):
    manifest = begun(recipe(), tmp_path)
    assert not manifest.is_done("a", {"k": 1})
    do(manifest, "a", {"k": 1, "l": 2}, tmp_path / "out")
    again = Manifest(tmp_path)
    assert again.is_done("a", {"l": 2, "k": 1}), "read back from the file; the order of keys means nothing"
    assert not again.is_done("a", {"k": 1, "l": 3})
    assert not again.is_done("b", {"k": 1, "l": 2})
    (tmp_path / "out").unlink()
    assert not again.is_done("a", {"k": 1, "l": 2})


def test_a_stage_that_fails_is_not_done(tmp_path):
    manifest = begun(recipe(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        with manifest.doing("a", 1, [tmp_path / "out"]):
            (tmp_path / "out").touch()
            raise ZeroDivisionError
    assert not manifest.is_done("a", 1) and not Manifest(tmp_path).is_done("a", 1)


def test_a_begun_stage_knows_whether_it_was_begun_from_other_inputs(tmp_path):
    manifest = begun(recipe(), tmp_path)
    assert not manifest.starts("a", 1), "never begun"
    assert not Manifest(tmp_path).starts("a", 1), "interrupted, the same inputs: go on"
    assert Manifest(tmp_path).starts("a", 2), "other inputs: start again"


def test_redoing_a_stage_takes_its_old_mark_away_at_once(tmp_path):
    manifest = begun(recipe(), tmp_path)
    do(manifest, "a", 1, tmp_path / "out")
    manifest.starts("a", 2)
    assert not Manifest(tmp_path).is_done("a", 1) and not Manifest(tmp_path).is_done("a", 2)


def test_what_is_recorded(tmp_path):
    manifest = begun(recipe(), tmp_path)
    do(manifest, "a", 1, tmp_path / "out")
    tree = json.loads((tmp_path / "manifest.json").read_text())
    assert tree["name"] == "x" and {"python", "torch", "ray"} <= set(tree["versions"])
    assert tree["stages"]["a"]["outputs"] == ["out"] and tree["stages"]["a"]["n"] == 3
    assert tree["stages"]["a"]["seconds"] >= 0 and tree["stages"]["a"]["finished"].endswith("+00:00")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_changed_recipe_under_an_old_name_is_refused_with_the_difference_and_both_ways_out(tmp_path):
    manifest = begun(recipe(), tmp_path)
    do(manifest, "a", 1, tmp_path / "out")
    changed = recipe(methods={"dpo": {"beta": 0.2}, "otpo": {}}, train={"max_steps": 7, "seed": 2})
    with pytest.raises(UserError) as error:
        open_run(changed, tmp_path, redo=False)
    lines = str(error.value).splitlines()
    assert "  methods.dpo.beta: 0.1 -> 0.2" in lines
    assert "  methods.otpo: null -> {}" in lines
    assert "  train.seed: 1 -> 2" in lines
    assert len(lines) == 5 and "name=" in lines[-1] and "--redo" in lines[-1]
    assert open_run(recipe(), tmp_path, redo=False).is_done("a", 1), "the refusal changed nothing"
    assert begun(changed, tmp_path, redo=True).is_done("a", 1), "what did not change is kept"
    with pytest.raises(UserError):
        open_run(recipe(), tmp_path, redo=False)


def test_a_folder_is_as_it_was_until_the_recipe_is_entered(tmp_path):
    do(begun(recipe(), tmp_path), "a", 1, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    open_run(recipe(data={"path": "refused.json"}), tmp_path, redo=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_speed_and_place_may_change(tmp_path):
    manifest = begun(recipe(), tmp_path)
    do(manifest, "a", 1, tmp_path / "out")
    other = recipe(train={"max_steps": 7, "seed": 1, "workers": 5, "micro_batch_size": 1}, cluster={"address": "auto"})
    assert open_run(other, tmp_path, redo=False).is_done("a", 1)


def test_a_recipe_that_never_began_does_not_hold_the_folder(tmp_path):
    """A first call stopped by a mistyped path must not make the mended recipe a changed one."""
    begun(recipe(), tmp_path)
    open_run(recipe(data={"path": "mended.json"}), tmp_path, redo=False)


def test_differences_name_every_leaf():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(old, old) == []
    assert differences(old, {"a": {"b": 1, "c": [1, 3]}, "d": {"e": 0}}) == [
        "a.c: [1, 2] -> [1, 3]",
        'd: null -> {"e": 0}',
    ]
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 -> null", "b: null -> 2"]


def test_an_input_is_what_it_holds(tmp_path):
    first, second = tmp_path / "one" / "d.json", tmp_path / "two" / "d.json"
    for path in (first, second):
        path.parent.mkdir()
        path.write_text("[1]")
    assert source_identity(str(first)) == source_identity(str(second)), "wherever it lies"
    second.write_text("[2]")
    assert source_identity(str(first)) != source_identity(str(second))
    assert source_identity("owner/name") == "owner/name"


def test_a_model_is_its_configuration_weights_and_tokenizer(tmp_path, tiny_llama):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    assert model_fingerprint(copy) == model_fingerprint(tiny_llama)
    (copy / "README.md").write_text("a card is no part of it")
    assert model_fingerprint(copy) == model_fingerprint(tiny_llama)
    for name in ("chat_template.jinja", "config.json", "model.safetensors"):
        before = model_fingerprint(copy)
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(bytes(data))
        assert model_fingerprint(copy) != before, name

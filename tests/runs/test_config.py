"""Recipes: YAML, overrides, and what is refused in which words."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from otpo.errors import UserError
from pipeline.recipe import (
    EXECUTION_KEYS_OF_TRAINING,
    Recipe,
    SweepRange,
    TrainConfig,
    apply_overrides,
    dump_yaml,
    find_recipe,
    identity,
    load_recipe,
    make_recipe,
    parse_value,
)
from pipeline.run.inputs import training_inputs

TREE = {
    "name": "x",
    "model": {"path": "m"},
    "data": {"path": "d.json"},
    "methods": {"dpo": {"beta": 0.05}, "sharp": {"method": "otpo", "reg": 0.03, "learning_rate": 1e-4}},
    "train": {"max_steps": 7, "learning_rate": 5e-7},
}


def write(path: Path, tree) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7), ("1e-4", 1e-4), ("1E5", 1e5), ("3e3", 3000.0), (".5e-3", 5e-4), ("0.03", 0.03),
        ("-2.5e-1", -0.25), ("50", 50), ("true", True), ("null", None), ("~", None), ("abc", "abc"), ("1e", "1e"),
        ("e5", "e5"), ("5e-7x", "5e-7x"), ("1.2.3", "1.2.3"), ("[0.03, 1e-1]", [0.03, 0.1]), ("{a: 1}", {"a": 1}),
        ("'5e-7'", "5e-7"), ("2024-01-01x", "2024-01-01x"), ("2024-01-01", "2024-01-01"), ("010", "010"),
        ("1:30", "1:30"), ("007", "007"), ("0", 0), ("-5", -5), ("1_000", 1000), ("0x10", 16),
    ],
)  # fmt: skip
def test_values_read_as_people_mean_them(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_writes_is_a_number(number):
    assert parse_value(repr(number)) == number


def test_overrides_set_keys_and_make_sections(tmp_path):
    recipe = load_recipe(
        write(tmp_path / "r.yaml", TREE),
        ["train.max_steps=9", "methods.sharp.reg=3e-1", "methods.sampo=", "judge.url=http://127.0.0.1:1/v1", "name=y"],
    )
    assert recipe.train.max_steps == 9 and recipe.judge.url == "http://127.0.0.1:1/v1" and recipe.name == "y"
    assert recipe.method("sharp").hyperparameters["reg"] == 0.3
    assert recipe.method("sampo").method.name == "sampo"
    assert recipe.labels() == ["base", "dpo", "sharp", "sampo"]


def test_overrides_leave_the_tree_alone():
    before = yaml.safe_dump(TREE)
    apply_overrides(TREE, ["methods.dpo.beta=9"])
    assert yaml.safe_dump(TREE) == before


def test_a_label_overrides_train_and_nothing_else():
    recipe = make_recipe(TREE)
    assert recipe.train_of("sharp").learning_rate == 1e-4 and recipe.train_of("dpo").learning_rate == 5e-7
    assert recipe.train_of("sharp").max_steps == 7
    assert "learning_rate" not in recipe.method("sharp").hyperparameters


def test_the_base_does_not_inherit_what_speaks_of_preferences():
    evaluated = {"eval_every": 2, "best_metric": "eval_loss", "early_stopping_patience": 1, "max_steps": 3, "seed": 5}
    recipe = make_recipe({**TREE, "train": evaluated, "base": {"data": "b.jsonl", "epochs": 2}})
    base = recipe.train_of("base")
    assert (base.max_steps, base.eval_every, base.best_metric, base.early_stopping_patience) == (None,) * 4
    assert base.seed == 5 and base.epochs == 2


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = make_recipe({**TREE, "generate": {"tasks": {"a": "x.jsonl"}}, "sweep": {"params": {"train.seed": [1, 2]}}})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("key", EXECUTION_KEYS_OF_TRAINING)
def test_what_changes_only_the_speed_is_no_part_of_the_identity(key):
    switches = ("use_gpu", "activation_checkpointing", "torch_compile", "async_save")
    other = (dict.fromkeys(switches, True) | {"sharding": "full", "min_workers": 1}).get(key, 7)
    changed = make_recipe({**TREE, "train": TREE["train"] | {key: other}})
    assert getattr(changed.train, key) != TrainConfig.model_fields[key].default
    assert identity(changed) == identity(make_recipe(TREE))


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "methods.dpo.beta=0.2",
        "train.eval_every=3",
        "train.optimizer=adamw_8bit",
        "methods.dpo.optimizer=adamw_8bit",
        "data.max_length=9",
        "judge.samples=3",
        "judge.verdict=text",
    ],
)
def test_what_changes_the_result_is_part_of_the_identity(override):
    assert identity(make_recipe(apply_overrides(TREE, [override]))) != identity(make_recipe(TREE))


def test_keys_that_finished_runs_did_not_have_leave_them_finished():
    assert not {"verdict", "samples", "ca_file"} & identity(make_recipe(TREE))["judge"].keys()
    assert "optimizer" not in identity(make_recipe(TREE))["train"]
    assert "optimizer" not in training_inputs(make_recipe(TREE), "dpo")
    # a label that goes back to the default is not the same as one that does not
    lighter = {**TREE, "train": TREE["train"] | {"optimizer": "adamw_8bit"}}
    back = {**lighter, "methods": {**TREE["methods"], "dpo": {"optimizer": "adamw"}}}
    assert identity(make_recipe(back)) != identity(make_recipe(lighter))
    assert training_inputs(make_recipe(lighter), "dpo")["optimizer"] == "adamw_8bit"
    assert training_inputs(make_recipe(back), "dpo") == training_inputs(make_recipe(TREE), "dpo")


def test_what_torch_cannot_copy_is_not_saved_beside_training():
    overrides = ["train.optimizer=adamw_8bit", "train.async_save=true"]
    with pytest.raises(UserError, match=r"async_save.*adamw_8bit.*Leave async_save out"):
        make_recipe(apply_overrides(TREE, overrides))


def test_shipped_recipes_are_recipes():
    folder = find_recipe("small_world").parent
    names = [path.stem for path in folder.glob("*.yaml")]
    assert "small_world" in names
    for name in names:
        assert load_recipe(name).labels()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_step=3"], ["unknown key 'train.max_step'", "Did you mean 'max_steps'?"]),
        (["methode.dpo="], ["unknown key 'methode'", "Did you mean 'methods'?"]),
        (["judge.modell=x"], ["unknown key 'judge.modell'", "'model'"]),
        (["zzz=1"], ["unknown key 'zzz'", "Known keys: name,"]),
        (["train.max_steps=many"], ["train.max_steps", "integer", "'many'"]),
        (["train.max_steps=0"], ["train.max_steps", "greater than or equal to 1", "0"]),
        (["train.dtype=fp16"], ["train.dtype", "'fp32' or 'bf16'"]),
        (["train.learning_rate=-1"], ["train.learning_rate", "greater than 0"]),
        (["methods.dpo.learning_rate=-1"], ["methods.dpo", "learning_rate", "greater than 0"]),
        (["methods.dpo.bet=1"], ["methods.dpo.bet", "did you mean 'beta'"]),
        (["methods.otpo.reg=0"], ["methods.otpo.reg", "above 0", "0"]),
        (["methods.otpo.regm=1"], ["methods.otpo.regm", "did you mean 'reg_m'"]),
        (["methods.dppo="], ["methods.dppo", "did you mean 'dpo'", "Known methods"]),
        (["methods.mine.method=dpoo"], ["did you mean 'dpo'"]),
        (["methods.dpo=3"], ["methods.dpo", "dictionary"]),
        (["methods.a/b={method: dpo}"], ["'a/b' becomes a folder"]),
        ([f"methods.{'x' * 101}={{method: dpo}}"], ["becomes a folder", "at most 100"]),
        (["methods.DPO={method: dpo}", "methods.dpo={}"], ["differ in case alone"]),
        (["methods.base={method: dpo}"], ["'base'"]),
        (["methods.dpo.workers=1"], ["methods.dpo.workers", "set train.workers"]),
        (["name=a/b"], ["'a/b' becomes a folder"]),
        (["name=.."], ["becomes a folder"]),
        (["base.max_steps=3"], ["base: needs `data`"]),
        (["base={data: b.jsonl, max_stepps: 3}"], ["base", "max_stepps", "max_steps"]),
        (["base={data: b.jsonl, eval_every: 3}"], ["base.eval_every"]),
        (["data.path=null"], ["methods need preference pairs"]),
        (["pairs={prompts: p.jsonl}"], ["keep one"]),
        (["train.best_metric=eval_loss"], ["need train.eval_every"]),
        (["train.eval_every=2", "train.best_metric=loss"], ["figure of an evaluation", "'loss'"]),
        (["train.eval_every=2", "train.early_stopping_patience=1"], ["needs train.best_metric"]),
        (["train.eval_every=2", "train.best_metric=eval_loss", "data.validation=0"], ["set data.validation above 0"]),
        (["train"], ["not an override", "key.path=value"]),
        (["=3"], ["not an override"]),
        (["train.seed=[1"], ["not YAML"]),
        (["name.x=3"], ["name is a value, not a section"]),
        (["model=null"], ["model"]),
        (["methods=[dpo, dpo]"], ["methods", "dictionary"]),
        (["methods={dpo: {}, dpo: {beta: 1}}"], ["'dpo' stands twice, in line 1"]),
        (["data.validation=1.5"], ["data.validation", "below 1 or a whole number of rows, found 1.5"]),
        (["model.lora.target_modules='(['"], ["target_modules: '([' is no regular expression", "in a list"]),
        (["train.max_steps=true"], ["train.max_steps: expected a number, found true"]),
        (["train.epochs=off"], ["train.epochs: expected a number, found false"]),
        (["methods.dpo.max_steps=yes"], ["methods.dpo: max_steps: expected a number, found true"]),
        (["judge.concurrency=on"], ["judge.concurrency: expected a number, found true"]),
        (["train.max_steps=1:30"], ["train.max_steps", "integer", "'1:30'"]),
        (["train.epochs=.inf"], ["train.epochs", "finite number", "inf"]),
        (["train.learning_rate=.inf"], ["train.learning_rate", "finite number", "inf"]),
        (["train.seed=-1"], ["train.seed", "greater than or equal to 0", "-1"]),
        (["generate.seed=4294967296"], ["generate.seed", "less than 4294967296"]),
        (["train.workers=[2, 8]", "train.min_workers=4"], ["workers [2, 8] and min_workers 4 both say the fewest"]),
    ],
)  # fmt: skip
def test_what_is_refused_and_in_which_words(overrides, words):
    with pytest.raises(UserError) as error:
        make_recipe(apply_overrides(TREE, overrides))
    for word in words:
        assert word in str(error.value)
    assert "Value error" not in str(error.value) and "pydantic" not in str(error.value)


def test_numbers_with_a_zero_before_them_and_dates_are_what_people_mean(tmp_path):
    text = "name: 2024-01-01\nmodel: m\ndata: d.json\nmethods: dpo\ntrain: {max_steps: 010, max_grad_norm: .inf}\n"
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.name == "2024-01-01" and recipe.train.max_steps == 10 and recipe.train.max_grad_norm == float("inf")
    assert make_recipe(yaml.safe_load(dump_yaml(recipe))) == recipe


def test_a_section_without_a_key_is_one_of_defaults(tmp_path):
    text = "name: x\nmodel: m\ndata: d.json\nmethods: dpo\ntrain:\n  # workers: 4\ngenerate:\njudge:\n"
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").train == TrainConfig()


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as error:
        make_recipe(apply_overrides(TREE, ["train.max_step=3", "judge.modell=x", "data.max_length=two"]))
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not YAML"),
        ("- a\n- b\n", "found list"),
        ("", "it is empty"),
        ("# nothing yet\n", "it is empty"),
        ("- {prompt: q, chosen: a, rejected: b}\n", "found a list of rows.*data: {path: .*otpo data"),
        ("name: x\nmodel:\n\tpath: m\n", "line 3, column 1: a tab.*use these"),
        ("name: x: y\n", "line 1, column 8: a ':' where no key can be"),
        (
            "name: x\nmethods:\n  dpo: {}\n  otpo: {}\n  dpo: {beta: 1}\n",
            "'methods.dpo' stands twice, in lines 3 and 5",
        ),
        ("a: [{b: 1, b: 2}]", "'a.b' stands twice, in line 1"),
        ("just text", "found str"),
        ("1: 2\nname: x\nmodel: {path: m}\n", "1"),
        ("name: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_recipe(path)


def test_a_data_file_is_no_recipe(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"expected a recipe \(YAML\), found a data file.*`otpo data"):
        load_recipe(tmp_path / "pairs.jsonl")


def test_yaml_merges_are_no_double_keys(tmp_path):
    text = "name: x\nmodel: m\ndata: d.json\nmethods: {a: &a {method: dpo, beta: 0.2}, b: {<<: *a, beta: 0.3}}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").methods["b"] == {"method": "dpo", "beta": 0.3}


def test_an_error_of_an_override_names_the_override_and_not_the_file_alone(tmp_path):
    path = write(tmp_path / "r.yaml", TREE)
    with pytest.raises(UserError) as error:
        load_recipe(path, ["train.seed=3", "train.max_step=3"])
    assert str(error.value).splitlines()[0] == f"{path} with train.max_step=3 is not a recipe:"
    with pytest.raises(UserError) as error:
        load_recipe(write(path, TREE | {"trian": {}}), ["train.max_step=3"])
    assert str(error.value).splitlines()[0] == f"{path} is not a recipe:"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"model": "m"}, {"model": {"path": "m"}}),
        ({"data": "p.jsonl"}, {"data": {"path": "p.jsonl"}}),
        ({"methods": ["dpo", "otpo"]}, {"methods": {"dpo": {}, "otpo": {}}}),
        ({"methods": "dpo"}, {"methods": {"dpo": {}}}),
        ({"generate": {"tasks": "ask.jsonl"}}, {"generate": {"tasks": ["ask.jsonl"]}}),
    ],
)
def test_short_forms_are_the_same_recipe(tmp_path, short, long):
    recipe = make_recipe(TREE | short)
    assert recipe == make_recipe(TREE | long) and identity(recipe) == identity(make_recipe(TREE | long))
    (section,) = short
    key, value = {"model": ("attn_implementation", "eager"), "data": ("limit", 5), "generate": ("seed", 3)}.get(
        section, ("dpo.beta", 0.3)
    )
    both = [make_recipe(apply_overrides(TREE | tree, [f"{section}.{key}={value}"])) for tree in (short, long)]
    assert both[0] == both[1] != recipe


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"No recipe at 'nowhere'.*small_world"):
        load_recipe("nowhere")
    with pytest.raises(UserError, match=r"not YAML|No recipe"):
        load_recipe(__file__.replace(".py", ".pyc"))


def fields(model: type[BaseModel], path: str = ""):
    """(dotted key, field) of a section and of the sections inside it."""
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for section in (part for part in inner if isinstance(part, type) and issubclass(part, BaseModel)):
            yield from fields(section, f"{path}{name}.")


def test_every_key_has_one_plain_line_that_says_what_it_is():
    found = dict(fields(Recipe))
    assert {"train.dtype", "judge.url", "pairs.scorer.url", "model.lora.r", "sweep.seed"} <= found.keys()
    ranges = {f"range.{name}": field for name, field in SweepRange.model_fields.items()}
    for key, field in (found | ranges).items():
        line = field.description or ""
        assert line.endswith(".") and "\n" not in line and len(line) < 120, f"{key}: {line!r}"


@pytest.mark.parametrize(("long", "short"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_a_dtype_may_be_spelled_as_transformers_does(long, short):
    keys = [f"train.dtype={long}", f"generate.dtype={long}", f"methods.sharp.dtype={long}"]
    recipe = make_recipe(apply_overrides(TREE, keys))
    assert recipe.train.dtype == recipe.generate.dtype == recipe.train_of("sharp").dtype == short
    assert identity(recipe) == identity(make_recipe(apply_overrides(TREE, [k.replace(long, short) for k in keys])))


def test_a_removed_key_of_an_old_recipe_is_ignored_with_a_note(tmp_path, caplog):
    old = {**TREE, "report": {"title": "Mine", "bootstrap_samples": 500}}
    recipe = load_recipe(write(tmp_path / "r.yaml", old))
    assert recipe == make_recipe({**TREE, "report": {"title": "Mine"}})
    assert "report.bootstrap_samples is no longer a key" in caplog.text
    assert "bootstrap_samples" not in dump_yaml(recipe)


def test_two_tasks_of_one_name_are_refused():
    recipe = make_recipe({**TREE, "generate": {"tasks": ["a/x.jsonl", "b/x.jsonl"]}})
    with pytest.raises(UserError, match="same name"):
        recipe.generate.named_tasks()
    assert make_recipe({**TREE, "generate": {"tasks": ["a/x.jsonl.gz", "alpaca_eval"]}}).generate.named_tasks() == {
        "x": "a/x.jsonl.gz",
        "alpaca_eval": "alpaca_eval",
    }

"""The registry of methods, and what a recipe may write under `methods`."""

import inspect
import json
import subprocess
import sys

import pytest
from support.random_pairs import PAIR_METHODS, spec_of
from typer.testing import CliRunner

from jobs.cli import app, main
from otpo.errors import UserError
from otpo.methods import FROZEN_MODELS, LOSSES, METHODS, NEEDS, SHARED, WEIGHT_RULES, Range, resolve
from otpo.methods.describe import describe
from otpo.methods.registry import hyperparameters as declared

GIVEN = {"seed", "global_values"}  # keywords that no recipe sets
SHARED_DEFAULTS = {name: each.default for name, each in SHARED.items()}
DECLARED = {each.name: each for each in vars(declared).values() if isinstance(each, declared.Hyperparameter)}


def keywords(function):
    """Keyword-only parameters of a loss or a weight rule that a recipe sets, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in GIVEN}


@pytest.mark.parametrize("row", [*LOSSES.values(), *WEIGHT_RULES.values()], ids=lambda row: row.path)
def test_every_path_imports_and_its_function_takes_exactly_what_is_declared(row):
    taken = keywords(row.function)
    assert set(taken) == {each.name for each in row.hyperparameters}
    assert row.function.__name__ == row.name and row.function.__doc__
    for each in row.hyperparameters:
        default = taken[each.name].default
        assert default in (inspect.Parameter.empty, each.default), f"{row.path}: {each.name} has two defaults"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.path)
def test_a_loss_takes_global_values_where_it_collects_them(loss):
    assert ("global_values" in inspect.signature(loss.function).parameters) == bool(loss.collects)
    assert callable(loss.collect) if loss.collects else loss.collect is None


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_exactly_what_the_loss_and_the_rule_take(name):
    method = METHODS[name]
    loss, rule = (set(keywords(f)) for f in (method.loss.function, method.weight_rule.function))
    assert set(method.defaults) == loss | rule and not set(SHARED) & set(method.defaults)
    spec = spec_of(name)
    assert set(spec.arguments(method.loss.function)) - GIVEN == loss
    assert set(spec.arguments(method.weight_rule.function)) == rule


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_complete_and_their_defaults_valid(name):
    method = METHODS[name]
    assert method.name == name and method.title and method.paper.startswith("https://")
    everything = method.defaults | SHARED_DEFAULTS
    spec = spec_of(name, **everything)
    assert spec.hyperparameters == everything and resolve(name, spec.settings) == spec
    assert set(method.overrides) <= set(method.defaults)
    assert method.loss.needs | method.weight_rule.needs <= set(NEEDS)


def test_a_hyperparameter_is_declared_once_with_one_line_of_meaning():
    used = [row for rows in (LOSSES, WEIGHT_RULES) for each in rows.values() for row in each.hyperparameters]
    used += SHARED.values()
    assert {row.name for row in used} == set(DECLARED)
    for row in used:
        first = DECLARED[row.name]
        assert (row.allowed, row.meaning, type(row.default)) == (first.allowed, first.meaning, type(first.default))
        assert row.meaning and "\n" not in row.meaning
        is_number = not isinstance(row.default, bool | str)
        assert isinstance(row.allowed, Range) == is_number
        assert isinstance(row.allowed, tuple) == isinstance(row.default, str)


def test_a_label_may_be_a_name_or_carry_one():
    assert resolve("otpo", None).hyperparameters == METHODS["otpo"].defaults | SHARED_DEFAULTS
    spec = resolve("otpo-sharp", {"method": "otpo", "reg": 0.03})
    assert (spec.label, spec.method.name, spec.hyperparameters["reg"]) == ("otpo-sharp", "otpo", 0.03)
    assert resolve("dpo", {"method": "otpo"}).method.name == "otpo"
    assert METHODS["otpo"].defaults["reg"] == 0.1


def test_frozen_models_are_named_beside_hyperparameters():
    spec = resolve("tgdpo", {"oracle": "dpo", "tgdpo_alpha": 1})
    assert spec.frozen_models == {"oracle": "dpo"} and "oracle" not in spec.hyperparameters
    assert spec.settings["oracle"] == "dpo" and spec.settings["method"] == "tgdpo"


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_any_rule_may_weight_the_tokens_of_any_loss_of_pairs(rule):
    frozen = {name: "./model" for name in FROZEN_MODELS if name in WEIGHT_RULES[rule].needs}
    for name in PAIR_METHODS:
        spec = resolve("mine", {"method": name, "weights": rule, **frozen})
        loss, weights = METHODS[name].loss.function, WEIGHT_RULES[rule].function
        assert spec.method.weight_rule.name == rule and spec.method.loss == METHODS[name].loss
        assert spec.method.needs == METHODS[name].loss.needs | WEIGHT_RULES[rule].needs
        assert set(spec.arguments(loss)) | set(spec.arguments(weights)) == set(spec.method.defaults)
        assert spec.arguments(weights).keys() == {each.name for each in WEIGHT_RULES[rule].hyperparameters}
        assert resolve("mine", spec.settings) == spec


def test_the_rows_of_otpo_are_its_rule_under_other_losses():
    for name, loss in (("otpo", "dpo"), ("otpo-simpo", "simpo"), ("otpo-ipo", "ipo")):
        ours, theirs = resolve(name, {}), resolve("mine", {"method": loss, "weights": "otpo"})
        assert (ours.hyperparameters, ours.method.needs) == (theirs.hyperparameters, theirs.method.needs)
        assert (ours.method.loss, ours.method.weight_rule) == (theirs.method.loss, theirs.method.weight_rule)
    assert [resolve(name, {"weights": "otpo"}).hyperparameters["total"] for name in ("hinge", "orpo")] == [
        "shorter",
        "one",
    ]


def test_settings_are_not_changed():
    given = {"method": "otpo", "reg": 1}
    resolve("a", given)
    assert given == {"method": "otpo", "reg": 1}


def test_numbers_keep_the_type_of_the_default():
    spec = resolve("otpo", {"reg": 1, "beta": "1e-2"})
    assert (spec.hyperparameters["reg"], spec.hyperparameters["beta"]) == (1.0, 0.01)
    assert all(isinstance(spec.hyperparameters[key], float) for key in ("reg", "beta"))
    iterations = resolve("otpo", {"iterations": 30.0}).hyperparameters["iterations"]
    assert iterations == 30 and isinstance(iterations, int)


@pytest.mark.parametrize(
    ("label", "settings", "words"),
    [
        ("otop", {}, ["methods.otop", "did you mean 'otpo'", "sampo"]),
        ("mine", {}, ["methods.mine", "method: NAME"]),
        ("mine", {"method": 3}, ["found 3"]),
        ("otpo", {"regg": 1}, ["methods.otpo.regg", "did you mean 'reg'", "reg_m"]),
        ("dpo", {"reg": 1}, ["methods.dpo.reg", "It takes: beta, label_smoothing"]),
        ("otpo", {"reg": 0}, ["methods.otpo.reg", "above 0", "found 0"]),
        ("otpo", {"reg_m": -0.2}, ["methods.otpo.reg_m", "above 0"]),
        ("otpo", {"reg": float("inf")}, ["found inf"]),
        ("otpo", {"reg": float("nan")}, ["found nan"]),
        ("otpo", {"reg": "sharp"}, ["a number above 0", "found 'sharp'"]),
        ("otpo", {"reg": True}, ["a number above 0", "found True"]),
        ("otpo", {"reg": [1]}, ["found [1]"]),
        ("otpo", {"reg": None}, ["found None"]),
        ("otpo", {"cost": "cosin"}, ["one of l2, sqeuclidean, cosine", "did you mean 'cosine'"]),
        ("otpo", {"solver": 1}, ["batched", "found 1"]),
        ("sampo", {"expected": "yes"}, ["true or false", "found 'yes'"]),
        ("sampo", {"expected": 1}, ["true or false", "found 1"]),
        ("dpo", {"label_smoothing": 0.5}, ["at least 0 and below 0.5"]),
        ("dpo", {"beta": 0}, ["methods.dpo.beta", "above 0"]),
        ("ld-dpo", {"ld_alpha": 1.1}, ["at least 0 and at most 1"]),
        ("simpo", {"gamma_beta_ratio": -1}, ["at least 0"]),
        ("simpo", {"sft_weight": -1}, ["methods.simpo.sft_weight", "at least 0"]),
        ("alphapo", {"alphapo_alpha": "a"}, ["expected a number, found 'a'"]),
        ("exo", {"exo_epsilon": 0}, ["above 0 and below 0.5"]),
        ("f-dpo", {"divergence": "kl"}, ["one of reverse_kl, forward_kl, js, alpha"]),
        ("tgdpo", {}, ["methods.tgdpo.oracle", "another label", "found None"]),
        ("tis-dpo", {"positive": "dpo", "negative": 3}, ["methods.tis-dpo.negative", "found 3"]),
        ("sepo", {"oracle": "dpo", "bta": 1}, ["methods.sepo.bta", "did you mean 'beta'", "It takes: oracle, beta"]),
        ("dpo", {"oracle": "x"}, ["methods.dpo.oracle"]),
        ("otpo", {"iterations": 2.5}, ["a whole number"]),
        ("otpo", {"tolerance": 1}, ["above 0 and below 1"]),
        ("otpo", {"reg": 1e-6}, ["methods.otpo: reg 1e-06 beside reg_m 0.2 takes 2,072,3", "raise reg, lower reg_m"]),
        ("otpo", {"reg_m": 1e6}, ["reg 0.1 beside reg_m 1e+06 takes 103,6", "(iterations)"]),
        (
            "otpo",
            {"reg": 1e-4, "solver": "pot"},
            ["methods.otpo: solver: pot gives no plan", "0.0015", "batched"],
        ),
        ("otpo", {"reg": 1e-320, "reg_m": 10}, ["takes endless iterations"]),
        ("hinge", {"weights": "otpo", "reg": 1e-9}, ["methods.hinge: reg 1e-09"]),
        ("hinge", {"weights": "otop"}, ["methods.hinge.weights", "did you mean 'otpo'", "uniform, mean, ld"]),
        ("hinge", {"weights": ["otpo"]}, ["methods.hinge.weights", "found ['otpo']"]),
        ("hinge", {"weights": "otpo", "reg": 0}, ["methods.hinge.reg", "above 0"]),
        ("hinge", {"weights": "sepo"}, ["methods.hinge.oracle", "found None"]),
        ("otpo", {"weights": "uniform", "reg": 1}, ["methods.otpo.reg", "It takes: beta, label_smoothing"]),
        ("kto", {"weights": "otpo"}, ["methods.kto.weights", "leave it out"]),
        ("reward-model", {"weights": "otpo"}, ["methods.reward-model.weights"]),
    ],
)
def test_wrong_input_is_explained(label, settings, words):
    with pytest.raises(UserError) as error:
        resolve(label, settings)
    for word in words:
        assert word in str(error.value)


def test_a_sharp_plan_may_take_as_many_iterations_as_someone_says():
    assert resolve("otpo", {"reg": 1e-6, "iterations": 50}).hyperparameters["iterations"] == 50
    assert resolve("otpo", {"reg": 1e-4}).hyperparameters["reg"] == 1e-4  # 20,728 iterations
    assert resolve("otpo", {"reg": 1e-4, "solver": "pot", "normalizer": "none"}), "costs may be small"


def test_a_recipe_is_checked_without_torch():
    heavy = "{'torch', 'numpy', 'transformers', 'ot'} & set(sys.modules)"
    check = "resolve('mine', {'method': 'hinge', 'weights': 'otpo', 'reg': 0.3})"
    code = f"import sys; from otpo.methods import resolve; {check}; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_described_as_plain_data(name):
    row = describe(METHODS[name])
    assert json.loads(json.dumps(row)) == row
    assert [each["name"] for each in row["hyperparameters"]] == [*METHODS[name].defaults, *SHARED]
    defaults = {each["name"]: each["default"] for each in row["hyperparameters"]}
    assert defaults == METHODS[name].defaults | SHARED_DEFAULTS
    assert row["loss"]["formula"] and (row["weight_rule"] is None) == (METHODS[name].objective != "pair")


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_method_prints_its_row(name):
    done = CliRunner().invoke(app, ["methods", name], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    row = describe(METHODS[name])
    words = [row["title"], row["paper"], row["note"], row["loss"]["formula"], *row["needs"]]
    assert all(word in done.output for word in words)
    printed = " ".join(done.output.split())
    for each in row["hyperparameters"]:
        assert f" {each['name']} " in printed and each["meaning"].split()[0] in printed


def test_help_of_an_unknown_method_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["otpo", "methods", "otop"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2 and "did you mean 'otpo'" in capsys.readouterr().err

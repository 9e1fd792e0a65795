"""The table of methods, and what a recipe may write under `methods`."""

import inspect
import subprocess
import sys

import pytest
from support.random_pairs import PAIR_METHODS, spec_of

from otpo.errors import UserError
from otpo.methods.losses import LOSSES
from otpo.methods.spec import FROZEN_MODELS, METHODS, RANGES, SHARED, WEIGHTS, resolve
from otpo.methods.weights.rules import RULES


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_exactly_what_the_loss_and_the_rule_take(name):
    method = METHODS[name]
    loss, rule = (
        {p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
        - {"seed", "global_values"}
        for f in (LOSSES[method.loss], RULES[method.weights])
    )
    assert set(method.defaults) == loss | rule and not set(SHARED) & set(method.defaults)
    spec = spec_of(name)
    assert set(spec.arguments(LOSSES[method.loss])) == loss and set(spec.arguments(RULES[method.weights])) == rule


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_complete_and_their_defaults_valid(name):
    method = METHODS[name]
    assert method.name == name and method.title and method.paper.startswith("https://")
    everything = method.defaults | SHARED
    spec = spec_of(name, **everything)
    assert spec.hyperparameters == everything and resolve(name, spec.settings) == spec
    numbers = {k for k, v in everything.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    assert numbers <= set(RANGES)


def test_every_range_is_of_a_known_hyperparameter():
    assert set(RANGES) <= {key for method in METHODS.values() for key in method.defaults} | set(SHARED)


def test_a_label_may_be_a_name_or_carry_one():
    assert resolve("otpo", None).hyperparameters == METHODS["otpo"].defaults | SHARED
    spec = resolve("otpo-sharp", {"method": "otpo", "reg": 0.03})
    assert (spec.label, spec.method.name, spec.hyperparameters["reg"]) == ("otpo-sharp", "otpo", 0.03)
    assert resolve("dpo", {"method": "otpo"}).method.name == "otpo"
    assert METHODS["otpo"].defaults["reg"] == 0.1


def test_frozen_models_are_named_beside_hyperparameters():
    spec = resolve("tgdpo", {"oracle": "dpo", "tgdpo_alpha": 1})
    assert spec.frozen_models == {"oracle": "dpo"} and "oracle" not in spec.hyperparameters
    assert spec.settings["oracle"] == "dpo" and spec.settings["method"] == "tgdpo"


@pytest.mark.parametrize("rule", WEIGHTS)
def test_any_rule_may_weigh_the_tokens_of_any_loss_of_pairs(rule):
    scorers = {name: "./model" for name in FROZEN_MODELS if name in WEIGHTS[rule].needs}
    for name in PAIR_METHODS:
        spec = resolve("mine", {"method": name, "weights": rule, **scorers})
        loss, weigh = LOSSES[METHODS[name].loss], RULES[rule]
        assert spec.method.weights == rule and spec.method.loss == METHODS[name].loss
        assert spec.method.needs == METHODS[name].loss_needs | WEIGHTS[rule].needs
        assert set(spec.arguments(loss)) | set(spec.arguments(weigh)) == set(spec.method.defaults)
        assert spec.arguments(weigh).keys() == WEIGHTS[rule].defaults.keys()
        assert resolve("mine", spec.settings) == spec
    assert WEIGHTS.keys() == RULES.keys()


def test_the_rows_of_otpo_are_its_rule_under_other_losses():
    for name, loss in (("otpo", "dpo"), ("otpo-simpo", "simpo"), ("otpo-ipo", "ipo")):
        ours, theirs = resolve(name, {}), resolve("mine", {"method": loss, "weights": "otpo"})
        assert (ours.hyperparameters, ours.method.needs) == (theirs.hyperparameters, theirs.method.needs)
        assert (ours.method.loss, ours.method.weights) == (theirs.method.loss, theirs.method.weights)
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


def test_the_table_is_read_without_torch():
    heavy = "{'torch', 'numpy', 'transformers', 'ot'} & set(sys.modules)"
    code = f"import sys, otpo.methods.spec; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""A mix of data sets in a run: what is read of each, what is counted and held out, and what an epoch trains on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.small_lm import small_lm
from support.training import losses, metrics, pairs_of, settings, write_pairs

from otpo.data.collate import collate_pairs
from otpo.data.token_file import load_tokens
from otpo.errors import UserError
from otpo.identity import source_identity
from otpo.methods.spec import resolve
from otpo.models.policy import PolicyModel
from otpo.training.objectives.pair import preference_losses
from otpo.training.objectives.reward import load_margins
from otpo.training.step import evaluate
from pipeline.recipe import make_recipe
from pipeline.run.inputs import reading_inputs
from pipeline.run.run import open_context, run
from pipeline.run.stages.train import pairs_inputs
from pipeline.train.launcher import make_job
from pipeline.train.tokens import prepare_tokens

WORDS = "the quick brown fox jumps over the lazy dog and the other fox".split()


def write_sets(folder: Path) -> dict[str, dict]:
    """60 rows {prompt, chosen, rejected}; 30 of UltraFeedback's columns, of which two cannot be used."""
    write_pairs(folder / "plain.json", 60)
    rows = [
        {
            "prompt": f"Question {i}: ask",
            "chosen": f" {' '.join(WORDS[: i % 9 + 2])}",
            "rejected": f" no {i}" if i % 15 else "",
            "score_chosen": 1 + i % 2,
            "score_rejected": 1,
        }
        for i in range(30)
    ]
    (folder / "rated.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"plain": {"path": str(folder / "plain.json")}, "rated": {"path": str(folder / "rated.jsonl")}}


def prepared(folder: Path, model: Path, data: dict, methods: dict | None = None, **changes):
    recipe = make_recipe(settings(folder, model, methods=methods or {"dpo": {}}, data=data, **changes))
    sources = {name: each.path for name, each in recipe.data.datasets.items()} or recipe.data.path or ""
    return recipe, prepare_tokens(recipe, folder / "run", model=str(model), source=sources, supervised=False)


def test_sets_are_recognised_counted_and_held_out_each_for_itself(tmp_path, tiny_llama):
    _, tokens = prepared(tmp_path, tiny_llama, {"datasets": write_sets(tmp_path), "validation": 0.2})
    plain, rated = tokens.sets
    assert (plain.report.format, rated.report.format) == ("preference", "ultrafeedback")
    assert plain.report.problems == {} and rated.report.problems == {"rejected is empty": [0, 15]}
    assert rated.report.notes["equal scores"] == [i for i in range(0, 30, 2) if i], "its own row numbers"
    assert [(s.items, s.taken, s.held, s.first, s.end) for s in tokens.sets] == [
        (48, 48, 12, 0, 60),
        (22, 22, 6, 60, 90),
    ]
    assert tokens.n_train == tokens.epoch == 70 and tokens.report.n_rows == 90 and tokens.report.n_usable == 88
    assert tokens.report.problems == {"rated: rejected is empty": [60, 75]}, "numbered through"
    train, held = pairs_of(tokens.train), pairs_of(tokens.validation)
    assert [pair.row for pair in train] == sorted(pair.row for pair in train)
    assert sorted(pair.row for pair in train + held) == [i for i in range(90) if i not in (60, 75)]
    assert sum(pair.row < 60 for pair in held) == 12
    written = json.loads((Path(tokens.train).parent / "report.json").read_text())
    assert written["datasets"]["rated"]["problems"] == {"rejected is empty": {"count": 2, "first_rows": [0, 15]}}
    _, again = prepared(tmp_path, tiny_llama, {"datasets": write_sets(tmp_path), "validation": 0.2})
    assert again.hash == tokens.hash and pairs_of(again.train) == train


def test_a_mix_of_whole_sets_trains_on_the_token_ids_of_its_sets(tmp_path, tiny_llama):
    sets = write_sets(tmp_path)
    alone = [prepared(tmp_path, tiny_llama, each | {"validation": 0})[1] for each in sets.values()]
    _, mix = prepared(tmp_path, tiny_llama, {"datasets": sets, "validation": 0})
    ids = [[(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs_of(t.train)] for t in (*alone, mix)]
    assert ids[2] == ids[0] + ids[1]
    one = prepared(tmp_path, tiny_llama, {"datasets": {"plain": sets["plain"]}, "validation": 0.2})[1]
    single = prepared(tmp_path, tiny_llama, sets["plain"] | {"validation": 0.2})[1]
    assert (one.hash, Path(one.train).name) == (single.hash, Path(single.train).name)
    assert pairs_of(one.train) == pairs_of(single.train) and single.sets == ()


def test_fractions_cut_or_repeat(tmp_path, tiny_llama):
    sets = {name: each | {"fraction": 1} for name, each in write_sets(tmp_path).items()}
    _, cut = prepared(tmp_path, tiny_llama, {"datasets": sets, "validation": 0.25})
    assert [(s.items, s.taken, s.held) for s in cut.sets] == [(21, 21, 7), (21, 21, 7)], "cut to 28 of each"
    assert cut.n_train == cut.epoch == 42
    recipe, again = prepared(
        tmp_path, tiny_llama, {"datasets": sets, "validation": 0.25, "stopping_strategy": "all_exhausted"}
    )
    assert [(s.items, s.taken, s.held) for s in again.sets] == [(45, 45, 15), (21, 45, 7)]
    assert (again.n_train, again.epoch) == (66, 90)
    job = make_job(recipe, tmp_path, "dpo", model=recipe.model, tokens=again, caches=tmp_path)
    assert job.sets == [
        {"name": "plain", "items": 45, "taken": 45, "rows": [0, 60]},
        {"name": "rated", "items": 21, "taken": 45, "rows": [60, 90]},
    ]
    _, limited = prepared(
        tmp_path, tiny_llama, {"datasets": {**sets, "plain": sets["plain"] | {"limit": 8}}, "validation": 0}
    )
    assert [s.report.n_rows for s in limited.sets] == [8, 30] and [s.end for s in limited.sets] == [8, 38]


def test_a_prompt_of_two_sets_is_on_one_side(tmp_path, tiny_llama):
    write_pairs(tmp_path / "one.json", 40, seed=1)
    rows = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps([row | {"chosen": row["chosen"] + " b"} for row in rows]))
    sets = {name: {"path": str(tmp_path / f"{name}.json")} for name in ("one", "two")}
    _, tokens = prepared(tmp_path, tiny_llama, {"datasets": sets, "validation": 0.25})
    held = [pair.row for pair in pairs_of(tokens.validation)]
    assert len(held) == 20 and {row % 40 for row in held if row < 40} == {row % 40 for row in held if row >= 40}


def test_labelled_completions_of_a_mix(tmp_path, tiny_llama):
    sets = write_sets(tmp_path)
    _, tokens = prepared(tmp_path, tiny_llama, {"datasets": sets, "validation": 0.2}, {"dpo": {}, "kto": {}})
    assert tokens.unpaired and [(s.items, s.held) for s in tokens.unpaired.sets] == [(96, 24), (44, 12)]
    assert tokens.unpaired.epoch == len(load_tokens(tokens.unpaired.train)) == 140
    labelled = [{"prompt": f"Q{i}", "completion": f" {i} yes", "label": i % 2 == 0} for i in range(20)]
    (tmp_path / "kto.json").write_text(json.dumps(labelled))
    sets["kto"] = {"path": str(tmp_path / "kto.json")}
    with pytest.raises(UserError, match="'rated' holds preference pairs and 'kto' labelled completions"):
        prepared(tmp_path, tiny_llama, {"datasets": sets}, {"kto": {}})
    only = {"datasets": {"a": sets["kto"], "b": sets["kto"]}, "validation": 0}
    _, tokens = prepared(tmp_path, tiny_llama, only, {"kto": {}})
    assert tokens.report.labels == {"true": 20, "false": 20} and tokens.epoch == 40


def test_margins_of_a_mix_are_those_of_every_set_or_of_none(tmp_path, tiny_llama):
    rows = json.loads(write_pairs(tmp_path / "one.json", 20).read_text())
    for name, start in (("one", 0), ("two", 10)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"margin": start + i} for i, row in enumerate(rows)]))
    sets = {name: {"path": str(tmp_path / f"{name}.json")} for name in ("one", "two")}
    methods = {"rm": {"method": "reward-model"}}
    _, tokens = prepared(tmp_path, tiny_llama, {"datasets": sets}, methods)
    assert load_margins(tokens.margins) == {i: i % 20 + 10 * (i >= 20) for i in range(40)}
    with pytest.raises(UserError, match="rows of one have a `margin` and those of plain have none"):
        prepared(tmp_path, tiny_llama, {"datasets": sets | {"plain": write_sets(tmp_path)["plain"]}}, methods)


# ---- the recipe ----


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"path": "a.json", "datasets": {"b": "b.json"}}, "keep one"),
        ({"datasets": {"b": "b.json"}, "limit": 10}, r"datasets\.NAME\.limit"),
        ({"datasets": {"b": "b.json"}, "split": "test"}, r"datasets\.NAME\.split"),
        ({"datasets": {"b": "b.json"}, "columns": {"prompt": "frage"}}, r"datasets\.NAME\.columns"),
        ({"datasets": {"a": {"path": "a.json", "fraction": 1}, "b": "b.json"}}, r"datasets\.b\.fraction is missing"),
        ({"datasets": {"a": {"path": "a.json", "fraction": 0}}}, "greater than 0"),
        ({"datasets": {"a": {"path": "a.json", "weight": 2}}}, r"unknown key 'data\.datasets\.a\.weight'.*fraction"),
        ({"datasets": {"a/b": "a.json"}}, "names metrics"),
        ({"datasets": ["x/a.json", "y/a.json"]}, "give names"),
        ({"datasets": {"a": {}}}, r"data\.datasets\.a\.path' is needed"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(tmp_path, data, words):
    with pytest.raises(UserError, match=words):
        make_recipe(settings(tmp_path, tmp_path, methods={"dpo": {}}, data=data))


def test_a_list_names_its_sets_by_their_files(tmp_path):
    sets = ["x/ultra.jsonl.gz", {"path": "owner/hh", "fraction": 2}]
    with pytest.raises(UserError, match=r"datasets\.ultra\.fraction is missing"):
        make_recipe(settings(tmp_path, tmp_path, data={"datasets": sets}))
    recipe = make_recipe(settings(tmp_path, tmp_path, data={"datasets": [sets[0], "owner/hh"]}))
    assert {name: each.path for name, each in recipe.data.datasets.items()} == {"ultra": sets[0], "hh": "owner/hh"}


def test_a_stage_depends_on_every_set_and_a_single_one_as_before(tmp_path, tiny_llama):
    sets = write_sets(tmp_path)
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}}, data={"datasets": sets})
    this = open_context(make_recipe(tree), tmp_path / "run", world=None, progress=print, redo=False)
    assert pairs_inputs(this) == {name: source_identity(each["path"]) for name, each in sets.items()}
    sets["rated"]["limit"] = 20
    inputs = reading_inputs(make_recipe(tree))
    assert inputs["datasets"] == {
        "plain": {"split": "train", "fraction": None, "limit": None, "columns": {}},
        "rated": {"split": "train", "fraction": None, "limit": 20, "columns": {}},
    }
    single = reading_inputs(make_recipe(settings(tmp_path, tiny_llama)))
    assert not {"path", "datasets", "stopping_strategy"} & set(single)


# ---- training ----


def test_an_evaluation_tells_the_sets_apart():
    torch.manual_seed(0)
    policy = PolicyModel(small_lm()).eval()
    method = resolve("simpo", {"method": "simpo"})
    from support.small_lm import PAIRS

    loss = preference_losses(policy, method, lambda batch: {}, seed=0)
    rows = [pair.row for pair in PAIRS]
    sets = {"first": (rows[0], rows[1]), "others": (rows[1], rows[-1] + 1)}
    whole = evaluate([collate_pairs(PAIRS)], loss, denominator=len(PAIRS), sets=sets)
    for name, members in (("first", PAIRS[:1]), ("others", PAIRS[1:])):
        alone = evaluate([collate_pairs(members)], loss, denominator=len(members))
        for metric, value in alone.items():
            if metric != "eval_tokens":
                assert whole[f"eval_{name}_{metric.removeprefix('eval_')}"] == pytest.approx(value, rel=1e-5)
    assert whole["eval_loss"] == pytest.approx((whole["eval_first_loss"] + 2 * whole["eval_others_loss"]) / 3)


@pytest.mark.slow
def test_a_run_of_a_mix_repeats_rows_and_reports_each_set(tmp_path, tiny_llama):
    sets = {name: each | {"fraction": 1} for name, each in write_sets(tmp_path).items()}
    data = {"datasets": sets, "validation": 0.25, "stopping_strategy": "all_exhausted"}
    train = {"max_steps": None, "epochs": 1, "eval_every": 6, "workers": 1}
    said = []
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods={"simpo": {}}, data=data, train=train))
    done = run(recipe, tmp_path / "run", progress=lambda *call: said.append(call), until="train")
    label = done.folder.label("simpo").path
    assert len(losses(label)) == 12, "90 rows in batches of 8: every row of `plain` once, `rated` twice or more"
    steps, evaluations = metrics(label)
    assert steps[-1]["epoch"] == 1
    found = evaluations[-1]
    assert found["eval_loss"] == pytest.approx((15 * found["eval_plain_loss"] + 7 * found["eval_rated_loss"]) / 22)
    lines = Counter(remark.split(" (")[0] for what, _, _, remark in said if what.startswith("rows of"))
    assert lines == {
        "usable; an epoch takes 45, 15 held out": 1,
        "usable; left out: 2 rejected is empty; an epoch takes 45 of 21, 7 held out": 1,
    }

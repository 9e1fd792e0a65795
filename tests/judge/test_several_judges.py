"""Panels and changes of the judge, over real HTTP."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score
from support.servers import Reply, ScriptedJudge, completion, share, verdict

from eval.judge.budget import Spending
from eval.judge.config import JudgeConfig
from eval.judge.panels.members import judge_label, members_of
from eval.judge.protocols.templates import fenced_texts
from eval.judge.table import answering_models, several_models
from eval.judge.verdicts import judge
from eval.stats.judges import judges_agreement, migration
from pipeline.judge.judging import Judge, Match, judge_task


def rows(n, generator):
    return [
        {"instruction": f"Question {i}", "output": f"{generator} says {i}", "generator": generator} for i in range(n)
    ]


def taste(model, text):
    return share(f"{model} on {text}")


def opinionated(call):
    """Each model has a taste of its own; `silent` gives no verdict on some questions."""
    model = call.body["model"]
    question, first, second = fenced_texts(call.body["messages"][-1]["content"])
    if model == "silent" and question.endswith("3"):
        return Reply({"error": {"message": "flagged by moderation"}}, 400)
    p = taste(model, first) / (taste(model, first) + taste(model, second))
    return completion("m" if p > 0.5 else "M", {"m": p, "M": 1 - p})


def prefers(model, i, who="model"):
    ours, theirs = taste(model, f"{who} says {i}"), taste(model, f"reference says {i}")
    return ours / (ours + theirs)


def panel(server, tmp_path, names=("a", "b", "c"), n=30, **settings):
    first, *others = names
    config = JudgeConfig(
        url=server.url, model=first, panel=[{"model": name} for name in others], price_input=1.0, **settings
    )
    asked = Judge(config, tmp_path / "store.sqlite")
    return asked, judge_task(asked, [Match("model", "reference", rows(n, "model"), rows(n, "reference"))], "task")


def test_the_mean_of_a_panel_is_the_mean_of_its_judges(tmp_path):
    with ScriptedJudge(opinionated) as server:
        asked, frame = panel(server, tmp_path)
        assert len(server.calls) == 90
        calls = {name: sum(call.body["model"] == name for call in server.calls) for name in "abc"}
    assert calls == {"a": 30, "b": 30, "c": 30}
    expected = [1 + np.mean([prefers(name, i) for name in "abc"]) for i in range(30)]
    assert frame["preference"].tolist() == pytest.approx(expected)
    assert set(frame["read"]) == {"panel"} and frame["attempts"].sum() == 90
    assert frame["price_usd"].sum() == pytest.approx(90 * 100 / 1e6) == asked.spending.usd
    said = json.loads(frame["raw"][7])
    assert said == pytest.approx({name: 1 + prefers(name, 7) for name in "abc"})
    assert judge_label(asked.config) == "mean of a, b and c"


def test_a_commands_judges_share_one_budget(tmp_path):
    """As a run's milestones and its judge stage do: each has a judge of its own."""
    spending = Spending()
    with ScriptedJudge(opinionated) as server:
        config = JudgeConfig(url=server.url, model="a", price_input=1.0, budget_usd=0.0015, concurrency=1)
        frames = []
        for task in ("milestones", "task"):
            reference = [row | {"instruction": f"{task} {row['instruction']}"} for row in rows(30, "reference")]
            outputs = [row | {"instruction": f"{task} {row['instruction']}"} for row in rows(30, "model")]
            asked = Judge(config, tmp_path / "store.sqlite", spending=spending)
            frames.append(judge_task(asked, [Match("model", "reference", outputs, reference)], task))
    answered = [int(frame["preference"].notna().sum()) for frame in frames]
    assert spending.usd == pytest.approx(sum(answered) * 100 / 1e6) and spending.usd <= config.budget_usd
    assert answered[0] > 0 and answered[1] == 0, "the first task used up what both may spend"


def test_the_majority_of_a_panel_is_what_most_judges_name(tmp_path):
    with ScriptedJudge(opinionated) as server:
        _, frame = panel(server, tmp_path, panel_vote="majority")
        _, two = panel(server, tmp_path, names=("a", "b"), panel_vote="majority")
        assert len(server.calls) == 90  # the second panel's judges had been asked
    wins = np.array([[prefers(name, i) > 0.5 for name in "abc"] for i in range(30)])
    assert frame["preference"].tolist() == np.where(wins.sum(axis=1) > 1, 2.0, 1.0).tolist()
    assert two["preference"].tolist() == np.choose(wins[:, :2].sum(axis=1), [1.0, 1.5, 2.0]).tolist()


def test_a_panel_has_no_verdict_where_a_judge_has_none(tmp_path):
    with ScriptedJudge(opinionated) as server:
        _, frame = panel(server, tmp_path, names=("a", "silent"))
    missing = [i % 10 == 3 for i in range(30)]
    assert frame["preference"].isna().tolist() == missing
    assert frame.loc[missing, "error"].tolist() == ["refused"] * 3
    assert frame.loc[missing, "detail"].str.startswith("silent: ").all()


def test_members_have_the_first_judges_settings_but_their_own():
    config = JudgeConfig(url="http://a/v1", model="a", temperature=0.5, price_input=1,
                         panel=[{"model": "b", "url": "http://b/v1", "price_input": 3}])  # fmt: skip
    first, second = members_of(config)
    assert first.panel == second.panel == []
    assert (second.model, second.url, second.temperature, second.price_input) == ("b", "http://b/v1", 0.5, 3)
    for wrong, message in (
        ({"model": "a", "panel": [{"model": "a"}]}, "one twice"),
        ({"reward_model": "r", "panel": [{"model": "a"}]}, "reward model judges alone"),
        ({"model": "a", "panel": [{"url": "http://b/v1"}]}, "Field required"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeConfig(**wrong)


def table(preferences, names=("x",)):
    n = len(preferences) // len(names)
    return pd.DataFrame({"generator": np.repeat(names, n), "index": np.tile(np.arange(n), len(names)),
                         "preference": preferences})  # fmt: skip


def test_the_agreement_of_two_judges_is_scikit_learns():
    rng = np.random.default_rng(0)
    one, other = rng.choice([1.0, 1.5, 2.0, np.nan], 400), rng.choice([1.2, 1.5, 1.9], 400)
    found = judges_agreement(table(one), table(other))
    known = ~np.isnan(one)
    labels = [np.sign(side[known] - 1.5).astype(int) for side in (one, other)]
    assert found["n"] == known.sum()
    assert found["agreement"] == pytest.approx(np.mean(labels[0] == labels[1]))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*labels))
    assert found["agreement_low"] < found["agreement"] < found["agreement_high"]


def test_a_migration_says_what_moved():
    rng = np.random.default_rng(1)
    names, rates = ("weak", "middle", "good"), (0.2, 0.5, 0.8)
    old = np.concatenate([1 + (rng.random(300) < rate) for rate in rates]).astype(float)
    same = migration(table(old, names), table(old, names))
    assert same["agreement"] == same["kappa"] == same["kendall_tau"] == 1 and same["moved"] == 0
    new = np.concatenate([3 - old[:300], old[300:]])  # the new judge reverses what it says of the first model
    found = migration(table(old, names), table(new, names))
    by_name = {row["name"]: row for row in found["models"]}
    assert [row["name"] for row in found["models"]][-1] == "middle" and found["moved"] >= 2
    assert by_name["weak"]["new_win_rate"] == pytest.approx(100 - by_name["weak"]["old_win_rate"])
    assert by_name["weak"]["low"] < by_name["weak"]["difference"] < by_name["weak"]["high"]
    assert by_name["weak"]["agreement"] == 0 and by_name["good"]["difference"] == 0


def test_models_with_the_same_verdicts_in_another_order_share_a_rank():
    """Means of thirds that are added in another order differ in their last digit."""
    rng, thirds = np.random.default_rng(0), 1 + np.random.default_rng(0).choice([0, 1 / 3, 2 / 3, 1], 20)
    names = ("one", "two", "three")
    for _ in range(3):
        old, new = (np.concatenate([rng.permutation(thirds) for _ in names]) for _ in range(2))
        found = migration(table(old, names), table(new, names))
        assert found["moved"] == 0 and found["kendall_tau"] is None
        assert {(row["old_rank"], row["new_rank"]) for row in found["models"]} == {(1, 1)}


def verb(*words):
    return subprocess.run([sys.executable, "-m", "jobs.cli", *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
def test_a_board_is_judged_again_by_another_judge(tmp_path):
    for name in ("model", "other", "reference"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows(20, name)))
    with ScriptedJudge(opinionated) as server:
        done = verb(
            *("judge", tmp_path / "model.json", tmp_path / "other.json", "--reference", tmp_path / "reference.json"),
            *("--out", tmp_path / "old", "--judge-url", server.url, "--judge-model", "a"),
            *("--set", "judge.panel=[{model: c}]"),
        )
        assert done.returncode == 0 and "name the same winner" in done.stderr, done.stderr
        again = verb(
            *("rejudge", tmp_path / "old", "--out", tmp_path / "new"),
            *("--judge-url", server.url, "--judge-model", "b"),
        )
        assert again.returncode == 0, again.stderr
        same = verb("rejudge", tmp_path / "old", "--out", tmp_path / "old", "--judge-url", server.url,
                    "--judge-model", "b")  # fmt: skip
    assert json.loads((tmp_path / "old" / "panel.json").read_text())["pairs"][0]["n"] == 40
    assert sorted(path.name for path in (tmp_path / "old" / "panel").iterdir()) == ["a.parquet", "c.parquet"]
    found = json.loads((tmp_path / "new" / "migration.json").read_text())
    assert (found["old_judge"], found["new_judge"], found["n"]) == ("mean of a and c", "b", 40)
    rates = {row["name"]: row["new_win_rate"] for row in found["models"]}
    for name in ("model", "other"):
        assert rates[name] == pytest.approx(100 * np.mean([prefers("b", i, name) for i in range(20)]))
    assert pd.read_csv(tmp_path / "new" / "leaderboard.csv")["judge"].tolist() == ["b", "b"]
    assert same.returncode == 2 and "another folder" in same.stderr


# ---- a name that answers as another model ----


def named(model):
    def script(call):
        return {**verdict(call.body), "model": model}

    return script


def asked_of(script, tmp_path, n):
    with ScriptedJudge(script) as server:
        config = JudgeConfig(url=server.url, model="gpt", concurrency=2)
        frame = judge(rows(n, "model"), rows(n, "reference"), config, tmp_path / "s.sqlite", "t")
        return frame, len(server.calls)


def test_a_name_that_stands_for_another_model_now_asks_that_one_everything(tmp_path):
    first, calls = asked_of(named("gpt-2024"), tmp_path, 10)
    assert calls == 10 and set(first["judge_model"]) == {"gpt-2024"} and several_models(first) == ""
    mixed, calls = asked_of(named("gpt-2025"), tmp_path, 15)
    assert calls == 5 and mixed["judge_model"].value_counts().to_dict() == {"gpt-2024": 10, "gpt-2025": 5}
    assert "gpt-2024 (10), gpt-2025 (5)" in several_models(mixed)
    whole, calls = asked_of(named("gpt-2025"), tmp_path, 15)
    assert calls == 10 and set(whole["judge_model"]) == {"gpt-2025"} and whole["cached"].sum() == 5
    _, calls = asked_of(named("gpt-2025"), tmp_path, 15)
    assert calls == 0


def test_an_endpoint_with_several_names_at_once_is_one_judge(tmp_path):
    def either(call):
        return named("a" if call.number % 2 else "b")(call)

    asked_of(named("a"), tmp_path, 4)
    frame, calls = asked_of(either, tmp_path, 12)
    assert calls == 8 and set(frame["judge_model"]) == {"a", "b"}
    _, calls = asked_of(either, tmp_path, 12)
    assert calls == 0  # nothing is paid for twice


def test_a_reply_that_names_no_model_is_of_the_same_judge(tmp_path):
    asked_of(named("a"), tmp_path, 4)
    _, calls = asked_of(lambda call: {**verdict(call.body), "model": None}, tmp_path, 8)
    assert calls == 4
    assert asked_of(named("a"), tmp_path, 8)[1] == 0


def test_a_judge_of_a_panel_that_answers_as_another_model_is_told(tmp_path):
    with ScriptedJudge(named("a-1")) as first, ScriptedJudge(named("c-1")) as other:
        config = JudgeConfig(url=first.url, model="a", panel=[{"model": "c", "url": other.url}])

        def asked(n):
            asking = Judge(config, tmp_path / "s.sqlite")
            return judge_task(asking, [Match("model", "reference", rows(n, "model"), rows(n, "reference"))], "t")

        whole = asked(10)
        assert answering_models(whole) == {"a": {"a-1": 10}, "c": {"c-1": 10}} and several_models(whole) == ""
        other.script = named("c-2")
        mixed = asked(15)
        assert answering_models(mixed) == {"a": {"a-1": 15}, "c": {"c-1": 10, "c-2": 5}}
        said = several_models(mixed)
        assert said.startswith("The judge's name c answers as several models: c-1 (10), c-2 (5).") and "a-1" not in said
        whole = asked(15)
        assert answering_models(whole) == {"a": {"a-1": 15}, "c": {"c-2": 15}}
        assert (len(first.calls), len(other.calls)) == (15, 25)


def test_a_model_may_have_any_name():
    frame = pd.DataFrame({"judge_model": ["{", "[1]", "{}", "null", None, '{"a": "x"}']})
    assert answering_models(frame) == {"": {"{": 1, "[1]": 1, "null": 1}, "a": {"x": 1}}

"""`otpo agreement`: labelled pairs in, a judge asked in both orders over HTTP, figures out."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from support.command import otpo, refused
from support.html_page import assert_sound
from support.servers import Reply, ScriptedJudge, completion
from typer.testing import CliRunner

from eval.board.leaderboard import leaderboard, write_leaderboard
from eval.board.report import build
from eval.judge.config import JudgeConfig
from eval.judge.protocols.templates import fenced_texts
from eval.labelled_pairs import load_pairs
from jobs.agreement import judge_agreement
from jobs.cli import app
from otpo.errors import UserError, WorkError
from otpo.files import read_rows
from pipeline.progress import silent


def certain(first_is_better: bool) -> dict:
    m = 0.999 if first_is_better else 0.001
    return completion("m" if first_is_better else "M", {"m": m, "M": 1 - m})


def shown(call) -> list[str]:
    """The instruction and the two outputs, in the order of the request."""
    return fenced_texts(call.body["messages"][-1]["content"])


def prefers(word: str):
    """A judge of the output that has the word; of the first one, where both or neither have it."""
    return lambda call: certain(word in shown(call)[1] or word not in shown(call)[2])


def pairs(n: int, **columns) -> list[dict]:
    """Output 1 is good in every second pair."""
    texts = [("a good one", "a bad one"), ("a bad one", "a good one")]
    return [
        {"instruction": f"Question {i}", "output_1": texts[i % 2][0], "output_2": texts[i % 2][1], "label": i % 2 + 1}
        | columns
        for i in range(n)
    ]


def written(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def ask(server, file: Path, out: Path, **settings):
    config = JudgeConfig(**{"url": server.url, "model": "test", "both_orders": True, "max_retries": 0, **settings})
    return judge_agreement([file], config, out, progress=silent)


def test_llmbar_natural_by_the_command(tmp_path, shared_data):
    """GPT-4's recorded verdicts, asked again over HTTP: what LLMBar published of them."""
    folder = shared_data / "llmbar" / "Natural"
    recorded = {}
    for row in read_rows(folder / "gpt4_vanilla_result.json"):
        for swapped in (False, True):
            texts = (row["output_2"], row["output_1"]) if swapped else (row["output_1"], row["output_2"])
            winner = row["results"][0][f"swap = {swapped}"]["winner"]
            recorded[row["input"], *texts] = (winner == "1") != swapped
    with ScriptedJudge(lambda call: certain(recorded.get(tuple(shown(call)), True))) as server:
        words = ["--judge-url", server.url, "--judge-model", "gpt-4", "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, ["agreement", str(folder / "dataset.json"), *words])
        assert done.exit_code == 0, done.output
        assert len({tuple(shown(call)) for call in server.calls} & set(recorded)) == 200
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())
    expected = {"n": 100, "accuracy_first_order": 0.95, "accuracy_second_order": 0.96, "accuracy": 0.955}
    expected |= {"both_correct": 0.93, "consistency": 0.95, "kappa_orders": 0.897708674304419}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert "categories" not in found and "human_agreement" not in found
    assert "95.5" in done.output and "0.90 (0.78 to 0.96)" in done.output
    # the endpoint here says each winner with .999, and 191 of 200 are people's
    assert found["calibration"]["temperature"] == pytest.approx(math.log(999) / math.log(191 / 9), rel=1e-4)
    assert "It is overconfident: 99.9% sure on average and right in 95.5%" in " ".join(done.output.split())


def test_nothing_is_asked_twice_and_failures_are_asked_again(tmp_path):
    refuses = True

    def script(call):
        if refuses and shown(call)[0] == "Question 3":
            return Reply({"error": {"message": "content filter"}}, 400)
        return prefers("good")(call)

    file = written(tmp_path / "own.json", pairs(12))
    with ScriptedJudge(script) as server:
        found = ask(server, file, tmp_path / "out", price_input=1.0)
        asked = len(server.calls)
        assert (found["n"], found["n_failed"], sum(found["errors"].values())) == (11, 1, 2)
        assert found["accuracy"] == found["kappa_orders"] == found["accuracy_if_missing_right"] == 1
        assert found["accuracy_if_missing_wrong"] == pytest.approx(11 / 12)
        refuses = False
        whole = ask(server, file, tmp_path / "out", price_input=1.0)
        assert len(server.calls) == asked + 2
        assert (whole["n"], whole["n_failed"]) == (12, 0)
        assert whole["judge_price_usd"] == pytest.approx(24 * 100 / 1e6)
        again = ask(server, file, tmp_path / "out", price_input=1.0)
        assert again == whole and len(server.calls) == asked + 2
    verdicts = pd.read_parquet(tmp_path / "out" / "agreement.parquet")
    assert len(verdicts) == 24 and set(verdicts["label"]) == {1, 2}
    named = (verdicts["preference"] > 1.5) + 1
    assert (named == verdicts["label"]).all()


def test_a_judge_of_places_is_half_right_and_never_consistent(tmp_path):
    with ScriptedJudge(lambda call: certain(True)) as server:
        found = ask(server, written(tmp_path / "own.json", pairs(20)), tmp_path / "out")
    assert (found["accuracy"], found["both_correct"], found["consistency"]) == (0.5, 0, 0)
    assert found["first_share"] == pytest.approx(0.999) and found["first_share_low"] > 0.5


def test_categories_ties_and_people(tmp_path):
    rows = [
        *pairs(2, category="ties", label=None, labels=[0, 0, "tie"]),
        *pairs(6, category="easy", labels=[1, 2, 1]),
        *pairs(4, category="hard", label=None, labels=[2, 2, 2]),
    ]
    for row in rows:
        row["instruction"] += "\ud83d " + row["category"]  # half a surrogate pair, which parquet cannot hold
    with ScriptedJudge(prefers("good")) as server:
        found = ask(server, written(tmp_path / "own.json", rows), tmp_path / "out")
        asked = {shown(call)[0] for call in server.calls}
    assert not [text for text in asked if text.endswith("ties")]  # no verdict on them is right or wrong
    assert (found["pairs"], found["ties"], found["n"]) == (12, 2, 10)
    easy, hard, ties = (found["categories"][name] for name in ("easy", "hard", "ties"))
    assert (easy["n"], easy["accuracy"], hard["accuracy"], ties["n"], ties["accuracy"]) == (6, 0.5, 0.5, 0, None)
    assert easy["human_agreement"] == pytest.approx(1 / 3) and hard["human_agreement"] == 1
    assert found["human_agreement"] == pytest.approx((6 / 3 + 4 + 2) / 12)


# ---- files ----


def test_files_are_read_as_they_are(tmp_path):
    llmbar = [{"input": "Q?", "output_1": "x", "output_2": "y", "label": 2}]
    pandalm = [
        {"idx": 0, "motivation_app": "Gmail", "cmp_key": "a_b", "instruction": "Do it.", "input": "This."}
        | {"response1": True, "response2": "", "annotator1": 1, "annotator2": 0, "annotator3": 1}
    ]
    pandalm.append({**pandalm[0], "instruction": " "})
    rewardbench = [
        {"prompt": f"Q{i}", "chosen": "yes", "rejected": "no", "subset": "math", "chosen_model": "a", "id": i}
        for i in range(40)
    ]
    files = [
        written(tmp_path / name / "dataset.json", rows)
        for name, rows in (("Natural", llmbar), ("PandaLM", pandalm), ("RewardBench", rewardbench))
    ]
    first, second, third, *others = load_pairs(files)
    assert (first.instruction, first.output_1, first.output_2, first.labels) == ("Q?", "x", "y", (2,))
    assert (first.category, second.category) == ("Natural", "PandaLM")
    assert (second.instruction, second.labels) == ("Do it.\n\nThis.", (1, 0, 1))
    assert (second.output_1, second.output_2, third.instruction) == ("True", "", "This.")
    assert {each.category for each in others} == {"math"} and len(others) == 40
    better = [(each.output_1, each.output_2)[each.labels[0] - 1] for each in others]
    assert set(better) == {"yes"}
    assert 10 < sum(each.labels == (1,) for each in others) < 30  # neither output is always the better one
    assert load_pairs(files) == [first, second, third, *others]


def test_labels_of_csv(tmp_path):
    (tmp_path / "own.csv").write_text('instruction,output_1,output_2,labels\nQ,x,y,"[1, 2, null]"\nR,x,y,"[""tie""]"\n')
    assert [each.labels for each in load_pairs([tmp_path / "own.csv"])] == [(1, 2), (0,)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": 3}, ["expected a label 1, 2, or 0 for a tie", "'3'"]),
        ({"label": None}, ["no label"]),
        ({"label": True}, ["'true'"]),
        ({"labels": "one"}, ["labels is no list"]),
        ({"output_2": None}, ["output_2 is no text"]),
        ({"output_2": ["x"]}, ["write a row for each pair"]),
        ({"instruction": " "}, ["no text under instruction"]),
    ],
)
def test_rows_that_are_no_labelled_pairs_are_counted_by_reason(tmp_path, row, words):
    file = written(tmp_path / "own.json", [*pairs(3), {**pairs(1)[0], **row}])
    with pytest.raises(UserError) as error:
        load_pairs([file])
    for word in ["1 of 4 rows", "row 3", "output_1, output_2", *words]:
        assert word in str(error.value)


def test_outputs_alone_are_told_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"1 of 1 rows are no labelled pairs .*no two outputs"):
        load_pairs([written(tmp_path / "m.json", [{"instruction": "q", "output": "x"}])])


# ---- refusals ----


def test_what_cannot_be_asked_is_refused_before_anything_is_paid(tmp_path):
    file = written(tmp_path / "own.json", pairs(2))
    ties = written(tmp_path / "ties.json", pairs(2, label=0))
    with ScriptedJudge() as server:
        words = ["--judge-url", server.url, "--judge-model", "test", "--out", "out", "--set", "judge.both_orders=false"]
        refused(otpo(tmp_path, "agreement", file, *words), "both orders", "--set judge.both_orders=false")
        for wrong, settings, said in [
            (tmp_path / "none.json", {}, r"none\.json"),
            (ties, {}, "every label is a tie"),
            (file, {"protocol": "arena"}, r"judge\.protocol: expected one of"),
        ]:
            with pytest.raises(UserError, match=said):
                ask(server, wrong, tmp_path / "out", **settings)
        assert not any("Question" in shown(call)[0] for call in server.calls)
    with pytest.raises(UserError, match=server.url.split("//")[1].split("/")[0]):
        ask(server, file, tmp_path / "out")
    assert not (tmp_path / "out" / "agreement.json").exists()


def test_without_any_verdict_the_command_fails_and_asks_again(tmp_path):
    answers = False
    file = written(tmp_path / "own.json", pairs(2))

    def script(call):
        return None if answers or "Question" not in shown(call)[0] else Reply({"error": {"message": "overloaded"}}, 400)

    with ScriptedJudge(script) as server:
        with pytest.raises(WorkError, match=r"Not one verdict came back .*overloaded"):
            ask(server, file, tmp_path / "out")
        answers = True
        assert ask(server, file, tmp_path / "out")["n"] == 2


# ---- the page ----


def test_a_board_says_how_far_its_judge_agrees_with_people(tmp_path):
    out = tmp_path / "people"
    outputs = {"one": [{"instruction": f"q{i}", "output": "x", "generator": "one"} for i in range(9)]}
    verdicts = pd.DataFrame(outputs["one"]).drop(columns="output")
    verdicts = verdicts.assign(reference="base", task="t", index=range(9), preference=1.7)
    reference = [{**row, "generator": "base"} for row in outputs["one"]]
    for judge in ("test", "another"):
        board = leaderboard(verdicts, outputs, reference, judge=judge, protocol="preference")
        write_leaderboard(board, tmp_path / f"of-{judge}" / "leaderboard.csv")
    rows = [*pairs(6, category="<b>easy"), *pairs(4, category="hard", label=2)]
    with ScriptedJudge(prefers("good")) as server:
        ask(server, written(tmp_path / "own.json", rows), out)
    page = assert_sound(build([tmp_path / "of-test", out], tmp_path / "page"))
    assert "Its judge agrees with people 80.0%" in page.words() and "<b>easy" in page.words()
    assert "It names the output that people prefer in 80.0% (" in page.words()
    other = assert_sound(build([tmp_path / "of-another", out], tmp_path / "page"))
    assert "Its judge agrees" not in other.words() and "It names the output" in other.words()
    alone = assert_sound(build([out], tmp_path / "page"))
    assert "It names the output" in alone.words()
    (tmp_path / "of-test" / "agreement.json").write_text('{"judge": "test"}')
    damaged = assert_sound(build([tmp_path / "of-test"], tmp_path / "page"))
    assert "is not what otpo agreement writes" in damaged.words().replace("`", "")

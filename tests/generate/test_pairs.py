"""On-policy pairs: which answers meet, what is counted, and the way through a real engine and a judge over HTTP."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.servers import ScriptedJudge, completion, share

from eval.judge.config import JudgeConfig
from eval.judge.protocols.templates import fenced_texts
from eval.tasks import Prompt, Task
from otpo.data.formats.columns import preference
from otpo.errors import UserError, WorkError
from pipeline.generate.engine import Sampling
from pipeline.generate.pairs import make_pairs, sample_pairs


def prompt(number: int) -> Prompt:
    return Prompt(id=str(number), instruction=f"Question {number}?", dataset="test")


def answers(*texts: str, cut: tuple[int, ...] = ()) -> list[dict]:
    return [{"output": text, "truncated": i in cut} for i, text in enumerate(texts)]


def test_best_meets_worst_then_second_best_meets_second_worst():
    given_answers = answers("five", "one", "three", "four", "two")
    rows, report = make_pairs([prompt(0)], [given_answers], [[5.0, 1.0, 3.0, 4.0, 2.0]], per_prompt=9)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [
        ("five", "one"),
        ("four", "two"),
    ]
    assert [(r["score_chosen"], r["score_rejected"]) for r in rows] == [(5.0, 1.0), (4.0, 2.0)]
    assert report["pairs"] == 2 and report["chosen_longer"] == 1.0 and report["without_pair"] == {}
    assert len(make_pairs([prompt(0)], [given_answers], [[5.0, 1.0, 3.0, 4.0, 2.0]], per_prompt=1)[0]) == 1


@pytest.mark.parametrize(
    ("given_answers", "scores", "reason"),
    [
        (answers("same", "same", "same"), [3.0, 3.0, 3.0], "fewer than two distinct outputs"),
        (answers("", "one"), [None, 3.0], "fewer than two distinct outputs"),
        (answers("one", "two"), [3.0, None], "fewer than two rated outputs"),
        (answers("one", "two"), [3.0, 3.0], "equal scores"),
        (answers("one", "two", cut=(0,)), [4.0, 3.0], "no complete output above the worst"),
    ],
)
def test_a_prompt_without_a_pair_is_counted_with_its_reason(given_answers, scores, reason):
    rows, report = make_pairs([prompt(0)], [given_answers], [scores])
    assert rows == []
    assert report["without_pair"] == {reason: 1} and report["prompts"] == 1


def test_an_answer_cut_at_its_limit_is_rejected_but_never_chosen():
    rows, report = make_pairs([prompt(0)], [answers("cut", "good", "bad", cut=(0,))], [[9.0, 5.0, 1.0]], per_prompt=2)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [("good", "bad")]
    assert report["truncated"] == 1
    rows, _ = make_pairs([prompt(0)], [answers("cut", "good", cut=(0,))], [[1.0, 5.0]])
    assert rows[0]["rejected"][0]["content"] == "cut"


def test_counts_of_answers_add_up():
    given_answers = [answers("a", "a", "b"), [{"output": "", "error": "too long", "truncated": False}] * 3]
    _, report = make_pairs([prompt(0), prompt(1)], given_answers, [[2.0, 2.0, None], [None] * 3])
    assert {k: report[k] for k in ("answers", "failed", "empty", "distinct", "unrated", "pairs")} == {
        "answers": 6,
        "failed": 3,
        "empty": 0,
        "distinct": 2,
        "unrated": 1,
        "pairs": 0,
    }
    assert sum(report["without_pair"].values()) == 2


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from([None, 1.0, 2.0, 3.0]), st.booleans()), max_size=8),
    st.integers(1, 4),
)
def test_pairs_are_strictly_ordered_disjoint_and_within_the_limit(items, per_prompt):
    given_answers = [{"output": text, "truncated": cut} for text, _, cut in items]
    rows, report = make_pairs([prompt(0)], [given_answers], [[score for _, score, _ in items]], per_prompt)
    texts = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) and len(rows) <= per_prompt
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    first = {text: (score, cut) for text, score, cut in reversed(items)}
    assert all(not first[row["chosen"][0]["content"]][1] for row in rows)
    assert report["pairs"] + sum(report["without_pair"].values()) >= 1


def test_rows_are_what_training_reads_and_what_generation_saw():
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    asked = Prompt(id="0", instruction="user: Hello?", dataset="test", messages=conversation)
    pair = [answers("Hi.", "Hello, hello, hello.")]
    chat = make_pairs([asked], pair, [[2.0, 1.0]])[0][0]
    assert preference(chat).prompt == conversation
    assert preference(chat).completions[0] == [{"role": "assistant", "content": "Hi."}]
    literal = make_pairs([prompt(3)], pair, [[2.0, 1.0]], template="literal")[0][0]
    assert preference(literal).prompt == "Question 3?"
    assert preference(literal).completions == ("Hi.", "Hello, hello, hello.")


def rating(call) -> dict:
    """A judge whose rating is a number from 1 to 10 that depends on the answer alone."""
    *_, answer = fenced_texts(call.body["messages"][-1]["content"])
    text = str(1 + int(9 * share(answer)))
    return completion(text, {text: 1.0})


def test_pairs_of_a_real_model_rated_over_http(vllm_pool, sharp_models: list[Path], tmp_path: Path):
    task = Task("test", [prompt(i) for i in range(6)], "here", "instruction")
    sampling = Sampling(temperature=1.0, max_tokens=12, n=4, seed=1)
    out = tmp_path / "pairs.jsonl"
    steps = []
    with ScriptedJudge(rating) as judge:
        scorer = JudgeConfig(url=judge.url, model="test", protocol="rating")
        report = sample_pairs(
            sharp_models[0],
            task,
            sampling,
            vllm_pool,
            scorer,
            out,
            per_prompt=2,
            progress=lambda *step: steps.append(step),
        )
        asked = len(judge.calls)
        assert asked == report["distinct"]
        again = sample_pairs(sharp_models[0], task, sampling, vllm_pool, scorer, out, per_prompt=2)
        assert len(judge.calls) == asked, "a second call asks the judge nothing"
    assert again == report
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == report["pairs"] > 0
    assert report["answers"] == 24 and json.loads((tmp_path / "pairs.report.json").read_text()) == report
    given_answers = json.loads((tmp_path / "pairs.samples" / "model_outputs.json").read_text())
    texts = {(a["id"], a["output"]) for a in given_answers}
    for row in rows:
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            assert (row["id"], text) in texts
            assert row[f"score_{side}"] == 1 + int(9 * share(text))
    assert {what for what, *_ in steps} == {"sample outputs", "rate outputs"}


def test_no_pair_at_all_is_an_error_that_says_why(vllm_pool, sharp_models: list[Path], tmp_path: Path):
    task = Task("test", [prompt(0)], "here", "instruction")
    with ScriptedJudge(lambda call: completion("5", {"5": 1.0})) as judge:
        scorer = JudgeConfig(url=judge.url, model="test", protocol="rating")
        sampling = Sampling(temperature=1.0, max_tokens=12, n=3)
        with pytest.raises(WorkError, match="equal scores"):
            sample_pairs(sharp_models[0], task, sampling, vllm_pool, scorer, tmp_path / "pairs.jsonl")
        with pytest.raises(UserError, match="at least 2"):
            sample_pairs(sharp_models[0], task, Sampling(), vllm_pool, scorer, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()

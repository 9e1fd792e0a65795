"""The judge over real HTTP: what is asked, what is kept, what comes out."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.servers import DROP, Reply, ScriptedJudge, completion, share, verdict

from eval.judge.client import parameters
from eval.judge.config import JudgeConfig
from eval.judge.protocols.registry import PROTOCOLS
from eval.judge.protocols.templates import fenced_texts
from eval.judge.ratings import rate
from eval.judge.store import open_store, request_key
from eval.judge.table import COLUMNS, ledger, write_verdicts
from eval.judge.verdicts import judge, model_first
from eval.stats.win_rate import by_prompt
from otpo.errors import UserError, WorkError

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO.parent / "shared" / "tools" / "replay_judge.py"


def outputs(n, generator, start=0):
    return [
        {"instruction": f"Question {i}", "output": f"{generator} says {i}", "generator": generator}
        for i in range(start, n)
    ]


def ask(server, tmp_path, n=20, **settings):
    config = JudgeConfig(url=server.url, model="test", **{"concurrency": 8, "timeout": 10, **settings})
    return judge(outputs(n, "model"), outputs(n, "reference"), config, tmp_path / "store.sqlite", "task")


def truth(i):
    """P(model wins) of the scripted judge, which has no order bias."""
    model, reference = share(f"model says {i}"), share(f"reference says {i}")
    return model / (model + reference)


def test_verdicts_have_the_agreed_columns_and_values(tmp_path):
    with ScriptedJudge() as server:
        frame = ask(server, tmp_path, price_input=1.0, price_output=10.0)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["index"].tolist() == list(range(20))
    assert frame["preference"].tolist() == pytest.approx([1 + truth(i) for i in range(20)])
    assert frame["order"].tolist() == [
        "model_first" if model_first(f"Question {i}") else "reference_first" for i in range(20)
    ]
    assert set(frame["order"]) == {"model_first", "reference_first"}
    assert frame["error"].isna().all() and not frame["cached"].any()
    assert (frame["attempts"] == 1).all() and frame["price_usd"].tolist() == pytest.approx([(100 * 1 + 10) / 1e6] * 20)
    assert set(frame["task"] + frame["generator"] + frame["reference"]) == {"taskmodelreference"}
    assert frame["instruction_hash"].nunique() == frame["output_hash"].nunique() == 20


def test_the_request_is_alpaca_evals_and_shows_the_order_it_says(tmp_path):
    with ScriptedJudge() as server:
        frame = ask(server, tmp_path, n=6, extra_body={"top_k": 1})
    for call in server.calls:
        body = dict(call.body)
        instruction, first, _ = fenced_texts(body.pop("messages")[-1]["content"])
        row = frame[frame["instruction"] == instruction].iloc[0]
        assert first.startswith("model" if row["order"] == "model_first" else "reference")
        assert body == {
            "model": "test",
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 5,
            "top_k": 1,
        }


def test_a_field_that_an_endpoint_does_not_know_can_be_renamed(tmp_path):
    with ScriptedJudge() as server:
        ask(server, tmp_path, n=1, extra_body={"max_tokens": None, "max_completion_tokens": 1})
        assert "max_tokens" not in server.calls[0].body and server.calls[0].body["max_completion_tokens"] == 1


def test_a_second_run_asks_nothing_even_where_the_judge_has_moved(tmp_path):
    with ScriptedJudge() as server:
        first = ask(server, tmp_path)
    with ScriptedJudge() as moved:
        second = ask(moved, tmp_path)
        assert moved.calls == []
        changed = ask(moved, tmp_path, n=4, temperature=0.5)
        assert len(moved.calls) == 4 and not changed["cached"].any()
    assert second["cached"].all() and (second["attempts"] == 0).all()
    same = [column for column in COLUMNS if column not in ("cached", "attempts")]
    pd.testing.assert_frame_equal(first[same], second[same])


def test_identical_answers_are_a_draw_without_a_call(tmp_path):
    model, reference = outputs(4, "model"), outputs(4, "reference")
    model[2]["output"] = reference[2]["output"]
    seen = []
    with ScriptedJudge() as server:
        config = JudgeConfig(url=server.url, model="test", both_orders=True)
        frame = judge(model, reference, config, tmp_path / "s.sqlite", "t", lambda *state: seen.append(state))
        assert len(server.calls) == 6
    assert frame.loc[frame["index"] == 2, "preference"].tolist() == [1.5, 1.5]
    assert ledger(frame)["identical"] == 2
    assert seen[-1] == (8, 8, 0)


def test_both_orders_keep_their_rows_and_a_pair_is_their_mean(tmp_path):
    biased = completion("m", {"m": 0.8, "M": 0.2})  # always four to one for what is shown first
    with ScriptedJudge(lambda call: biased) as server:
        frame = ask(server, tmp_path, n=3, both_orders=True)
    assert frame["order"].tolist() == ["reference_first", "model_first"] * 3
    assert frame["preference"].tolist() == pytest.approx([1.2, 1.8] * 3)
    prompts = by_prompt(frame)
    assert prompts["preference"].tolist() == pytest.approx([1.5] * 3)
    assert frame.loc[frame["order"] == "reference_first", "preference"].tolist() == pytest.approx([1.2] * 3)
    frame.loc[1, "preference"] = np.nan
    assert by_prompt(frame)["preference"].isna().tolist() == [True, False, False]
    assert by_prompt(frame[frame["order"] == "model_first"])["flipped"].isna().all()


def test_the_same_answers_twice_are_asked_and_paid_once(tmp_path):
    model, reference = outputs(3, "model"), outputs(3, "reference")
    with ScriptedJudge() as server:
        config = JudgeConfig(url=server.url, model="test", price_input=1.0)
        frame = judge(model + model[:1], reference + reference[:1], config, tmp_path / "s.sqlite", "t")
        assert len(server.calls) == 3
    assert frame["preference"].iloc[3] == frame["preference"].iloc[0]
    assert ledger(frame)["calls"] == 3 and ledger(frame)["spent_usd"] == pytest.approx(3 * 100 / 1e6)


def test_progress_is_told_row_by_row(tmp_path):
    seen = []
    with ScriptedJudge(lambda call: completion("x", {"x": 1.0}) if call.number % 2 else None) as server:
        config = JudgeConfig(url=server.url, model="test", concurrency=1)
        judge(outputs(4, "model"), outputs(4, "reference"), config, tmp_path / "s", "t", lambda *s: seen.append(s))
    assert seen == [(1, 4, 1), (2, 4, 1), (3, 4, 2), (4, 4, 2)]


def test_concurrency_is_reached_and_never_exceeded(tmp_path):
    with ScriptedJudge(lambda call: Reply(verdict(call.body), delay=0.05)) as server:
        ask(server, tmp_path, n=40, concurrency=5)
        assert server.most_at_once == 5


def test_requests_per_minute_are_spaced(tmp_path):
    with ScriptedJudge() as server:
        ask(server, tmp_path, n=5, max_requests_per_minute=600)
        times = [call.at for call in server.calls]
    assert times[-1] - times[0] >= 0.38


def test_a_budget_stops_before_it_is_exceeded_and_says_so(tmp_path):
    # 100 prompt tokens a call at 100 USD per million: one cent each.
    with ScriptedJudge() as server:
        frame = ask(server, tmp_path, n=20, price_input=100.0, budget_usd=0.105)
        spent = ledger(frame)
        assert spent["spent_usd"] <= 0.105
        assert 6 <= len(server.calls) <= 10
        assert spent["errors"] == {"budget": 20 - len(server.calls)}
        assert frame.loc[frame["error"].notna(), "preference"].isna().all()
        more = ask(server, tmp_path, n=20, price_input=100.0, budget_usd=1.0)
        assert len(server.calls) == 20
    assert ledger(more)["failed"] == 0
    assert ledger(more)["cached_usd"] == pytest.approx(spent["spent_usd"])
    assert ledger(more)["spent_usd"] == pytest.approx(0.2 - spent["spent_usd"])


def test_a_budget_holds_where_replies_report_no_tokens(tmp_path):
    def script(call):
        return {**verdict(call.body), "usage": None}

    with ScriptedJudge(script) as server:
        frame = ask(server, tmp_path, n=20, price_input=100.0, budget_usd=0.5, concurrency=2)
        assert 0 < len(server.calls) < 20
    assert ledger(frame)["errors"] == {"budget": 20 - len(server.calls)}


def test_a_budget_without_prices_is_refused(tmp_path):
    with ScriptedJudge() as server, pytest.raises(UserError, match=r"budget_usd.*price"):
        ask(server, tmp_path, budget_usd=1.0)


def test_a_written_table_reads_back_and_replaces_the_old_one(tmp_path):
    with ScriptedJudge(lambda call: completion("x", {"x": 1.0}) if call.number == 1 else None) as server:
        frame = ask(server, tmp_path, n=3)
    path = tmp_path / "deep" / "verdicts.parquet"
    for _ in range(2):
        write_verdicts(frame, path)
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame)
    assert [p.name for p in path.parent.iterdir()] == ["verdicts.parquet"]


def test_ratings_come_in_order_and_are_stored(tmp_path):
    def script(call):
        number = {"good": "9", "bad": "2"}.get(fenced_texts(call.body["messages"][-1]["content"])[1])
        return completion(number, {number: 1.0}) if number else completion("no idea", {"no": 1.0})

    items = [{"instruction": "q", "output": text} for text in ("good", "bad", "what?", "good")]
    with ScriptedJudge(script) as server:
        config = JudgeConfig(url=server.url, model="test")
        assert rate(items, config, tmp_path / "s.sqlite") == pytest.approx([9.0, 2.0, None, 9.0])
        assert len(server.calls) == 3
        assert rate(items, config, tmp_path / "s.sqlite") == pytest.approx([9.0, 2.0, None, 9.0])
        assert len(server.calls) == 4  # only the failure is asked again
        with pytest.raises(WorkError, match="none of 1 outputs: 1 unparsable"):
            rate(items[2:3], config, tmp_path / "s.sqlite")


def test_a_store_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "store.sqlite").write_text("not a database, certainly not one of ours")
    with ScriptedJudge() as server, pytest.raises(UserError, match=r"store\.sqlite"):
        ask(server, tmp_path)


SCRIPT = """
import sys
from eval.judge.config import JudgeConfig
from eval.judge.verdicts import judge
url, store, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = lambda g: [{"instruction": f"Question {i}", "output": f"{g} says {i}", "generator": g} for i in range(n)]
judge(rows("model"), rows("reference"), JudgeConfig(url=url, model="test", concurrency=4, timeout=10), store, "task")
"""


def start_judging(server, store, n, until):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, str(store), str(n)], cwd=REPO, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while server.answered < until and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None and server.answered >= until
    return process


def key_of(call):
    return request_key("test", call.body["messages"], parameters(PROTOCOLS["preference"], JudgeConfig()))


def stored_keys(store):
    with open_store(store) as opened:
        return {row[0] for row in opened._connection.execute("SELECT key FROM responses")}


def test_a_killed_run_loses_only_the_calls_in_flight(tmp_path):
    with ScriptedJudge(lambda call: Reply(verdict(call.body), delay=0.03)) as server:
        process = start_judging(server, tmp_path / "store.sqlite", 60, until=20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        before, kept = len(server.calls), stored_keys(tmp_path / "store.sqlite")
        assert before - 4 <= len(kept) + 4 and len(kept) >= 16
        frame = ask(server, tmp_path, n=60)
        again = {key_of(call) for call in server.calls[before:]}
        assert not again & kept
        assert len(again) == len(server.calls) - before == 60 - len(kept)
    assert frame["preference"].tolist() == pytest.approx([1 + truth(i) for i in range(60)])


def test_ctrl_c_finishes_the_calls_in_flight_and_keeps_them(tmp_path):
    with ScriptedJudge(lambda call: Reply(verdict(call.body), delay=0.1)) as server:
        process = start_judging(server, tmp_path / "store.sqlite", 60, until=8)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) != 0
        before = len(server.calls)
        assert before < 30
        assert len(stored_keys(tmp_path / "store.sqlite")) == before == server.answered
        frame = ask(server, tmp_path, n=60)
        assert len(server.calls) == 60
    assert frame["cached"].sum() == before


def test_the_store_is_readable_while_it_is_written(tmp_path):
    def script(call):
        if call.number == 5:
            rows = sqlite3.connect(tmp_path / "store.sqlite").execute("SELECT count(*) FROM responses").fetchone()[0]
            assert rows == 4
        return None

    with ScriptedJudge(script) as server:
        frame = ask(server, tmp_path, n=6, concurrency=1, max_retries=0)
    assert frame["error"].isna().all()


def test_the_key_is_sent_and_stays_out_of_everything(tmp_path, monkeypatch, caplog):
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("MY_JUDGE_KEY", secret)
    caplog.set_level("DEBUG")

    def script(call):
        if call.number == 3:
            return Reply({"error": {"message": f"you sent {call.authorization}"}}, status=400)
        if call.number > 5:
            return Reply({"error": {"message": f"Incorrect API key: {call.authorization}"}}, status=401)
        return verdict(call.body) | {"echo": call.authorization}

    with ScriptedJudge(script) as server:
        with pytest.raises(WorkError, match="MY_JUDGE_KEY") as caught:
            ask(server, tmp_path, concurrency=1, api_key_env="MY_JUDGE_KEY")
        assert {call.authorization for call in server.calls} == {f"Bearer {secret}"}
    with ScriptedJudge() as server:
        frame = ask(server, tmp_path, api_key_env="MY_JUDGE_KEY")
        assert frame["cached"].sum() == 4
    write_verdicts(frame, tmp_path / "verdicts.parquet")
    assert secret not in str(caught.value) and secret not in caplog.text and secret not in frame.to_csv()
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes(), path


def test_no_key_is_needed_on_loopback_and_no_proxy_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with ScriptedJudge() as server:
        assert ask(server, tmp_path, n=2, max_retries=0)["error"].isna().all()
    assert "OPENAI_API_KEY" not in os.environ


def test_a_key_that_is_a_sign_is_left_in_the_reply(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "-")
    with ScriptedJudge() as server:
        assert ask(server, tmp_path, n=2, max_retries=0)["error"].isna().all()


def test_a_dropped_connection_is_no_timeout(tmp_path):
    with ScriptedJudge(lambda call: Reply(DROP)) as server:
        assert set(ask(server, tmp_path, n=3, max_retries=0)["error"]) == {"connection"}

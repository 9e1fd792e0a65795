"""Batch files in OpenAI's format, through a batch service made of a real judge, and the price before the first call."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.servers import ScriptedJudge, replay, replay_stats, serve_batch, write_lines

import eval.judge.offline.batch_files as batch_files
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import Failure
from eval.judge.offline.batch_files import BatchReplies, BatchWriter
from eval.judge.offline.estimate import Estimate
from eval.judge.verdicts import judge
from eval.outputs.reading import load_outputs
from otpo.errors import UserError
from otpo.files import read_rows

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO.parent / "shared" / "tools" / "replay_judge.py"


def rows(n, generator):
    return [
        {"instruction": f"Question {i}", "output": f"{generator} says {i}", "generator": generator} for i in range(n)
    ]


def asked(config, tmp_path, answer, n=20):
    return judge(rows(n, "model"), rows(n, "reference"), config, tmp_path / "batch.sqlite", "task", answer=answer)


@pytest.fixture
def config():
    return JudgeConfig(model="test", price_input=1.0, price_output=10.0)


def test_a_batch_gives_the_verdicts_of_live_judging(tmp_path, config):
    with BatchWriter(tmp_path / "b.jsonl") as writer:
        written = asked(config, tmp_path, writer)
    assert writer.requests == 20 and writer.files == [tmp_path / "b.jsonl"]
    assert set(written["error"]) == {"not_asked"} and written["preference"].isna().all()
    ids = [json.loads(line)["custom_id"] for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert len(set(ids)) == 20 and all(len(each) <= 64 for each in ids)
    with ScriptedJudge() as server:
        live_config = config.model_copy(update={"url": server.url})
        live = judge(rows(20, "model"), rows(20, "reference"), live_config, tmp_path / "live.sqlite", "task")
        replies = BatchReplies([write_lines(tmp_path / "out.jsonl", serve_batch(tmp_path / "b.jsonl", server.url))])
        calls = len(server.calls)
        found = asked(config, tmp_path, replies)
        again = asked(live_config, tmp_path, None)  # nothing is left to ask
        assert len(server.calls) == calls
    same = ["preference", "order", "key", "read", "prompt_tokens", "completion_tokens", "price_usd", "error"]
    pd.testing.assert_frame_equal(found[same], live[same])
    pd.testing.assert_frame_equal(again[same], live[same])
    assert replies.counts == {"lines": 20, "replies": 20, "used": 20} and replies.unknown == 0
    assert again["cached"].all()


def test_what_a_batch_lacks_is_counted_and_can_be_written_or_asked_again(tmp_path, config):
    with BatchWriter(tmp_path / "b.jsonl") as writer:
        asked(config, tmp_path, writer)
    with ScriptedJudge() as server:
        lines = serve_batch(tmp_path / "b.jsonl", server.url)
    failed = [
        {"response": {"status_code": 429, "body": {"error": {"message": "Rate limit reached"}}}, "error": None},
        {"response": {"status_code": 400, "body": {"error": {"message": "flagged by content policy"}}}},
        {"response": None, "error": {"code": "batch_expired", "message": "This request could not be executed in time"}},
    ]
    for line, change in zip(lines, failed, strict=False):
        line |= change
    lines[3]["response"]["body"]["choices"][0] |= {"message": {"content": "I cannot say"}, "logprobs": None}
    lines[4]["custom_id"] = "of another board"
    parts = [json.dumps(lines[0])[:40] + "\n", "\n", '{"custom_id": 7}\n', "[]\n", *lines[:5], *lines[6:]]
    replies = BatchReplies([write_lines(tmp_path / "out.jsonl", parts)])
    frame = asked(config, tmp_path, replies)
    counts = frame["error"].value_counts().to_dict()
    assert counts == {"rate_limited": 1, "refused": 1, "batch_expired": 1, "no_logprobs": 1, "not_in_batch": 2}
    assert frame["preference"].notna().sum() == 14
    assert replies.counts["broken"] == 2 and replies.counts["failed"] == 4 and replies.counts["missing"] == 2
    assert replies.unknown == 1
    with BatchWriter(tmp_path / "rest.jsonl") as rest:
        asked(config, tmp_path, rest)
    assert rest.requests == 6
    with ScriptedJudge() as server:
        whole = asked(config.model_copy(update={"url": server.url}), tmp_path, None)
        assert len(server.calls) == 6 and whole["error"].isna().all()


def test_a_later_failure_does_not_undo_a_reply(tmp_path):
    body = {"choices": [{"message": {"content": "m"}}]}
    good = {"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}
    bad = {"custom_id": "a", "response": None, "error": {"code": "batch_cancelled", "message": "stopped"}}
    for order in ([good, bad], [bad, good]):
        replies = BatchReplies([write_lines(tmp_path / "out.jsonl", order)])
        assert json.loads(replies("a", {})) == body
    only = BatchReplies([write_lines(tmp_path / "out.jsonl", [bad])])("a", {})
    assert isinstance(only, Failure) and only.kind == "batch_cancelled" and "stopped" in only.detail


def test_a_file_that_is_full_goes_on_in_the_next(tmp_path, config, monkeypatch):
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 8)
    with BatchWriter(tmp_path / "b.jsonl") as writer:
        asked(config, tmp_path, writer)
    assert [path.name for path in writer.files] == ["b.jsonl", "b-2.jsonl", "b-3.jsonl"]
    assert [len(path.read_text().splitlines()) for path in writer.files] == [8, 8, 4]
    with pytest.raises(RuntimeError), BatchWriter(tmp_path / "half.jsonl") as writer:
        writer("key", {})
        raise RuntimeError
    assert not list(tmp_path.glob("*half*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"custom_id": "a", "method": "POST", "body": {}}\n', "these are the requests of a batch"),
        ("no JSON\n", "expected lines of a batch's output"),
        ("", "expected lines of a batch's output"),
    ],
)
def test_a_file_that_is_no_output_of_a_batch_is_refused(tmp_path, text, message):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        BatchReplies([tmp_path / "out.jsonl"])
    with pytest.raises(UserError, match="No such file"):
        BatchReplies([tmp_path / "gone.jsonl"])


def test_the_price_is_told_from_what_is_not_known_yet(tmp_path, config):
    with ScriptedJudge() as server:
        judge(rows(5, "model"), rows(5, "reference"), config.model_copy(update={"url": server.url}),
              tmp_path / "batch.sqlite", "task")  # fmt: skip
        shown = [message for message in server.calls[0].body["messages"]]
    found = Estimate(config)
    asked(config, tmp_path, found)
    size = sum(len(message["content"]) + 16 for message in shown)
    assert found.calls == 15 and found.most_reply_tokens == 15
    assert found.prompt_tokens == pytest.approx(15 * size / 4, rel=0.01)
    assert found.usd == pytest.approx(found.prompt_tokens / 1e6)
    assert found.most_usd == pytest.approx(2 * found.usd + 15 * 10 / 1e6, rel=1e-3)
    assert "15 calls" in str(found) and "USD" in str(found)


def test_tokens_per_minute_are_kept_and_what_a_reply_did_not_need_is_given_back(tmp_path):
    def times(limit):
        with ScriptedJudge() as server:
            config = JudgeConfig(url=server.url, model="test", max_tokens_per_minute=limit, max_tokens=20_000)
            judge(rows(4, "model"), rows(4, "reference"), config.model_copy(update={"concurrency": 1}),
                  tmp_path / f"{limit}.sqlite", "t")  # fmt: skip
            return np.diff([call.at for call in server.calls])

    # A call books 20,000 tokens and more, and its reply says that it was 101: 0.3 s at 20,000 tokens a minute. A busy
    # server may see the first call late.
    assert times(20_200).sum() > 2 * 0.3 and (times(20_200) < 20).all()
    assert times(10**9).max() < 5


def verb(*words):
    return subprocess.run([sys.executable, "-m", "jobs.cli", "judge", *map(str, words)], capture_output=True, text=True)


def test_the_verb_writes_reads_and_tells_the_price(tmp_path):
    for name in ("model", "reference"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows(12, name)))
    out = tmp_path / "board"
    common = (
        tmp_path / "model.json",
        "--reference",
        tmp_path / "reference.json",
        "--out",
        out,
        "--judge-model",
        "test",
    )
    dry = verb(*common, "--dry-run", "--price-input", "2")
    assert dry.returncode == 0 and "12 calls" in dry.stdout and "USD" in dry.stdout, dry.stderr
    done = verb(*common, "--batch-write", tmp_path / "b.jsonl")
    assert done.returncode == 0 and "12 requests" in done.stdout, done.stderr
    assert not (out / "leaderboard.csv").exists()
    with ScriptedJudge() as server:
        write_lines(tmp_path / "out.jsonl", serve_batch(tmp_path / "b.jsonl", server.url)[1:])
    done = verb(*common, "--batch-read", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "11 replies used" in done.stderr and "1 questions are in no line" in done.stderr
    assert pd.read_csv(out / "leaderboard.csv")["n_total"].tolist() == [11]
    both = verb(*common, "--batch-read", tmp_path / "out.jsonl", "--dry-run")
    assert both.returncode == 2 and "--batch-read and --dry-run: keep one" in both.stderr


def test_recorded_verdicts_come_out_of_a_batch(shared_data, tmp_path):
    folder = shared_data / "alpaca_eval" / "alpaca-7b"
    recorded = pd.DataFrame(read_rows(folder / "annotations.json.gz"))
    model = load_outputs(folder / "model_outputs.json.gz")
    reference = load_outputs(folder.parent / "reference_gpt4_1106_preview.json.gz")
    config = JudgeConfig(model="any")
    with BatchWriter(tmp_path / "b.jsonl") as writer:
        judge(model, reference, config, tmp_path / "s.sqlite", "alpaca_eval", answer=writer)
    with replay(TOOL, folder / "annotations.json.gz") as url:
        lines = serve_batch(tmp_path / "b.jsonl", url)
        assert replay_stats(url)["calls"] == 802
    replies = BatchReplies([write_lines(tmp_path / "out.jsonl", lines)])
    frame = judge(model, reference, config, tmp_path / "s.sqlite", "alpaca_eval", answer=replies)
    assert np.abs(frame["preference"] - recorded["preference"]).max() < 1e-9

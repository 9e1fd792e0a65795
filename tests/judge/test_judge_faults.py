"""What goes wrong between the judge and us: typed, retried where it helps, reported, never stored."""

import json
import time

import pytest
from support.servers import DROP, Reply, ScriptedJudge, completion, verdict
from test_judge import ask, key_of, stored_keys

import eval.judge.client
from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import classify_status, retry_after
from eval.judge.store import StoredReply, open_store
from eval.judge.table import ledger
from otpo.errors import UserError, WorkError

MODEL_404 = Reply({"error": {"message": "The model `gpt-x` does not exist", "code": "model_not_found"}}, status=404)
UNMATCHED_404 = Reply({"error": {"message": "no recorded pair in this request", "type": "not_found"}}, status=404)
NO_KEY_401 = Reply({"error": {"message": "Incorrect API key provided"}}, status=401)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(eval.judge.client, "BACKOFF_SECONDS", 0.01)


PASSING = {
    "rate_limited": Reply({"error": {"message": "slow down"}}, status=429),
    "server_error": Reply({"error": {"message": "oops"}}, status=500),
    "connection": Reply(DROP),
    "malformed": Reply(b"<html>not json</html>"),
    "no_logprobs": Reply(completion("m", None)),
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_retried_until_it_does(tmp_path, kind):
    with ScriptedJudge(lambda call: PASSING[kind] if call.attempt <= 2 else None) as server:
        frame = ask(server, tmp_path, n=4, max_retries=2)
    assert frame["error"].isna().all() and (frame["attempts"] == 3).all()
    assert len(server.calls) == 12


@pytest.mark.parametrize("kind", PASSING)
def test_what_does_not_pass_is_a_row_and_is_asked_again_next_time(tmp_path, kind):
    def script(call):
        return PASSING[kind] if "Question 1\n" in call.body["messages"][-1]["content"] else None

    with ScriptedJudge(script) as server:
        frame = ask(server, tmp_path, n=4, max_retries=3)
        assert len(server.calls) == 3 + 4
        assert frame["error"].fillna("").tolist() == ["", kind, "", ""]
        assert frame["preference"].isna().tolist() == [False, True, False, False]
        assert frame["attempts"].tolist() == [1, 4, 1, 1]
        assert ledger(frame)["errors"] == {kind: 1}
        assert len(stored_keys(tmp_path / "store.sqlite")) == 3
        server.script = lambda call: None
        assert ask(server, tmp_path, n=4)["cached"].tolist() == [True, False, True, True]
        assert len(server.calls) == 8


def test_a_slow_answer_is_a_timeout(tmp_path):
    with ScriptedJudge(lambda call: Reply(verdict(call.body), delay=0.0 if call.attempt > 1 else 1.0)) as server:
        started = time.monotonic()
        frame = ask(server, tmp_path, n=3, timeout=0.3, max_retries=1)
        assert time.monotonic() - started < 3
        assert frame["error"].isna().all() and (frame["attempts"] == 2).all()
    with ScriptedJudge(lambda call: Reply(verdict(call.body), delay=1.0)) as server:
        assert set(ask(server, tmp_path / "b", n=3, timeout=0.2, max_retries=0)["error"]) == {"timeout"}


def test_retry_after_is_waited_for(tmp_path):
    limited = Reply({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.6"})
    with ScriptedJudge(lambda call: limited if call.attempt == 1 else None) as server:
        frame = ask(server, tmp_path, n=1)
        assert 0.6 <= server.calls[1].at - server.calls[0].at < 2
    assert frame["attempts"].tolist() == [2]


def test_retry_after_comes_in_three_forms():
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "7", "retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert 3e8 < retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"})
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


def test_a_wait_of_hours_is_not_waited_for(tmp_path):
    limited = Reply({"error": {"message": "come back tomorrow"}}, status=429, headers={"Retry-After": "86400"})
    with ScriptedJudge(lambda call: limited) as server:
        frame = ask(server, tmp_path, n=2)
        assert len(server.calls) == 2
    assert set(frame["error"]) == {"rate_limited"}


FINAL = {
    "unparsable": Reply(completion("Both", {"Both": 0.9, "The": 0.1})),
    "not_found": UNMATCHED_404,
    "context_length": Reply({"error": {"message": "maximum context length is 4096", "code": "x"}}, status=400),
    "bad_request": Reply({"error": {"message": "top_logprobs too large"}}, status=400),
    "refused": Reply({"error": {"message": "input was flagged by moderation"}}, status=403),
}


@pytest.mark.parametrize("kind", FINAL)
def test_what_asking_again_cannot_mend_is_not_retried(tmp_path, kind):
    with ScriptedJudge(lambda call: FINAL[kind] if call.number <= 2 else None) as server:
        frame = ask(server, tmp_path, n=5, concurrency=1)
        assert len(server.calls) == 5
    assert frame["error"].tolist()[:2] == [kind, kind] and ledger(frame)["failed"] == 2


@pytest.mark.parametrize("reply", [NO_KEY_401, MODEL_404, Reply(b"", status=404), Reply(b"<h1>404</h1>", status=404)])
def test_a_refused_key_or_model_ends_the_run_at_once(tmp_path, reply):
    with ScriptedJudge(lambda call: reply) as server:
        with pytest.raises(UserError, match="HTTP 40"):
            ask(server, tmp_path, n=200, concurrency=4)
        assert len(server.calls) <= 4


def test_a_key_refused_in_the_middle_keeps_what_was_stored(tmp_path):
    with ScriptedJudge(lambda call: NO_KEY_401 if call.number > 5 else None) as server:
        with pytest.raises(WorkError, match="5 stored replies are kept"):
            ask(server, tmp_path, n=50, concurrency=1)
        assert len(server.calls) == 6
    assert len(stored_keys(tmp_path / "store.sqlite")) == 5


def test_no_credit_left_is_not_a_rate_limit(tmp_path):
    broke = Reply({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, status=429)
    with ScriptedJudge(lambda call: broke) as server, pytest.raises(UserError, match="no credit"):
        ask(server, tmp_path, n=50, concurrency=2)


def test_an_endpoint_that_is_gone_is_given_up(tmp_path):
    with ScriptedJudge(lambda call: Reply(DROP) if call.number > 10 else None) as server:
        frame = ask(server, tmp_path, n=200, concurrency=4, max_retries=1)
        assert len(server.calls) < 50
    assert ledger(frame)["errors"] == {"connection": 190}


def test_text_verdicts_are_taken_only_on_request_and_only_at_last(tmp_path):
    with ScriptedJudge(lambda call: completion("<think>hm</think>M", None)) as server:
        assert set(ask(server, tmp_path, n=2, max_retries=2)["error"]) == {"no_logprobs"}
        assert len(server.calls) == 6
        frame = ask(server, tmp_path, n=2, max_retries=2, allow_text_verdict=True)
        assert len(server.calls) == 12
        assert sorted(frame["preference"]) == sorted(1.0 if o == "model_first" else 2.0 for o in frame["order"])
        assert (
            ask(server, tmp_path, n=2, max_retries=0)["cached"].sum() == 0
        )  # a discrete verdict is none without leave
        many = ask(server, tmp_path, n=100, max_retries=2, allow_text_verdict=True)
        assert many["error"].isna().all() and len(server.calls) < 150


def test_logprobs_that_are_no_numbers_are_asked_for_again(tmp_path):
    """JSON as Python writes it has NaN: it made a verdict that was stored and never asked for again."""
    broken = completion("m", {"m": 0.5, "M": 0.5})
    for each in broken["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        each["logprob"] = float("nan")
    with ScriptedJudge(lambda call: broken) as server:
        frame = ask(server, tmp_path, n=2, max_retries=1)
        assert set(frame["error"]) == {"no_logprobs"} and stored_keys(tmp_path / "store.sqlite") == set()
        with open_store(tmp_path / "store.sqlite") as store:  # as an earlier version stored it
            for call in server.calls:
                store.put(key_of(call), "test", StoredReply(json.dumps(broken), 100, 1, 0.1))
        server.script = lambda call: None
        again = ask(server, tmp_path, n=2)
    assert again["error"].isna().all() and not again["cached"].any()


def test_tokens_of_failed_attempts_are_paid(tmp_path):
    with ScriptedJudge(lambda call: completion("m", None) if call.attempt == 1 else None) as server:
        frame = ask(server, tmp_path, n=2, price_input=1.0)
    assert frame["prompt_tokens"].tolist() == [200, 200]
    assert ledger(frame)["spent_usd"] == pytest.approx(400 / 1e6)


def test_a_gateway_error_in_a_200_is_malformed(tmp_path):
    with ScriptedJudge(lambda call: {"error": {"message": "upstream", "code": 502}}) as server:
        assert set(ask(server, tmp_path, n=2, max_retries=0)["error"]) == {"malformed"}


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (
            404,
            '{"object":"error","message":"The model `x` does not exist.","type":"NotFoundError","code":404}',
            "model_not_found",
        ),
        (404, '{"detail":"Not Found"}', "not_found"),
        (404, '{"error":"model \\"x\\" not found, try pulling it first"}', "model_not_found"),
        (400, '{"error":{"message":"Model Not Exist","type":"invalid_request_error"}}', "model_not_found"),
        (400, '{"message":"This model\'s maximum context length is 512 tokens"}', "context_length"),
        (422, '{"detail":[{"loc":["body"],"msg":"extra fields"}]}', "bad_request"),
        (403, "", "auth"),
        (413, "", "context_length"),
        (408, "", "timeout"),
        (503, "", "server_error"),
        (529, "overloaded", "server_error"),
    ],
)
def test_endpoints_word_their_errors_differently(status, text, kind):
    assert classify_status(status, text)[0] == kind


def config(url, **settings):
    return JudgeConfig(url=url, model=settings.pop("model", "test"), max_retries=1, timeout=5, **settings)


def test_check_asks_one_question_and_no_second_time():
    with ScriptedJudge() as server:
        for _ in range(2):
            check(config(server.url))
        [call] = server.calls
        assert "capital of France" in call.body["messages"][-1]["content"]


def test_check_asks_one_token_where_the_model_is_not_listed():
    for reply in (None, UNMATCHED_404, Reply({"error": {"message": "no pair here"}}, status=400)):
        with ScriptedJudge(lambda call, reply=reply: reply or completion("m", {"m": 1.0})) as server:
            check(config(server.url, model="other"))
            assert [call.body["max_tokens"] for call in server.calls] == [1]


@pytest.mark.parametrize("status", [401, 403])
def test_check_refuses_a_refused_key(status):
    with ScriptedJudge(models=Reply({"error": {"message": "no"}}, status=status)) as server:
        with pytest.raises(UserError, match=f"HTTP {status}.*OPENAI_API_KEY"):
            check(config(server.url))
    with ScriptedJudge(lambda call: NO_KEY_401) as server, pytest.raises(UserError, match="Incorrect API key"):
        check(config(server.url, model="other"))


@pytest.mark.parametrize("reply", [MODEL_404, Reply(b"", status=404), Reply(b"nothing here", status=404)])
def test_check_refuses_an_unknown_model(reply):
    with ScriptedJudge(lambda call: reply) as server, pytest.raises(UserError, match="'gpt-x'"):
        check(config(server.url, model="gpt-x"))


def test_check_refuses_a_wrong_path():
    lost = Reply({"detail": "Not Found"}, status=404)
    with ScriptedJudge(lambda call: lost, models=lost) as server, pytest.raises(UserError, match="/v1"):
        check(config(server.url))


def test_check_refuses_a_setting_that_the_endpoint_does_not_take():
    reply = Reply({"error": {"message": "logprobs is not supported"}}, status=400)
    with ScriptedJudge(lambda call: reply) as server, pytest.raises(UserError, match="logprobs is not supported"):
        check(config(server.url, model="other"))


def test_check_does_not_refuse_what_may_pass():
    with ScriptedJudge(lambda call: PASSING["server_error"], models=PASSING["rate_limited"]) as server:
        check(config(server.url, model="other"))


def test_check_refuses_an_address_where_nothing_listens():
    with ScriptedJudge() as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(UserError, match="No judge answers"):
        check(config(url))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": None}, "judge.url"),
        ({"url": "localhost:8000"}, "expected an address"),
        ({"model": None}, "judge.model"),
        ({"protocol": "arena"}, "found 'arena'"),
    ],
)
def test_check_refuses_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        check(JudgeConfig(**{"url": "http://127.0.0.1:9/v1", "model": "m", **settings}))

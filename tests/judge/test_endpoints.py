"""Endpoints as people have them: addresses, keys, certificates, and what each says when it refuses."""

import json
import shutil
import ssl
import subprocess

import pandas as pd
import pytest
from support.servers import Reply, ScriptedJudge, completion, verdict
from test_judge import ask, outputs

import eval.judge.client
from eval.board.leaderboard import leaderboard
from eval.board.run_files import Board
from eval.board.verdicts.examples import failures
from eval.judge.asking.address import address_of
from eval.judge.asking.refusals import refusal_inside
from eval.judge.asking.streams import joined
from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import classify_status
from eval.judge.replies import UnreadableError, read_pair
from eval.judge.table import ledger
from eval.judge.verdicts import judge
from jobs.cli.options.judge import judge_of
from otpo.errors import UserError, WorkError


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(eval.judge.client, "BACKOFF_SECONDS", 0.01)


@pytest.mark.parametrize(
    "tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/", "/v1/models"]
)
def test_an_address_is_understood_as_people_write_it(tmp_path, tail):
    with ScriptedJudge() as server:
        config = JudgeConfig(url=server.url.removesuffix("/v1") + tail, model="test", max_retries=0)
        frame = judge(outputs(2, "model"), outputs(2, "reference"), config, tmp_path / "s.sqlite", "t")
        assert {call.path for call in server.calls} == {"/v1/chat/completions"}
    assert frame["error"].isna().all()


def test_azures_address_keeps_its_version_and_its_header(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "azure-key")
    with ScriptedJudge() as server:
        root = server.url.removesuffix("/v1")
        url = f"{root}/openai/deployments/judge/chat/completions?api-version=2024-10-21"
        judge(outputs(1, "model"), outputs(1, "reference"), JudgeConfig(url=url, model="j"), tmp_path / "s.sqlite", "t")
        [call] = server.calls
    assert call.path == "/openai/deployments/judge/chat/completions?api-version=2024-10-21"
    assert call.headers["api-key"] == "azure-key"
    assert address_of("https://mine.openai.azure.com").base == "https://mine.openai.azure.com/openai/v1"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "judge", "https://me:pass@host/v1"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(UserError, match=r"judge\.url: expected an address") as caught:
        check(JudgeConfig(url=url, model="m"))
    assert "me:pass" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [("sk-secret\n", "a line end"), ('"sk-secret"', "a quotation mark"), ("Bearer sk-secret", "the word Bearer"),
     (" sk-secret", "a space"), ("sk-secr\u00e9t", "not ASCII"), ("sk-\x07secret", "a control character")],
)  # fmt: skip
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(monkeypatch, key, said):
    monkeypatch.setenv("MY_KEY", key)
    with ScriptedJudge() as server, pytest.raises(UserError, match=f"MY_KEY holds .*{said}") as caught:
        check(JudgeConfig(url=server.url, model="test", api_key_env="MY_KEY"))
    assert "secr" not in str(caught.value) and server.calls == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate that signs itself, for 127.0.0.1: (file to trust, server's context)."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl makes a certificate here")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return folder / "cert.pem", context


@pytest.mark.parametrize("way", ["ca_file", "SSL_CERT_FILE"])
def test_a_certificate_of_ones_own_is_trusted_where_it_is_named(tmp_path, monkeypatch, certificate, way):
    file, context = certificate
    with ScriptedJudge(certificate=context) as server:
        with pytest.raises(UserError, match=r"tls: .*judge\.ca_file"):
            check(JudgeConfig(url=server.url, model="test"))
        if way == "SSL_CERT_FILE":
            monkeypatch.setenv("SSL_CERT_FILE", str(file))
        settings = {"ca_file": str(file)} if way == "ca_file" else {}
        assert ask(server, tmp_path, n=2, max_retries=0, **settings)["error"].isna().all()
        with pytest.raises(UserError, match="expected a file of certificates"):
            check(JudgeConfig(url=server.url, model="test", ca_file=str(tmp_path / "none.pem")))


def test_https_to_a_server_without_it_and_an_unknown_host_are_said_at_once():
    with ScriptedJudge() as server, pytest.raises(UserError, match=r"tls: .*http or https"):
        check(JudgeConfig(url=server.url.replace("http:", "https:"), model="test"))
    with pytest.raises(UserError, match=r"dns: .*host's name"):
        check(JudgeConfig(url="http://judge.invalid/v1", model="test"))


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (402, {"message": "Insufficient credits"}, "quota"),
        (403, {"message": "You are not allowed to request logprobs from this model"}, "bad_request"),
        (403, {"code": "unsupported_country_region_territory", "message": "Country, region not supported"}, "region"),
        (403, {"message": "The request was flagged by moderation"}, "refused"),
        (403, {"message": "Forbidden"}, "auth"),
        (400, {"code": "content_filter", "message": "The response was filtered due to the prompt triggering Azure "
               "OpenAI's content management policy."}, "refused"),
        (400, {"message": "Unsupported parameter: 'max_tokens' is not supported with this model."}, "bad_request"),
    ],
)  # fmt: skip
def test_a_status_has_its_class(status, error, kind):
    assert classify_status(status, json.dumps({"error": error})) == (kind, f"HTTP {status} {error['message']}")


@pytest.mark.parametrize(
    ("error", "said"),
    [({"code": 402, "message": "Insufficient credits"}, "no credit"),
     ({"code": 401, "message": "User not found"}, "key"),
     ({"code": 404, "message": "No endpoints found for this model"}, "model")],
)  # fmt: skip
def test_a_gateways_error_inside_a_200_ends_the_run_as_its_status_would(tmp_path, error, said):
    with ScriptedJudge(lambda call: {"error": error}) as server, pytest.raises((UserError, WorkError), match=said):
        ask(server, tmp_path, n=50, concurrency=2)
    assert len(server.calls) <= 2


def test_the_endpoints_own_words_stay_with_a_failure(tmp_path):
    def script(call):
        if "Question 1\n" in call.body["messages"][-1]["content"]:
            metadata = {"raw": "the provider's own <words>"}
            return Reply({"error": {"message": "Provider returned error", "metadata": metadata}}, status=400)
        return completion("Well, both", {"Well": 1.0}) if call.number == 5 else None

    with ScriptedJudge(script) as server:
        frame = ask(server, tmp_path, n=5, concurrency=1)
    assert frame["detail"].tolist()[1] == "HTTP 400 Provider returned error: the provider's own <words>"
    assert frame["error"].fillna("").tolist() == ["", "bad_request", "", "", "unparsable"]
    assert frame["detail"].tolist()[4] == "Well, both" and frame["detail"].isna().sum() == 3
    rows = {name: outputs(5, name) for name in ("model", "reference")}
    table = leaderboard(frame, rows, rows["reference"], judge="j", protocol="p")
    board = Board("task", "j", "p", "reference", table, frame, rows, rows["reference"])
    said = "HTTP 400 Provider returned error: the provider's own <words>"
    assert failures(board)[0]["words"] == [("bad_request", said, 1), ("unparsable", "Well, both", 1)]


@pytest.mark.parametrize(
    ("reply", "kind", "calls"),
    [
        (Reply({"error": {"message": "no such thing"}}, status=400), "bad_request", 24),
        (completion("Both are good answers.", {"Both": 1.0}), "unparsable", 24),
        (completion("m", None), "no_logprobs", 60),
        ({"error": {"message": "upstream", "code": 502}}, "malformed", 60),
    ],
)
def test_an_endpoint_that_never_answers_is_given_up_long_before_the_last_question(tmp_path, reply, kind, calls):
    with ScriptedJudge(lambda call: reply) as server:
        frame = ask(server, tmp_path, n=300, concurrency=8, max_retries=2)
        assert len(server.calls) <= calls
    assert ledger(frame)["errors"] == {kind: 300}
    assert isinstance(frame, pd.DataFrame) and frame["detail"].notna().all() == (kind != "x")


def test_a_few_questions_at_fault_do_not_end_the_others(tmp_path):
    refusal = Reply({"error": {"message": "odd question"}}, status=400)
    with ScriptedJudge(lambda call: refusal if call.number > 3 and call.number % 10 else None) as server:
        assert ledger(ask(server, tmp_path, n=60, concurrency=4))["failed"] == 60 - 3 - 6


def stream(*pieces, end="data: [DONE]\n\n", first=""):
    """Events with these choices; a piece that is a text is a line as it is."""
    lines = [
        piece if isinstance(piece, str) else f"data: {json.dumps({'choices': [piece]}, ensure_ascii=False)}"
        for piece in pieces
    ]
    return json.loads(joined(first + "".join(f"{line}\n\n" for line in lines) + end))


def delta(content, **more):
    return {"index": 0, "delta": {"content": content}, **more}


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "M"}]}, {"type": "text", "text": "m"}]


@pytest.mark.parametrize(
    ("pieces", "first"),
    [
        ([delta("m")], ""), ([delta("m")], ":\n\n"), ([delta("m")], ":keepalive\n\n"), ([delta("m")], "\ufeff"),
        ([delta("m")], "id: 1\nretry: 3000\n"), ([delta("m", logprobs=[])], ""), ([delta(PARTS)], ""),
        ([delta("<think>a\u2028b\x85c</think>"), delta("m")], ""), ([None, delta("m")], ""),
        ([delta("M") | {"index": 1}, delta("m")], ""), ([{"delta": "m"}, delta("m")], ""),
        (['data: {"error": null, "choices": [{"delta": {"content": "m"}}]}'], ""),
        ([{"delta": {"tool_calls": [None, {"function": {"name": "f", "arguments": {"verdict": "m"}}}]}}], ""),
    ],
)  # fmt: skip
def test_a_stream_is_joined_whatever_its_pieces_look_like(pieces, first):
    assert read_pair(stream(*pieces, first=first), allow_text=True) == 1.0


def test_a_stream_that_breaks_off_is_no_reply():
    half = stream(delta("m is shorter.\nM is better"), end="")
    assert refusal_inside(json.dumps(half)) == (
        "malformed",
        "an error inside a 200: the stream broke off before its end",
    )
    assert read_pair(stream(delta("M", finish_reason="stop"), end=""), allow_text=True) == 2.0
    upstream = stream(delta("M", finish_reason="error", error={"code": 402, "message": "Insufficient credits"}))
    assert refusal_inside(json.dumps(upstream))[0] == "quota"
    refused = stream({"delta": {"refusal": "I cannot compare these."}, "finish_reason": "stop"})
    with pytest.raises(UnreadableError, match="refused"):
        read_pair(refused, allow_text=True)


@pytest.mark.parametrize(
    ("encoding", "header"),
    [("utf-8", "utf-16"), ("utf-8", "bogus"), ("utf-8-sig", None), ("utf-16", None), ("utf-16-be", "utf-16")],
)
def test_a_reply_is_read_in_its_own_encoding_whatever_its_header_says(tmp_path, encoding, header):
    def script(call):
        headers = {"Content-Type": f"application/json; charset={header}"} if header else {}
        return Reply(json.dumps(verdict(call.body)).encode(encoding), headers=headers)

    with ScriptedJudge(script) as server:
        assert ask(server, tmp_path, n=2, max_retries=0)["error"].isna().all()


@pytest.mark.parametrize(
    ("headers", "said"),
    [({"Content-Length": "-1"}, "Content-Length"), ({"X-Padding": "a" * 70_000}, "8190"),
     ({"Content-Encoding": "gzip"}, "gzip|incorrect header|Decod")],
)  # fmt: skip
def test_what_is_no_http_is_a_failed_connection_and_says_why(tmp_path, headers, said):
    with ScriptedJudge(lambda call: Reply(json.dumps(verdict(call.body)).encode(), headers=headers)) as server:
        frame = ask(server, tmp_path, n=2, max_retries=0)
    assert set(frame["error"]) == {"connection"} and frame["detail"].str.contains(said).all(), frame["detail"].tolist()


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ({"object": "error", "message": "CUDA out of memory", "code": 50001}, "malformed", "CUDA out of memory"),
        ({"detail": "No capacity"}, "malformed", "No capacity"),
        ([{"error": {"code": 429, "message": "Resource exhausted"}}], "rate_limited", "Resource exhausted"),
        ({"object": "list", "data": []}, "malformed", "not a chat completion"), ("hello", "malformed", "hello"),
        (None, "malformed", "null"), ({"choices": [], "error": None}, "malformed", "not a chat completion"),
        ({"error": {"code": "x", "message": None}}, "malformed", "an error inside a 200"),
    ],
)  # fmt: skip
def test_what_came_in_place_of_a_completion_is_said(body, kind, said):
    found = refusal_inside(json.dumps(body))
    assert found is not None and found[0] == kind and said in found[1]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("extra_body={messages: x}", r"judge\.extra_body: 'messages' is what the judge is asked"),
        ("extra_body={max_tokens: lots}", r"judge\.extra_body: max_tokens: expected a whole number.*found 'lots'$"),
        ("extra_body={max_completion_tokens: [1]}", r"expected a whole number.*found \[1\]$"),
        ("temperature=true", r"judge\.temperature: expected a number, found true$"),
        ("panel=[{model: m}]", r"^judge: panel: expected judges of different models, found one twice$"),
        ("panel=[{model: b, extra_body: {model: c}}]", r"judge\.panel\.0\.extra_body: 'model' is what"),
    ],
)
def test_a_setting_that_no_request_can_have_is_refused_in_one_line(setting, said):
    with pytest.raises(UserError, match=said):
        judge_of([f"judge.{setting}"], url="http://127.0.0.1:9/v1", model="m")

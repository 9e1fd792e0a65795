"""Endpoint behaviours from public bug reports: right verdicts, or one message before the first paid call."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from support.servers import Reply, ScriptedJudge, share
from test_judge import outputs, truth

import eval.judge.check
import eval.judge.client
from eval.judge.asking import ways
from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.judge.protocols.templates import fenced_texts
from eval.judge.ratings import rate
from eval.judge.verdicts import judge
from otpo.errors import UserError


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(eval.judge.client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(ways, "_known", {})

    async def at_once(seconds):
        return None

    monkeypatch.setattr(eval.judge.check.asyncio, "sleep", at_once)


@dataclass(frozen=True)
class Judge:
    """An endpoint: what it refuses (field -> its words), and what its replies look like."""

    refuses: dict[str, str] = field(default_factory=dict)
    status: int = 400
    logprobs: bool = True
    most_logprobs: int = 20
    text: str = "{}"
    tokens_before: tuple[str, ...] = ()
    spelled: str = "{}"
    thinks: int = 0
    in_content: bool = False
    obeys_schema: bool = True
    stream_only: bool = False
    least_tokens: int = 1
    legacy: bool = False
    follows_form: bool = False
    calls_tools: bool = False
    prefers: Callable[[str, str, str], float] = lambda _, first, second: share(first) / (share(first) + share(second))

    def __call__(self, call):
        body = call.body
        for name, words in self.refuses.items():
            there = any(m["role"] == "system" for m in body["messages"]) if name == "system" else body.get(name)
            if there is not None and there is not False:
                return Reply({"error": {"message": words, "type": "invalid_request_error"}}, self.status)
        if (body.get("top_logprobs") or 0) > self.most_logprobs:
            words = f"top_logprobs must be between 0 and {self.most_logprobs}"
            return Reply({"error": {"message": words}}, 400)
        if self.stream_only and not body.get("stream"):
            return Reply({"error": {"message": "this model supports stream=true only"}}, 400)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit < self.least_tokens:
            return Reply({"error": {"message": f"max_tokens must be at least {self.least_tokens}, got {limit}"}}, 400)
        return self.reply(body, limit)

    def reply(self, body, limit):
        p = self.prefers(*fenced_texts(body["messages"][-1]["content"]))
        letter = "m" if p > 0.5 else "M"
        schema = body.get("response_format") and self.obeys_schema
        form = self.follows_form and 'end with a line "Verdict' in body["messages"][-1]["content"]
        said = json.dumps({"verdict": letter}) if schema else f"Hm.\n\nVerdict: {letter}" if form else None
        said = said or self.text.format(letter)
        cut = limit <= self.thinks
        plain = said if limit > 8 else said[:4]
        content = "" if cut else f"<think>m or M?</think>{plain}" if self.in_content else plain
        if cut and self.in_content:
            content = "<think>m or"
        message = {"role": "assistant", "content": content, "reasoning_content": "m it is? M?" if self.thinks else None}
        choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop", "logprobs": None}
        if body.get("tools") and self.calls_tools and not cut:
            arguments = json.dumps({"verdict": letter})
            function = {"name": body["tool_choice"]["function"]["name"], "arguments": arguments}
            message |= {"content": None, "tool_calls": [{"index": 0, "type": "function", "function": function}]}
        if self.logprobs and body.get("logprobs") and not schema and not cut:
            choice["logprobs"] = self.positions(p, content)
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        whole = {"id": "x", "object": "chat.completion", "model": "test", "choices": [choice], "usage": usage}
        if not body.get("stream"):
            return whole
        delta = {"index": 0, "delta": message, "logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]}
        pieces = [{**whole, "choices": [delta]}, {**whole, "choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
        return Reply(text.encode(), headers={"Content-Type": "text/event-stream"})

    def positions(self, p, content):
        top = {self.spelled.format("m"): p, self.spelled.format("M"): 1 - p}
        answer = max(top, key=lambda token: top[token])
        if self.legacy:
            return {"tokens": [answer], "top_logprobs": [{t: math.log(q) for t, q in top.items()}]}
        before = [
            {"token": token, "top_logprobs": [{"token": token, "logprob": -0.01}]} for token in self.tokens_before
        ]
        listed = [{"token": t, "logprob": math.log(q)} for t, q in top.items()]
        return {"content": [*before, {"token": answer, "top_logprobs": listed}]}


NO_LIMIT = {"max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead."}  # fmt: skip
NO_TEMPERATURE = {"temperature": "Unsupported value: 'temperature' does not support 0.0 with this model. Only the "
                  "default (1) value is supported."}  # fmt: skip
NO_LOGPROBS = {"logprobs": "logprobs is not supported with this model"}
NO_SCHEMA = {"response_format": "This response_format type is unavailable now"}
REASONS = {**NO_LIMIT, **NO_TEMPERATURE, **NO_LOGPROBS}

RIGHT = {
    "as AlpacaEval's judge": (Judge(), "logprobs"),
    "max_completion_tokens": (Judge(NO_LIMIT), "logprobs"),
    "no temperature": (Judge(NO_TEMPERATURE), "logprobs"),
    "two refusals": (Judge({**NO_LIMIT, **NO_TEMPERATURE}), "logprobs"),
    "two refusals, 422": (Judge({**NO_LIMIT, **NO_TEMPERATURE}, status=422), "logprobs"),
    "few logprobs": (Judge(most_logprobs=2), "logprobs"),
    "three logprobs": (Judge(most_logprobs=3), "logprobs"),
    "at least 16 tokens": (Judge(least_tokens=16), "logprobs"),
    "no system message": (Judge({"system": "System role not supported"}), "logprobs"),
    "streams only": (Judge(stream_only=True), "logprobs"),
    "streams only, no temperature": (Judge(NO_TEMPERATURE, stream_only=True), "logprobs"),
    "legacy logprobs": (Judge(legacy=True), "logprobs"),
    "a space before the token": (Judge(text=" {}", spelled=" {}"), "logprobs"),
    "a tokenizer's space": (Judge(text="\u0120{}", spelled="\u0120{}"), "logprobs"),
    "sentencepiece's space": (Judge(text="\u2581{}", spelled="\u2581{}"), "logprobs"),
    "bold": (Judge(text="**{}**", tokens_before=("**",), least_tokens=16), "logprobs"),
    "a line end first": (Judge(text="\n{}", tokens_before=("\n",)), "logprobs"),
    "logprobs of the thinking too": (Judge(tokens_before=("m", " it", " is?")), "logprobs"),
    "thinks in the content": (
        Judge(thinks=100, in_content=True, tokens_before=("<think>", "m or M?", "</think>")), "logprobs",
    ),
    "thinks apart": (Judge(thinks=100), "logprobs"),
    "thinks for long": (Judge(thinks=5000), "logprobs"),
    "logprobs refused": (Judge(NO_LOGPROBS), "json"),
    "logprobs refused by a 403": (
        Judge({"logprobs": "You are not allowed to request logprobs from this model"}, status=403), "json",
    ),
    "logprobs left out": (Judge(logprobs=False), "text"),
    "logprobs left out, a full stop": (Judge(logprobs=False, text="{}."), "text"),
    "a reasoning model": (Judge(REASONS, thinks=100), "json"),
    "a reasoning model that thinks for long": (Judge(REASONS, thinks=5000), "json"),
    "tools, no schema": (Judge({**NO_LOGPROBS, **NO_SCHEMA}, text="I like {}.", calls_tools=True), "tool"),
    "a reasoning model with tools": (Judge({**REASONS, **NO_SCHEMA}, thinks=100, calls_tools=True), "tool"),
    "tools, streams only": (
        Judge({**NO_LOGPROBS, **NO_SCHEMA}, text="I like {}.", calls_tools=True, stream_only=True), "tool",
    ),
    "tools refused": (
        Judge({**NO_LOGPROBS, **NO_SCHEMA, "tools": "tool_choice is not supported"}, text="Verdict: {}"), "text",
    ),
    "a sentence": (Judge(text="The better answer is {}.", logprobs=False), "json"),
    "a sentence, no schema": (Judge(NO_SCHEMA, text="The better answer is {}.", logprobs=False), "text"),
    "bold, no logprobs": (Judge(text="**{}**", logprobs=False, refuses=NO_SCHEMA), "text"),
    "prose, then a verdict": (
        Judge(NO_SCHEMA, text="Both have merits.\n\nFinal verdict: **{}**", logprobs=False), "text",
    ),
    "prose that follows the form": (Judge(NO_SCHEMA, text="I like both.", logprobs=False, follows_form=True), "text"),
    "a schema that is ignored": (Judge(text="Answer {} is better.", logprobs=False, obeys_schema=False), "text"),
    "nothing but messages and max_completion_tokens": (
        Judge({**REASONS, **NO_SCHEMA, "system": "system messages are not supported"}, text="Verdict: {}"), "text",
    ),
    "a reasoning model without schema": (Judge({**REASONS, **NO_SCHEMA}, thinks=100, in_content=True), "text"),
    "a boxed verdict": (Judge({**REASONS, **NO_SCHEMA}, text="\\boxed{{{}}}"), "text"),
}  # fmt: skip


def refuse(message, status, **more):
    return lambda call: Reply({"error": {"message": message, **more}}, status)


def say(text, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": None}
    return lambda call: {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


REFUSED = {
    "no credit": (refuse("Insufficient credits", 402), "no credit"),
    "no credit inside a 200": (lambda call: {"error": {"message": "Insufficient credits", "code": 402}}, "no credit"),
    "a bad key": (refuse("Incorrect API key", 401), "Incorrect API key.*OPENAI_API_KEY"),
    "a bad key inside a 200": (lambda call: {"error": {"message": "No auth", "code": 401}}, "No auth"),
    "a region": (refuse("Country, region, or territory not supported", 403), "serves no requests from this place"),
    "a web page": (lambda call: Reply(b"<!DOCTYPE html><html>Welcome</html>"), "a web page in place of a chat"),
    "no JSON": (lambda call: Reply(b"OK"), "not with a chat completion"),
    "an error inside a 200": (lambda call: {"error": {"message": "upstream broke", "code": 502}}, "upstream broke"),
    "a setting that it always refuses": (refuse("temperature must be set to 1 by the gateway", 400), "by the gateway"),
    "never a verdict": (say("I cannot compare these answers."), "gives no verdict.*I cannot compare"),
    "both": (say("Both m and M are fine."), "gives no verdict.*Both m and M"),
    "thinks without end": (say("<think>m? M?", "length"), "cut_off.*raise judge.max_tokens"),
    "empty": (say(""), "its reply was empty"),
}


def compare(server, tmp_path, n=8, **settings):
    config = JudgeConfig(url=server.url, model="test", timeout=10, **settings)
    way = check(config, tmp_path / "s.sqlite")
    asked = len(server.calls)
    return way, asked, judge(outputs(n, "model"), outputs(n, "reference"), config, tmp_path / "s.sqlite", "t")


@pytest.mark.parametrize("name", RIGHT)
def test_every_judge_gives_the_right_verdicts(tmp_path, name):
    script, read = RIGHT[name]
    with ScriptedJudge(script) as server:
        way, asked, frame = compare(server, tmp_path)
        assert asked <= 8 and len(server.calls) == asked + 8
        assert way.read == read and set(frame["read"]) == {read} and frame["error"].isna().all()
        exact = [1 + truth(i) for i in range(8)]
        wanted = exact if read == "logprobs" else [2.0 if p > 1.5 else 1.0 for p in exact]
        assert frame["preference"].tolist() == pytest.approx(wanted)
        ways._known.clear()
        _, again, repeated = compare(server, tmp_path)  # as another process: what was found is in the store
        assert again == asked + 8 == len(server.calls) and repeated["cached"].all()
        assert repeated["preference"].tolist() == frame["preference"].tolist()


def test_a_seed_and_an_effort_are_sent_where_the_judge_takes_them(tmp_path):
    settings = {"sampling_seed": 7, "reasoning_effort": "low", "samples": 2, "temperature": 1.0}
    with ScriptedJudge(Judge()) as server:
        compare(server, tmp_path, n=3, **settings)
        bodies = [call.body for call in server.calls[1:]]
    assert sorted(body["seed"] for body in bodies) == [7, 7, 7, 8, 8, 8]
    assert {body["reasoning_effort"] for body in bodies} == {"low"}
    refuses = {"seed": "seed is not supported", "reasoning_effort": "Unrecognized request argument: reasoning_effort"}
    with ScriptedJudge(Judge(refuses)) as server:
        way, asked, frame = compare(server, tmp_path / "2", **settings)
        assert (way.seed, way.reasoning, asked) == (False, False, 3) and frame["error"].isna().all()
        assert not {"seed", "reasoning_effort"} & server.calls[-1].body.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_verdict_is_said_before_anything_is_paid(name):
    script, said = REFUSED[name]
    with ScriptedJudge(script) as server:
        with pytest.raises(UserError, match=f"(?s){said}"):
            check(JudgeConfig(url=server.url, model="test", max_retries=3))
        assert len(server.calls) <= 12


def test_a_recording_that_knows_no_question_of_ours_is_asked_as_ever(tmp_path):
    unmatched = Reply({"error": {"message": "no recorded pair in this request", "type": "not_found"}}, status=404)
    with ScriptedJudge(lambda call: unmatched if call.number == 1 else None) as server:
        way, asked, frame = compare(server, tmp_path)
    assert (way, asked) == (ways.Way(), 1) and frame["error"].isna().all()


def test_samples_of_a_judge_without_logprobs_give_their_mean(tmp_path):
    def script(call):  # says m twice of three times
        return say("m" if call.number % 3 else "M")(call)

    with ScriptedJudge(script) as server:
        settings = {"samples": 3, "temperature": 1.0, "concurrency": 1}
        _, asked, frame = compare(server, tmp_path, **settings)
        assert len(server.calls) == asked + 24 and set(frame["read"]) == {"samples"}
        wanted = [5 / 3 if order == "model_first" else 4 / 3 for order in frame["order"]]
        assert frame["preference"].tolist() == pytest.approx(wanted)
        assert (frame["attempts"] == 3).all()
        assert compare(server, tmp_path, **settings)[2]["cached"].all() and len(server.calls) == asked + 24
        with pytest.raises(UserError, match=r"judge\.samples is 3 and judge\.temperature is 0"):
            compare(server, tmp_path, samples=3)


def test_a_way_that_is_asked_for_is_the_only_one():
    with ScriptedJudge(Judge()) as server:
        for verdict in ("json", "text", "logprobs"):
            assert check(JudgeConfig(url=server.url, model="test", verdict=verdict)).read == verdict
    with ScriptedJudge(Judge(NO_LOGPROBS)) as server, pytest.raises(UserError, match="logprobs is not supported"):
        check(JudgeConfig(url=server.url, model="test", verdict="logprobs"))


def test_ratings_find_their_way_too(tmp_path):
    def script(call):
        if call.body.get("logprobs"):
            return Reply({"error": {"message": "logprobs is not supported"}}, 400)
        return say('{"rating": 7}')(call)

    with ScriptedJudge(script) as server:
        config = JudgeConfig(url=server.url, model="test", protocol="rating")
        assert check(config).read == "json"
        assert rate([{"instruction": "q", "output": "a"}], config, tmp_path / "s.sqlite") == [7.0]


@pytest.fixture
def llmbar(shared_data):
    """LLMBar's pairs with GPT-4's recorded winners: (outputs, reference, P(first is better))."""
    rows = json.loads((shared_data / "llmbar" / "Natural" / "gpt4_vanilla_result.json").read_text())
    winners = {}
    for row in rows:
        for swapped in (False, True):
            shown = (row["output_2"], row["output_1"]) if swapped else (row["output_1"], row["output_2"])
            first_wins = (row["results"][0][f"swap = {swapped}"]["winner"] == "1") != swapped
            winners[row["input"], *shown] = 1 - 1e-6 if first_wins else 1e-6
    sides = [
        [{"instruction": row["input"], "output": row[side], "generator": side} for row in rows]
        for side in ("output_2", "output_1")
    ]
    return *sides, lambda *shown: winners[shown] if shown in winners else 0.9


def test_the_same_answers_give_the_same_preferences_in_every_way(tmp_path, llmbar):
    model, reference, prefers = llmbar
    judges = {
        "logprobs": Judge(),
        "thinking": Judge(thinks=100, in_content=True, tokens_before=("<think>", "m or M?", "</think>")),
        "json": Judge(REASONS, thinks=5000),
        "text": Judge(NO_SCHEMA, text="Both have merits.\n\nFinal verdict: **{}**", logprobs=False),
    }
    found = {}
    for name, script in judges.items():
        with ScriptedJudge(replace(script, prefers=prefers)) as server:
            config = JudgeConfig(url=server.url, model=name, both_orders=True)
            check(config)
            frame = judge(model, reference, config, tmp_path / f"{name}.sqlite", "llmbar")
            assert frame["error"].isna().all() and len(frame) == 200
            found[name] = frame["preference"]
    for name in judges:
        assert found[name].tolist() == pytest.approx(found["logprobs"].tolist(), abs=1e-5), name
    draw = random.Random(0)

    def unsure(*shown):  # as sure as four to one, and no logprobs to tell it
        return prefers(*shown) if draw.random() < 0.8 else 1 - prefers(*shown)

    with ScriptedJudge(replace(judges["text"], prefers=unsure)) as server:
        config = JudgeConfig(url=server.url, model="samples", both_orders=True, samples=5, temperature=1.0)
        check(config)
        sampled = judge(model, reference, config, tmp_path / "samples.sqlite", "llmbar")
    agrees = (sampled["preference"] - 1).where(found["logprobs"] > 1.5, 2 - sampled["preference"])
    assert agrees.mean() == pytest.approx(0.8, abs=4 * 0.4 / math.sqrt(1000))

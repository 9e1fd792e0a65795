"""Rows as data sets of the hub hold them: what is read of each, written out by hand."""

import json

import pytest
from support.chat_templates import CHATML_TOOLS, assert_rendered, tokenizer_with
from support.published_rows import assistant, user

from otpo.data.convert import convert
from otpo.data.tokens import tokenize_completions, tokenize_pairs


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(CHATML_TOOLS)


def system(text):
    return {"role": "system", "content": text}


ASK, YES, NO = user("Is a whale a fish?"), assistant("No: a mammal."), assistant("Yes, a fish.")
TEXTS = {"chosen": YES["content"], "rejected": NO["content"]}
TURNS = [{"from": "human", "value": "Is a whale a fish?"}, {"from": "gpt", "value": "No: a mammal."}]
WEATHER = {"name": "get_weather", "description": "of a city", "parameters": {"city": {"type": "str", "default": None}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"name": "get_weather", "arguments": {"city": "Zürich"}}


def calls(*functions):
    functions = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": functions}


# name -> row, messages of the prompt, chosen and rejected (or the one completion), tools
MESSAGES = {
    "intel/orca_dpo_pairs": ({"system": "Be brief.", "question": ASK["content"], **TEXTS}, [system("Be brief."), ASK]),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "Be brief.", "input": ASK["content"], **TEXTS, "order": ["A", "B"], "rating": [9.0, 8.0],
         "original_chosen": "No.", "generations": ["No: a mammal.", "Yes, a fish."]},
        [system("Be brief."), ASK],
    ),
    "truthy-dpo": (
        {"id": "7", "source": "truthy_dpo", "system": "", "prompt": ASK["content"], **TEXTS}, [ASK],
    ),
    "ultrafeedback_binarized": (
        {"prompt": ASK["content"], "prompt_id": "f0", "chosen": [ASK, YES], "rejected": [ASK, NO],
         "messages": [ASK, YES], "score_chosen": 8.0, "score_rejected": 5.0},
        [ASK],
    ),
    "Skywork-Reward-Preference": ({"chosen": [ASK, YES], "rejected": [ASK, NO], "source": "magpie"}, [ASK]),
    "capybara-dpo": (
        {"source": "Dove", "conversation": [{"input": ASK["content"], "output": "Neither."}],
         "prompt": ASK["content"], "chosen": [ASK, YES], "rejected": [ASK, NO], "rating_chosen": 5},
        [ASK],
    ),
    "LLaMA-Factory sharegpt": (
        {"conversations": [TURNS[0]], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": NO["content"]},
         "system": "Be brief.", "tools": json.dumps([TOOL])},
        [system("Be brief."), ASK], [TOOL],
    ),
    "LLaMA-Factory alpaca": (
        {"instruction": "Is a whale", "input": "a fish?", **TEXTS, "history": [["Hello!", "Hi."]]},
        [user("Hello!"), assistant("Hi."), user("Is a whale\n\na fish?")],
    ),
    "magpie-dpo": ({"instruction": ASK["content"], "chosen": [ASK, YES], "rejected": [ASK, NO], "model": "m"}, [ASK]),
    "UltraInteract": ({"task": "Math", "trajectory": [{"from": "user", "value": ASK["content"]}], **TEXTS}, [ASK]),
    "HuggingFaceH4/orca_dpo_pairs": (
        {"system": "Be brief.", "question": ASK["content"], "chosen": [system("Be brief."), ASK, YES],
         "rejected": [system("Be brief."), ASK, NO]},
        [system("Be brief."), ASK],
    ),
    "OpenAI's preferences": (
        {"input": {"messages": [ASK], "tools": [TOOL], "parallel_tool_calls": True}, "preferred_output": [YES],
         "non_preferred_output": [NO]},
        [ASK], [TOOL],
    ),
    "HelpSteer3": (
        {"domain": "code", "language": "en", "context": [ASK], "response1": NO["content"], "response2": YES["content"],
         "overall_preference": 2, "individual_preference": []},
        [ASK],
    ),
    "chatbot_arena": (
        {"model_a": "x", "model_b": "y", "winner": "model_b", "turn": 1, "conversation_a": [ASK, NO],
         "conversation_b": [ASK, YES]},
        [ASK],
    ),
    "a tool call as the answer": (
        {"tools": [TOOL], "prompt": [ASK], "chosen": [calls(CALL)], "rejected": [calls({**CALL, "arguments": {}})]},
        [ASK], [TOOL], calls(CALL), calls({**CALL, "arguments": {}}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_pairs_are_the_ids_of_the_messages_that_are_meant(name, tokenizer):
    row, prompt, *more = MESSAGES[name]
    tools, chosen, rejected = (*more, *(None, YES, NO)[len(more) :])
    template = "chat" if name == "truthy-dpo" else "auto"
    (pair,), report = tokenize_pairs([row], tokenizer, template=template)
    assert report.template == "chat"
    assert_rendered(tokenizer, pair, prompt, chosen, rejected, tools=tools)
    (item,), _ = tokenize_completions([row], tokenizer, template=template)
    assert item.completion_ids == pair.chosen_ids


SINGLE = {
    "trl-lib/Capybara": ({"source": "x", "messages": [ASK, NO, user("Sure?"), YES], "num_turns": 2},
                         [ASK, NO, user("Sure?")], YES, None),
    "LDJnr/Capybara": ({"source": "x", "conversation": [{"input": ASK["content"], "output": YES["content"]}]},
                       [ASK], YES, None),
    "ultrachat_200k": ({"prompt": ASK["content"], "prompt_id": "a", "messages": [ASK, YES]}, [ASK], YES, None),
    "no_robots": ({"prompt": ASK["content"], "messages": [system("Be brief."), ASK, YES], "category": "QA"},
                  [system("Be brief."), ASK], YES, None),
    "OpenHermes": ({"system_prompt": "Be brief.", "conversations": TURNS}, [system("Be brief."), ASK], YES, None),
    "ToolACE": ({"system": "Call.", "conversations": [{"from": "user", "value": ASK["content"]},
                                                      {"from": "assistant", "value": "[f(a=1)]"}]},
                [system("Call."), ASK], assistant("[f(a=1)]"), None),
    "xlam-function-calling": ({"id": 1, "query": ASK["content"], "answers": json.dumps([CALL]),
                               "tools": json.dumps([WEATHER])}, [ASK], calls(CALL), [WEATHER]),
    "LLaMA-Factory function calls": (
        {"conversations": [TURNS[0], {"from": "function_call", "value": json.dumps(CALL)},
                           {"from": "observation", "value": "12 C"}, TURNS[1]], "tools": json.dumps([TOOL])},
        [ASK, calls(CALL), {"role": "tool", "content": "12 C"}], YES, [TOOL]),
    "OpenAI's fine-tuning": (
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]}],
         "tools": [TOOL]},
        [ASK], {**calls(CALL), "content": None}, [TOOL]),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_completions_are_the_ids_of_the_messages_that_are_meant(name, tokenizer):
    row, prompt, completion, tools = SINGLE[name]
    (item,), report = tokenize_completions([row], tokenizer)
    assert_rendered(tokenizer, item, prompt, completion, tools=tools)
    earlier = any(message["role"] == "assistant" and not message.get("tool_calls") for message in prompt)
    assert any("only the last one is trained" in note for note in report.notes) >= earlier


PLAIN = {
    "py-dpo": ({"id": "a", "prompt": "Is it?", **TEXTS}, "Is it?"),
    "argilla/ultrafeedback": (
        {"source": "x", "instruction": "Is it?", "chosen_response": YES["content"], "rejected_response": NO["content"],
         "chosen_avg_rating": 4.5},
        "Is it?",
    ),
    "stack-exchange-paired": (
        {"qid": 5, "question": "Is it?", "response_j": YES["content"], "response_k": NO["content"], "date": "2015"},
        "Is it?",
    ),
    "PKU-SafeRLHF": (
        {"prompt": "Is it?", "response_0": NO["content"], "response_1": YES["content"], "better_response_id": 1,
         "safer_response_id": 0},
        "Is it?",
    ),
    "SHP": (
        {"post_id": "p", "history": "Is it?", "human_ref_A": YES["content"], "human_ref_B": NO["content"], "labels": 1,
         "score_A": 9, "score_B": 2},
        "Is it?",
    ),
    "WebGPT": (
        {"question": {"full_text": "Is it?"}, "answer_0": NO["content"], "answer_1": YES["content"], "score_0": -0.3,
         "score_1": 0.3},
        "Is it?",
    ),
    "two responses": (
        {"question": "Is it?", "answer_a": NO["content"], "answer_b": YES["content"], "preference": "B", "id": 1},
        "Is it?",
    ),
    "Nectar": (
        {"prompt": "\n\nHuman: Is it? \n\nAssistant: ", "turns": 1, "answers": [
            {"answer": "Perhaps.", "rank": 2.0, "model": "x"}, {"answer": NO["content"], "rank": 3.0, "model": "y"},
            {"answer": YES["content"], "rank": 1.0, "model": "z"}]},
        "\n\nHuman: Is it? \n\nAssistant: ",
    ),
    "UltraFeedback": (
        {"source": "x", "instruction": "Is it?", "completions": [
            {"response": NO["content"], "overall_score": 3.0, "model": "x"},
            {"response": YES["content"], "overall_score": 8.5, "model": "y"}]},
        "Is it?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_strings_are_read_as_they_are(name):
    row, prompt = PLAIN[name]
    (example,), report = convert([row])
    assert (example.prompt, *example.completions) == (prompt, YES["content"], NO["content"])
    assert report.template == "literal"


def test_completions_of_two_columns_are_read_under_their_common_names():
    for prompt in ("question", "query", "instruction", "input", "problem"):
        for completion in ("answer", "response", "output", "solution"):
            if (prompt, completion) == ("instruction", "solution"):
                continue
            (example,), _ = convert([{prompt: "Is it?", completion: "No."}])
            assert (example.prompt, *example.completions) == ("Is it?", "No.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PLAIN["SHP"][0] | {"labels": 2}, "labels is none of 0, 1"),
        (PLAIN["PKU-SafeRLHF"][0] | {"better_response_id": None}, "no better_response_id"),
        (PLAIN["WebGPT"][0] | {"score_0": 0.3}, "equal scores: neither answer is preferred"),
        (PLAIN["Nectar"][0] | {"answers": PLAIN["Nectar"][0]["answers"][:1]}, "fewer than two completions with a rank"),
        (PLAIN["two responses"][0] | {"preference": "tie"}, "winner names neither response"),
        (MESSAGES["chatbot_arena"][0] | {"winner": "tie (bothbad)"}, "winner is neither model_a nor model_b"),
        (MESSAGES["chatbot_arena"][0] | {"conversation_a": [NO, NO]},
         "the conversations differ before their last message"),
        (MESSAGES["HelpSteer3"][0] | {"overall_preference": 0},
         "overall_preference is 0: neither response is preferred"),
        (SINGLE["trl-lib/Capybara"][0] | {"messages": [ASK]},
         "the conversation does not end in a message of the assistant"),
        (SINGLE["trl-lib/Capybara"][0] | {"messages": [YES]},
         "the conversation has no message before the assistant's"),
    ],
)  # fmt: skip
def test_rows_that_hold_no_preference_are_counted_by_reason(row, reason):
    good = next(r for r, *_ in (*PLAIN.values(), *MESSAGES.values(), *SINGLE.values()) if r.keys() == row.keys())
    examples, report = convert([good, row, good])
    assert [example.row for example in examples] == [0, 2] and report.problems == {reason: [1]}


def test_transcripts_beside_their_completions_become_turns_with_the_chat_template():
    row = {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."}
    (example,), _ = convert([row])
    assert (example.prompt, *example.completions) == (row["prompt"], " Yes.", " No.")
    (example,), _ = convert([row], template="chat")
    assert (example.prompt, *example.completions) == ([user("Is it?")], "Yes.", "No.")

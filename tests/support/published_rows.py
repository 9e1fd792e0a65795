"""Rows as the files of published data sets hold them, and what is asked of them in several tests."""

from __future__ import annotations

from otpo.data.convert import convert
from otpo.data.tokens import tokenize_pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH_PROMPT = (
    "\n\nHuman: Is a whale a fish?\n\nAssistant: No: it is a mammal.\n\nIt breathes air."
    "\n\nHuman: How long can it dive?\n\nAssistant:"
)
HH = {"chosen": HH_PROMPT + " About an hour, or more.", "rejected": HH_PROMPT + " About a week."}
HH_TURNS = [
    user("Is a whale a fish?"),
    assistant("No: it is a mammal.\n\nIt breathes air."),
    user("How long can it dive?"),
]

ULTRA = {
    "prompt": "When does the train leave?",
    "prompt_id": "f0e37e",
    "chosen": [user("When does the train leave?"), assistant("At a quarter past nine.")],
    "rejected": [user("When does the train leave?"), assistant("I cannot say 🚂")],
    "messages": [user("When does the train leave?"), assistant("At a quarter past nine.")],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}

STEER_PROMPT = "Summarize the letter.\n<extra_id_1>Assistant\nWhich letter?\n<extra_id_1>User\nThe one of both sisters."
STEER_TURNS = [user("Summarize the letter."), assistant("Which letter?"), user("The one of both sisters.")]


def rated(prompt, response, helpfulness):
    ratings = {"correctness": 4 - (helpfulness or 0), "coherence": 4, "complexity": 1, "verbosity": 2}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **ratings}


STEER = [
    rated(STEER_PROMPT, "They sold a bicycle.", 2),
    rated(STEER_PROMPT, "Anna and Eva sold the old bicycle.", 4),
    rated("c#", "C# is a language.", 3),
    rated("c#", "C# is a note.", 1),
]
PREFERRED = {
    "split": "train",
    "prompt": STEER_PROMPT,
    "response_1": "They sold a bicycle.",
    "response_2": "Anna and Eva sold the old bicycle.",
    "preference_strength": 2,
    "preference_statement": "Response 2 is better than Response 1.",
}

TLDR = {
    "info": {
        "id": "t3_1x",
        "post": "She sold the bicycle.\n\nThen she rode to work.",
        "title": "A bicycle",
        "subreddit": "AskReddit",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " Bicycle sold.", "policy": "ref", "note": None},
        {"text": " She sold her bicycle and rode a new one.", "policy": "sup4", "note": None},
    ],
    "choice": 1,
    "worker": "ikNmu",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": 7},
}
TLDR_PROMPT = (
    "SUBREDDIT: r/AskReddit\n\nTITLE: A bicycle\n\nPOST: She sold the bicycle.\nThen she rode to work.\n\nTL;DR:"
)

KTO = [
    {"prompt": [user("Is it raining?")], "completion": [assistant("Yes.")], "label": True},
    {"prompt": [user("Is it raining?")], "completion": [assistant("Bananas.")], "label": False},
    {"prompt": [user("Where?")], "completion": [assistant("Here.")], "label": True},
]


def parts(row, **settings):
    (example,), _ = convert([row], **settings)
    return example.prompt, *example.completions


def same(rows, messages, tokenizer):
    """With template: chat, the rows give the ids of TRL's message rows."""
    ours, report = tokenize_pairs(rows, tokenizer, template="chat")
    theirs, _ = tokenize_pairs(messages, tokenizer)
    assert report.template == "chat"
    ids = [[(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs] for pairs in (ours, theirs)]
    assert ids[0] == ids[1]

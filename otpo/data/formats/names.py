"""What columns are called: the formats' names, other common ones, and what `data.columns` may map."""

from __future__ import annotations

import re
from collections.abc import Iterable

TEXTS = ("prompt", "question", "query", "problem", "user_prompt", "user_input", "user", "input")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "trajectory")

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": TEXTS,
    "messages": CONVERSATIONS,
    "input": ("input", "context"),
    "chosen": (
        "chosen", "chosen_response", "response_chosen", "chosen_answer", "answer_chosen", "chosen_completion",
        "completion_chosen", "preferred", "preferred_response", "accepted", "accepted_response", "response_j",
    ),
    "rejected": (
        "rejected", "rejected_response", "response_rejected", "rejected_answer", "answer_rejected",
        "rejected_completion", "completion_rejected", "dispreferred", "dispreferred_response", "non_preferred",
        "response_k",
    ),
    "response_a": (
        "response_a", "answer_a", "completion_a", "output_a", "model_a_response", "response_A", "answer_A", "output_A",
    ),
    "response_b": (
        "response_b", "answer_b", "completion_b", "output_b", "model_b_response", "response_B", "answer_B", "output_B",
    ),
    "response_0": ("response_0", "answer_0", "completion_0", "output_0"),
    "response_1": ("response_1", "answer_1", "completion_1", "output_1", "response1"),
    "response_2": ("response_2", "answer_2", "completion_2", "output_2", "response2"),
    "winner": ("winner", "preference", "preferred", "choice", "better"),
    "better_response_id": ("better_response_id", "winner", "choice", "better"),
    "completion": ("completion", "response", "output", "answer", "solution", "assistant", "target"),
    "output": ("output", "completion", "response", "answer"),
    "label": ("label", "kto_tag", "is_desirable", "desirable", "thumbs_up", "is_correct", "is_preferred"),
}  # fmt: skip
"""A format's column -> the names that it may have in a file; the first that is there is taken."""

CONTEXT: dict[str, tuple[str, ...]] = {
    "system": (
        "system", "system_prompt", "system_message", "sys_prompt", "system_instruction", "system_instructions",
        "systemprompt", "system prompt", "systemmessage",
    ),
    "tools": ("tools", "functions", "available_tools"),
    "history": ("history", "chat_history", "previous_messages"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}  # fmt: skip
"""Columns that belong to the prompt in every format, and the names that they may have in a file."""

HALF = re.compile(r"[_ -]?([ab]|[01]|[12])$", re.IGNORECASE)
"""How the names of two responses end, of which the better one differs from row to row."""

BESIDE = (
    "input", "context", "contexts", "passage", "paragraph", "article", "document", "documents", "background",
    "knowledge", "reference_text", "choices", "options", "prefix", "suffix", "developer", "developer_prompt", "persona",
    "examples", "few_shot", "few_shots", "few_shot_examples", "demonstrations", "passages", "evidence",
)  # fmt: skip
"""Columns with a text that belongs to a prompt: dropped only where the prompt holds it already."""

OF_ANSWER = ("tool_calls", "thought", "thoughts", "think", "reasoning_trace", "chain_of_thought", "cot")
"""Columns, also after `chosen_` and `rejected_`, with a part of an answer, beside the keys of a message's thoughts."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
"""Columns that no text stands for: rows that have one are refused."""

SCORES = re.compile(
    r"(?:(chosen|rejected)[_ -](?:avg[_ -])?(score|rating|reward))|(?:(score|rating|reward)[_ -](chosen|rejected))"
)
"""How columns of the scores of a pair's two completions are called."""

HINTS: dict[str, tuple[str, ...]] = {
    "rejected": ("reject", "dispref", "lose", "worse", "bad", "negative", "_neg", "wrong"),
    "chosen": ("chosen", "prefer", "accept", "win", "better", "good", "positive", "_pos", "best", "right"),
    "completion": ("answer", "response", "completion", "output", "reply", "target", "assistant"),
    "prompt": ("prompt", "question", "query", "instruct", "input", "user", "ask", "problem", "text"),
}
"""Parts of names by which an error proposes a mapping."""


def plain(column: str) -> str:
    """A column's name without the capitals and the white space that files add to it."""
    return column.strip().lower()


def scores_among(columns: Iterable[str]) -> tuple[str, str] | None:
    """The columns that hold the scores of the chosen and of the rejected completion; None where there are no two."""
    sides: dict[tuple[str, str], str] = {}
    for column in columns:
        if found := SCORES.fullmatch(plain(column)):
            sides[found[2] or found[3], found[1] or found[4]] = column
    pairs = ((sides.get((what, "chosen")), sides.get((what, "rejected"))) for what in ("score", "rating", "reward"))
    return next(((chosen, rejected) for chosen, rejected in pairs if chosen and rejected), None)

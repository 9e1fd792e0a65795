"""Formats told by their columns alone: preference pairs, instructions, conversations, single completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from otpo.data.formats.beside import dropped
from otpo.data.formats.cells import conversation_of, is_blank, label_of, listed_of, string_of, text_of
from otpo.data.rows import BadRow, Messages, Parts, Row, Text, content, number_of, shared_prefix

# ---- pairs ----


def preference(row: Row) -> Parts:
    """`{prompt, chosen, rejected}`, strings or messages (TRL's explicit prompt).

    Where the completions are conversations with a shared beginning, it repeats the prompt, as in UltraFeedback
    binarized, or goes on with a prompt of messages (TRL's `maybe_extract_prompt` keeps such a prompt too).
    """
    prompt, chosen, rejected = (text_of(row, column) for column in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        if shared_prefix(chosen, rejected):
            return _with_prompt(prompt, preference_implicit(row))
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if len(prompt) > 20 and chosen.startswith(prompt) and rejected.startswith(prompt):
            return Parts(prompt, (chosen, rejected), notes=("both completions begin with the text of the prompt",))
    return Parts(prompt, (chosen, rejected))


def _with_prompt(prompt: Text, parts: Parts) -> Parts:
    """Parts of conversations beside a prompt of its own, which they begin with or go on with."""
    begun = [(message["role"], said_by(message)) for message in parts.prompt if isinstance(message, dict)]
    if isinstance(prompt, str):
        texts = [text for _, text in begun]
        if prompt.strip() in (*texts, "", content(parts.prompt).strip()):
            return parts
    else:
        own = [(message["role"], said_by(message)) for message in prompt]
        if any(begun[start : start + len(own)] == own for start in range(len(begun))) or not own:
            return parts
        roles = [role for role, _ in begun]
        if roles[0] != own[-1][0] and not {"system", "developer"} & {*roles} and not {*own} & {*begun}:
            return replace(parts, prompt=[*prompt, *parts.prompt])
    raise BadRow(
        "the conversations of chosen and rejected do not begin with the prompt (data.columns: {prompt: null} reads them"
        " alone)"
    )


def said_by(message: dict[str, Any]) -> str:
    """The text of a message without white space at its ends."""
    return (message.get("content") or "").strip()


def ultrafeedback(row: Row) -> Parts:
    """`{prompt, chosen, rejected, score_chosen, score_rejected}`: UltraFeedback binarized.

    The completions are conversations that repeat the prompt; TRL's copy has no `prompt`. Scores change nothing here:
    rows whose scores are equal (the choice was drawn by lot) or the wrong way round are used and noted.
    """
    parts = preference_implicit(row) if row.get("prompt") is None else preference(row)
    return replace(parts, notes=parts.notes + score_notes(row, "score_chosen", "score_rejected"))


def score_notes(row: Row, of_chosen: str, of_rejected: str) -> tuple[str, ...]:
    """Remarks on a pair whose scores do not say what its choice says.

    Args:
        of_chosen, of_rejected: columns of the scores, which may hold none.
    """
    try:
        chosen, rejected = number_of(row, of_chosen), number_of(row, of_rejected)
    except BadRow:
        return ()
    notes = {"equal scores": chosen == rejected, "chosen completion scored below the rejected one": chosen < rejected}
    return tuple(note for note, true in notes.items() if true)


def preference_implicit(row: Row) -> Parts:
    """`{chosen, rejected}` that both begin with the prompt: their shared beginning (TRL's `extract_prompt`).

    Unlike TRL's, the split never falls inside a word ("gre|en" against "gre|y"): it goes back to the word's beginning.
    """
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one completion is a string, the other a list of messages")
    if chosen == rejected:
        raise BadRow("identical completions")
    split = shared_prefix(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        while split and chosen[split - 1].isalnum():
            split -= 1
        if split and chosen[split - 1] == " ":  # the space belongs to the first word of the completion
            split -= 1
    return Parts(chosen[:split], (chosen[split:], rejected[split:]))


def openai_preference(row: Row) -> Parts:
    """`{input: {messages, tools}, preferred_output, non_preferred_output}`: OpenAI's preference fine-tuning."""
    prompt, tools = text_of(row["input"], "messages"), row["input"].get("tools")
    parts = Parts(prompt, (text_of(row, "preferred_output"), text_of(row, "non_preferred_output")))
    for key in dropped(row["input"], frozenset(("messages", "tools")), parts):
        raise BadRow(f"input has {key}, which is not read: write it into its messages or tools")
    return parts if is_blank(tools) else replace(parts, tools=listed_of(tools, "tools"))


# ---- instructions ----


def instruction(row: Row) -> Parts:
    """`{instruction, input, chosen, rejected}`: the prompt is the instruction, a blank line and the input if any."""
    return preference({**row, "prompt": instruction_of(row)})


def instruction_ranked(row: Row) -> Parts:
    """`{instruction, input, output}` whose output is a list of two completions, the better first (LLaMA-Factory's)."""
    texts = row["output"]
    if not isinstance(texts, list) or [type(text) for text in texts] != [str, str]:
        raise BadRow("output is not a list of two strings")
    return Parts(instruction_of(row), tuple(texts))


def instruction_output(row: Row) -> Parts:
    """`{instruction, input, output}`: supervised training on rows such as Alpaca's."""
    return Parts(instruction_of(row), (text_of(row, "output"),))


def instruction_labelled(row: Row) -> Parts:
    """`{instruction, input, output, label}`: one completion and whether it is a good one (KTO)."""
    return replace(instruction_output(row), label=_label(row))


def instruction_of(row: Row) -> str:
    """The instruction, and after a blank line the input where there is one."""
    prompt = string_of(row, "instruction")
    return prompt if is_blank(row.get("input")) else f"{prompt}\n\n{string_of(row, 'input')}"


# ---- single completions ----


def unpaired(row: Row) -> Parts:
    """`{prompt, completion, label}`: one completion and whether it is a good one (KTO)."""
    return Parts(text_of(row, "prompt"), (text_of(row, "completion"),), _label(row))


def prompt_completion(row: Row) -> Parts:
    """`{prompt, completion}`: supervised training."""
    return Parts(text_of(row, "prompt"), (text_of(row, "completion"),))


def conversation(row: Row) -> Parts:
    """`{messages}`: supervised training on the last message, which is the assistant's; those before are the prompt."""
    messages = conversation_of(row, "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end in a message of the assistant")
    earlier = any(message["role"] == "assistant" for message in messages[:-1])
    notes = ("earlier messages of the assistant are read as context, and only the last one is trained",) * earlier
    return Parts(_started(messages[:-1]), (messages[-1:],), notes=notes)


def _started(messages: Messages) -> Messages:
    if not messages:
        raise BadRow("the conversation has no message before the assistant's")
    return messages


def conversation_labelled(row: Row) -> Parts:
    """`{messages, label}`: the last message, and whether it is a good one (KTO)."""
    return replace(conversation(row), label=_label(row))


def tool_calls(row: Row) -> Parts:
    """`{query, tools, answers}`: a request, and the tool calls that answer it, as in xLAM's function calls."""
    calls = listed_of(row.get("answers"), "answers")
    if not all(isinstance(call.get("name"), str) for call in calls):
        raise BadRow("answers has a tool call without a name")
    functions = [{"type": "function", "function": call} for call in calls]
    return Parts(text_of(row, "query"), ([{"role": "assistant", "content": "", "tool_calls": functions}],))


def _label(row: Row) -> bool:
    label = label_of(row.get("label"))
    if label is None:
        raise BadRow("label is neither true nor false")
    return label

"""Formats told by their columns alone: preference pairs, instructions, labelled and single completions."""

from __future__ import annotations

from dataclasses import replace

from otpo.data.rows import BadRow, Parts, Row, number_of, shared_prefix, string_of, text_of


def preference(row: Row) -> Parts:
    """`{prompt, chosen, rejected}`, strings or messages (TRL's explicit prompt).

    Where `prompt` is a string and the completions are conversations that repeat it, as in UltraFeedback binarized, the
    conversations' shared beginning is the prompt, as in TRL's `maybe_extract_prompt`.
    """
    prompt, chosen, rejected = (text_of(row, column) for column in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        if shared_prefix(chosen, rejected):
            return preference_implicit(row)
        prompt = [{"role": "user", "content": prompt}]
    return Parts(prompt, (chosen, rejected))


def ultrafeedback(row: Row) -> Parts:
    """`{prompt, chosen, rejected, score_chosen, score_rejected}`: UltraFeedback binarized.

    The completions are conversations that repeat the prompt; TRL's copy has no `prompt`. Scores change nothing here:
    rows whose scores are equal (the choice was drawn by lot) or the wrong way round are used and noted.
    """
    parts = preference_implicit(row) if row.get("prompt") is None else preference(row)
    try:
        chosen, rejected = number_of(row, "score_chosen"), number_of(row, "score_rejected")
    except BadRow:
        return parts
    notes = {"equal scores": chosen == rejected, "chosen completion scored below the rejected one": chosen < rejected}
    return replace(parts, notes=tuple(note for note, true in notes.items() if true))


def instruction(row: Row) -> Parts:
    """`{instruction, input, chosen, rejected}`: the prompt is the instruction, a blank line and the input if any."""
    return Parts(_instruction_of(row), (text_of(row, "chosen"), text_of(row, "rejected")))


def instruction_ranked(row: Row) -> Parts:
    """`{instruction, input, output}` whose output is a list of two completions, the better first (LLaMA-Factory's)."""
    texts = row["output"]
    if not isinstance(texts, list) or [type(text) for text in texts] != [str, str]:
        raise BadRow("output is not a list of two strings")
    return Parts(_instruction_of(row), tuple(texts))


def instruction_output(row: Row) -> Parts:
    """`{instruction, input, output}`: supervised training on rows such as Alpaca's."""
    return Parts(_instruction_of(row), (string_of(row, "output"),))


def _instruction_of(row: Row) -> str:
    prompt = string_of(row, "instruction")
    return f"{prompt}\n\n{string_of(row, 'input')}" if row.get("input") else prompt


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


def unpaired(row: Row) -> Parts:
    """`{prompt, completion, label}`: one completion and whether it is a good one (KTO)."""
    label = row["label"]
    if isinstance(label, str):
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    if label not in (True, False):
        raise BadRow("label is neither true nor false")
    return Parts(text_of(row, "prompt"), (text_of(row, "completion"),), bool(label))


def prompt_completion(row: Row) -> Parts:
    """`{prompt, completion}`: supervised training."""
    return Parts(text_of(row, "prompt"), (text_of(row, "completion"),))

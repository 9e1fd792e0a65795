"""The known data formats. To add one: write a function that reads a row (in a module here) and a line in FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from otpo.data.formats import columns, comparisons, datasets
from otpo.data.formats.cells import is_blank, label_of, parsed
from otpo.data.rows import Parts, Row


@dataclass(frozen=True)
class Format:
    """A data format: how its rows are recognised, and the functions that read them.

    Attributes:
        columns: a row of this format has all of these.
        read: reads the prompt and the completions of a row; raises BadRow for a row that cannot be used.
        pairs: whether a row gives a chosen and a rejected completion; otherwise it gives one.
        about: a remark for the report.
        looks: a further condition on a row.
        messages: splits a transcript into messages under `data.template: chat`; strings that it leaves are wrapped as
            one message.
        group: joins rows that make one example, each under the number of its first row; `read` then reads the joined.
        also: columns that are read where a row has them.
        renamed: whether the columns may have other common names (`otpo.data.formats.names`).
        labelled: whether a row says if its one completion is a good one.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Parts]
    pairs: bool
    about: str = ""
    looks: Callable[[Row], bool] | None = None
    messages: Callable[[Parts], Parts] | None = None
    group: Callable[[Sequence[Row]], list[tuple[int, Row]]] | None = None
    also: tuple[str, ...] = ()
    renamed: bool = False
    labelled: bool = False

    def fits(self, row: Row) -> bool:
        """Whether a row is of this format."""
        return all(column in row for column in self.columns) and (self.looks is None or self.looks(row))


def _no_prompt(row: Row) -> bool:
    return is_blank(row.get("prompt"))


def _labelled(row: Row) -> bool:
    return label_of(row["label"]) is not None


_INSTRUCTION = "prompt = instruction, and after a blank line the input where there is one"

# The first that at least half of the rows fit is taken, so formats with more conditions stand first.
FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(
        ("chosen", "rejected", "score_chosen", "score_rejected"), columns.ultrafeedback, pairs=True,
        also=("prompt",), renamed=True,
        about="as UltraFeedback binarized; the prompt is what both conversations begin with",
    ),
    "instruction": Format(
        ("instruction", "chosen", "rejected"), columns.instruction, pairs=True,
        also=("input",), renamed=True, looks=_no_prompt,
        about=_INSTRUCTION,
    ),
    "instruction-ranked": Format(
        ("instruction", "output"), columns.instruction_ranked, pairs=True,
        also=("input",), looks=lambda row: isinstance(row["output"], list) and _no_prompt(row),
        about=f"output = [chosen, rejected] as in LLaMA-Factory; {_INSTRUCTION}",
    ),
    "preference": Format(
        ("prompt", "chosen", "rejected"), columns.preference, pairs=True, messages=datasets.turns_of_prompt,
        renamed=True,
    ),
    "hh": Format(
        ("chosen", "rejected"), datasets.hh, pairs=True, looks=datasets.is_hh, messages=datasets.hh_messages,
        about="Human/Assistant transcripts as in HH-RLHF; the prompt is what both share up to the last 'Assistant:', "
        "as text, or as messages with template: chat",
    ),
    "preference-implicit": Format(
        ("chosen", "rejected"), columns.preference_implicit, pairs=True, renamed=True,
        about="the prompt is what both completions begin with",
    ),
    "openai-preference": Format(
        ("input", "preferred_output", "non_preferred_output"), columns.openai_preference, pairs=True,
        looks=lambda row: isinstance(row["input"], dict) and "messages" in row["input"],
        about="as OpenAI's preference fine-tuning; input holds messages and tools",
    ),
    "tldr": Format(
        ("info", "summaries", "choice"), datasets.tldr, pairs=True, messages=datasets.tldr_messages,
        about="comparisons of summaries as in summarize_from_feedback; prompt = SUBREDDIT, TITLE, POST, 'TL;DR:'",
    ),
    "helpsteer-preference": Format(
        ("prompt", "response_1", "response_2", "preference_strength"), datasets.helpsteer_preference, pairs=True,
        messages=datasets.helpsteer_messages,
        about="as HelpSteer2's preferences; below 0 response_1 is chosen; template: chat makes messages of its turns",
    ),
    "helpsteer3": Format(
        ("context", "response1", "response2", "overall_preference"), comparisons.helpsteer3, pairs=True,
        about="as HelpSteer3's preferences; below 0 response1 is chosen",
    ),
    "helpsteer": Format(
        ("prompt", "response", "helpfulness"), datasets.helpsteer, pairs=True,
        messages=datasets.helpsteer_messages, group=datasets.by_prompt,
        about="as HelpSteer2's ratings; two rows of one prompt make a pair, the more helpful response is chosen; "
        "template: chat makes messages of its turns",
    ),
    "safe-rlhf": Format(
        ("prompt", "response_0", "response_1", "better_response_id"), comparisons.safe_rlhf, pairs=True,
        renamed=True, about="as PKU-SafeRLHF; better_response_id names the chosen response",
    ),
    "shp": Format(
        ("history", "human_ref_A", "human_ref_B", "labels"), comparisons.shp, pairs=True,
        about="as Stanford Human Preferences; labels = 1: human_ref_A is chosen",
    ),
    "webgpt": Format(
        ("question", "answer_0", "answer_1", "score_0", "score_1"), comparisons.scored_answers, pairs=True,
        about="as WebGPT's comparisons; the answer of the higher score is chosen",
    ),
    "arena": Format(
        ("conversation_a", "conversation_b", "winner"), comparisons.battle, pairs=True,
        about="as Chatbot Arena's conversations; the winner's last message is chosen, ties are left out",
    ),
    "alpaca-farm": Format(
        ("instruction", "output_1", "output_2", "preference"), comparisons.numbered_outputs, pairs=True,
        also=("input",), about=f"as AlpacaFarm; preference = 1: output_1 is chosen; {_INSTRUCTION}",
    ),
    "arena-votes": Format(
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"), comparisons.votes, pairs=True,
        also=("winner_tie",),
        about="as Arena's human preferences (55k); the model that has 1 is chosen, ties are left out",
    ),
    "two-responses": Format(
        ("prompt", "response_a", "response_b", "winner"), comparisons.two_responses, pairs=True, renamed=True,
        looks=comparisons.names_a_side,
        about="the response that the winner names (a, model_b, ...; or 1 and 2) is chosen, ties are left out",
    ),
    "numbered-responses": Format(
        ("prompt", "response_1", "response_2", "winner"), comparisons.numbered_responses, pairs=True, renamed=True,
        looks=comparisons.names_a_side, about="the response whose number is the winner is chosen, ties are left out",
    ),
    "nectar": Format(
        ("prompt", "answers"), comparisons.ranked_answers, pairs=True, messages=datasets.turns_of_prompt,
        looks=lambda row: comparisons.is_ranked(row["answers"], "answer", "rank"),
        about="as Nectar; the answer of the lowest rank meets that of the highest",
    ),
    "ultrafeedback-ratings": Format(
        ("instruction", "completions"), comparisons.rated_completions, pairs=True,
        looks=lambda row: comparisons.is_ranked(row["completions"], "response", "overall_score"),
        about="as UltraFeedback; the response of the highest overall_score meets that of the lowest",
    ),
    "instruction-unpaired": Format(
        ("instruction", "output", "label"), columns.instruction_labelled, pairs=False,
        looks=lambda row: _labelled(row) and _no_prompt(row), also=("input",), renamed=True, labelled=True,
        about=f"single completions, each labelled good or bad (KTO); {_INSTRUCTION}",
    ),
    "unpaired": Format(
        ("prompt", "completion", "label"), columns.unpaired, pairs=False, looks=_labelled, renamed=True, labelled=True,
        about="single completions, each labelled good or bad (KTO)",
    ),
    "conversation-unpaired": Format(
        ("messages", "label"), columns.conversation_labelled, pairs=False, looks=_labelled, renamed=True, labelled=True,
        about="conversations whose last message is labelled good or bad (KTO)",
    ),
    "tool-calls": Format(
        ("query", "tools", "answers"), columns.tool_calls, pairs=False,
        looks=lambda row: isinstance(row["answers"], list) or isinstance(parsed(str(row["answers"])), list),
        about="as xLAM's function calls; answers are the calls, and the completion",
    ),
    "instruction-output": Format(
        ("instruction", "output"), columns.instruction_output, pairs=False,
        looks=lambda row: isinstance(row["output"], str) and _no_prompt(row), also=("input",), renamed=True,
        about=f"one completion a row, as Alpaca's; {_INSTRUCTION}",
    ),
    "prompt-completion": Format(
        ("prompt", "completion"), columns.prompt_completion, pairs=False, renamed=True,
    ),
    "conversation": Format(
        ("messages",), columns.conversation, pairs=False, renamed=True,
        about="the last message is the completion, those before it are the prompt",
    ),
}  # fmt: skip

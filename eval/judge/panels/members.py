"""The judges of a panel, each with settings of its own, and what a board calls them together."""

from __future__ import annotations

from eval.judge.config import JudgeConfig


def members_of(config: JudgeConfig) -> list[JudgeConfig]:
    """The settings of each judge: the one that `judge.model` names first, then those of `judge.panel`."""
    alone = config.model_copy(update={"panel": []})
    return [alone, *(alone.model_copy(update=member.model_dump(exclude_none=True)) for member in config.panel)]


def judge_label(config: JudgeConfig) -> str:
    """What a board calls the judge: its model, or `mean of a, b and c`."""
    names = [str(member.model or "") for member in members_of(config)]
    return names[0] if len(names) == 1 else f"{config.panel_vote} of {', '.join(names[:-1])} and {names[-1]}"

"""Judging a task, for `otpo run`, `otpo sweep` and `otpo judge` alike: an endpoint's verdicts, or a reward model's.

judge = Judge(config, store=Path("judge/store.sqlite"))
verdicts = judge_task(judge, [Match("dpo", "base", outputs, reference)], "alpaca_eval")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eval.judge.budget import Spending
from eval.judge.config import JudgeConfig
from otpo.files import Row
from pipeline.judge.reward_model import RewardJudge
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    import pandas as pd

    from eval.judge.client import Answer


@dataclass(frozen=True)
class Match:
    """One model's outputs beside another's. `label` and `against` name them in the progress."""

    label: str
    against: str
    outputs: list[Row]
    reference: list[Row]


@dataclass
class Judge:
    """Who judges. Kept between tasks or trials, so that they share one budget and one loaded reward model.

    Attributes:
        config: an endpoint, or the folder or hub name of a reward model.
        store: SQLite file of the endpoint's replies; nothing in it is asked again.
        template: how a reward model sees prompts: "chat", "literal" or "auto".
        spending: what the command has spent of `config.budget_usd`; `judge_task` adds to it.
        answer: in place of the endpoint, which is then not called (`eval.judge.offline`).
        rewards: the reward model, if that is who judges.
        members: judge of the panel -> its verdicts on each match so far.
    """

    config: JudgeConfig
    store: Path
    template: str = "auto"
    progress: Progress = silent
    spending: Spending = field(default_factory=Spending)
    answer: Answer | None = None
    rewards: RewardJudge | None = field(init=False, default=None)
    members: dict[str, list[pd.DataFrame]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.config.reward_model is not None:
            self.rewards = RewardJudge(self.config.reward_model, template=self.template, progress=self.progress)


def judge_task(judge: Judge, matches: Iterable[Match], task: str, *, subset: bool = False) -> pd.DataFrame:
    """The verdicts on every match, a row each, in the order of the matches.

    Args:
        task: the task's name, a column of the result.
        subset: the outputs may answer only a part of the reference's instructions.

    Returns:
        Columns as `eval.judge.table.COLUMNS`.

    Raises:
        UserError: outputs and reference do not match, or the endpoint refuses the key or the model at the start.
        WorkError: the endpoint refuses them later; the replies so far are in the store.
    """
    import pandas as pd

    from eval.judge.panels.combine import combined
    from eval.judge.panels.members import members_of
    from eval.judge.reward_scores import judge_by_scores
    from eval.judge.table import ledger
    from eval.judge.verdicts import judge as ask

    judge.store.parent.mkdir(parents=True, exist_ok=True)
    frames = []
    for match in matches:
        if judge.rewards is not None:
            frames.append(judge_by_scores(match.outputs, match.reference, judge.rewards, task, subset=subset))
            continue
        said: dict[str, pd.DataFrame] = {}
        for member in members_of(judge.config):
            who = f"judge {match.label} against {match.against}, {task}"
            said[str(member.model)] = ask(
                match.outputs,
                match.reference,
                member,
                judge.store,
                task,
                _counting(judge.progress, f"{who}, {member.model}" if judge.config.panel else who),
                subset=subset,
                spent_usd=judge.spending.usd,
                answer=judge.answer,
            )
            judge.spending.usd += ledger(said[str(member.model)])["spent_usd"]
        for name, frame in said.items():
            judge.members.setdefault(name, []).append(frame)
        alone = next(iter(said.values()))
        frames.append(combined(said, judge.config.panel_vote) if judge.config.panel else alone)
    return pd.concat(frames, ignore_index=True)


def _counting(progress: Progress, what: str) -> Callable[[int, int, int], None]:
    """The judge client's (done, total, failed) as progress of `what`."""

    def count(done: int, total: int, failed: int) -> None:
        progress(what, done, total, f"{failed} failed" if failed else "")

    return count

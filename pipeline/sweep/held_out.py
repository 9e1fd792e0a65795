"""The winner of a sweep judged again: on prompts that no trial was judged on, and trained with fresh seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from otpo.errors import UserError
from otpo.files import Row
from pipeline.progress import Progress
from pipeline.sweep.trial_recipes import trial_training

if TYPE_CHECKING:
    from eval.tasks import Task
    from pipeline.sweep.trials import TrialSettings

FEWEST_PROMPTS = 2  # of each part: fewer have no interval


@dataclass(frozen=True)
class Prompts:
    """The prompts of a judged sweep.

    Attributes:
        whole: the task as the recipe has it; the reference answers all of it.
        trials: what trials are judged on.
        fresh: what the winner is judged on at the end; None where nothing is held out.
    """

    whole: Task
    trials: Task
    fresh: Task | None


def split(task: Task, share: float) -> Prompts:
    """Hold a share of a task's prompts out, by the hash of their instructions: the same ones in every call.

    Prompts with the same instruction stay together.

    Raises:
        UserError: too few prompts for two parts.
    """
    if not share:
        return Prompts(task, task, None)
    instructions = sorted({prompt.instruction for prompt in task.prompts}, key=_hash)
    count = round(share * len(instructions))
    if min(count, len(instructions) - count) < FEWEST_PROMPTS:
        raise UserError(
            f"sweep.held_out is {share:g}: of the {len(instructions)} prompts of '{task.name}', {count} would be the"
            f" winner's and {len(instructions) - count} the trials', and each part needs {FEWEST_PROMPTS}. Take more"
            " prompts, or set sweep.held_out=0."
        )
    held = set(instructions[:count])
    parts = [[p for p in task.prompts if (p.instruction in held) == fresh] for fresh in (False, True)]
    fresh_task = replace(task, name=f"{task.name}-held-out", prompts=parts[1])
    return Prompts(task, replace(task, prompts=parts[0]), fresh_task)


def rows_of(reference: list[Row], task: Task) -> list[Row]:
    """The reference's rows for the prompts of a part."""
    wanted = {prompt.instruction for prompt in task.prompts}
    return [row for row in reference if row["instruction"] in wanted]


def judge_winner(
    settings: TrialSettings, winner: dict[str, Any], judging: Callable[[str], dict[str, Any]], progress: Progress
) -> list[dict[str, Any]]:
    """Judge the winner on fresh prompts, and trainings of its values with fresh seeds.

    Args:
        winner: its record.
        judging: gives the row of the board of a label, on the fresh prompts.

    Returns:
        A row each: trial, seed, and the board's figures; the winner first.
    """
    from pipeline.train.launcher import fit

    recipe, job = settings.job(winner["params"], winner["name"])
    seed = recipe.train_of(job.label).seed
    rows = [{"trial": winner["name"], "seed": seed, **judging(winner["name"])}]
    for fresh in range(seed + 1, seed + 1 + settings.recipe.sweep.held_out_seeds):
        name = f"{winner['name']}.seed-{fresh}"
        recipe, job = settings.job(winner["params"], name, seed=fresh)
        fit(
            [job],
            settings.folder.path,
            name=name,
            train=trial_training(recipe, name),
            cluster=recipe.cluster,
            progress=progress,
            cpus=settings.cpus,
        )
        rows.append({"trial": name, "seed": fresh, **judging(name)})
    return rows


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

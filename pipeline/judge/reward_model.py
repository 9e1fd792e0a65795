"""A reward model in the judge's place: it scores answers in this process, each once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from otpo.errors import UserError

Progress = Callable[[int, int], None]
Key = tuple[str, str]


class RewardJudge:
    """Scores of answers by a reward model, which is loaded for the first one and asked once about each.

    Args:
        folder: of the reward model, or its hub name.
        template: "chat" or "literal", as the answers were generated; "auto" is chat where there is a chat template.
        progress: called with (done, total) while answers are scored.
    """

    def __init__(self, folder: str | Path, *, template: str = "auto", progress: Progress | None = None):
        self.folder, self.template, self.progress = folder, template, progress
        self.known: dict[Key, float] = {}
        self._scorer: Any = None

    def __call__(self, asked: Sequence[Key], prompts: Sequence[Any] | None = None) -> list[float]:
        """The score of each (instruction, answer).

        Args:
            prompts: what stands for the instructions where these are only the last of several messages.
        """
        given = zip(asked, prompts or [instruction for instruction, _ in asked], strict=True)
        new = {key: prompt for key, prompt in given if key not in self.known}
        if new:
            if self._scorer is None:
                from otpo.models.reward_model import Scorer

                self._scorer = Scorer(self.folder, template=self.template)
            scores = self._scorer(list(new.values()), [answer for _, answer in new], self.progress)
            self.known |= dict(zip(new, scores, strict=True))
        return [self.known[key] for key in asked]


def check_reward_model(key: str, path: str) -> None:
    """Find out, before anything starts, whether a local folder is a reward model by its config.json.

    Args:
        key: of the recipe, or the option, that names the folder.

    Raises:
        UserError: it is none. Hub names are not looked up.
    """
    if not Path(path).exists():
        if path.startswith((".", "/", "~")):
            raise UserError(f"{key}: there is no folder '{path}'. Give a reward model's folder, or a hub name.")
        return
    config = Path(path) / "config.json"
    try:
        found = json.loads(config.read_text()).get("architectures") or ["a model without architectures"]
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: expected a reward model's folder at {path}, found no config.json: {error}") from None
    if not str(found[0]).endswith("ForSequenceClassification"):
        raise UserError(
            f"{key}: expected a reward model (ForSequenceClassification) at {path}, found {found[0]}. Train one with"
            " `method: reward-model`; its folder is runs/<name>/models/<label>/model."
        )

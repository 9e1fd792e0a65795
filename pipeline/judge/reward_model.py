"""A reward model in the judge's place: it scores outputs in this process, each once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otpo.errors import UserError
from pipeline.progress import Progress, silent

Key = tuple[str, str]
"""(instruction, output)."""


class RewardJudge:
    """Scores of outputs by a reward model. The model is loaded for the first output, and scores each only once.

    Args:
        folder: of the reward model, or its hub name.
        template: "chat" or "literal", as the outputs were generated; "auto" is chat where there is a chat template.
        progress: called while outputs are scored.
    """

    def __init__(self, folder: str | Path, *, template: str = "auto", progress: Progress = silent):
        self.folder, self.template, self.progress = folder, template, progress
        self.known: dict[Key, float] = {}
        self._model: Any = None

    def __call__(self, asked: Sequence[Key], prompts: Sequence[Any] | None = None) -> list[float]:
        """The score of each (instruction, output), higher is better.

        Args:
            prompts: what the model is shown in place of the instructions, where a prompt is several messages.

        Raises:
            UserError: no reward model in the folder, or a prompt that its template cannot render.
            WorkError: a score that is not finite.
        """
        given = zip(asked, prompts or [instruction for instruction, _ in asked], strict=True)
        new = {key: prompt for key, prompt in given if key not in self.known}
        if new:
            if self._model is None:
                from otpo.models.reward_model import RewardScorer

                self._model = RewardScorer(self.folder, template=self.template)
            scores = self._model(list(new.values()), [output for _, output in new], self._count)
            self.known |= dict(zip(new, scores, strict=True))
        return [self.known[key] for key in asked]

    def unload(self) -> None:
        """Give the model's memory back; the scores are kept, and a new output loads the model again."""
        if self._model is not None:
            import torch

            self._model = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _count(self, done: int, total: int) -> None:
        self.progress("score outputs", done, total, "")


def check_reward_model(key: str, path: str) -> None:
    """Find out, before anything starts, whether a local folder is a reward model by its config.json.

    Args:
        key: of the recipe, or the option, that names the folder.

    Raises:
        UserError: the folder is none. Hub names are not looked up.
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

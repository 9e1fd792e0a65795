"""A reward model in the judge's place: it scores outputs, each once, on a GPU of the cluster where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from otpo.errors import UserError, WorkError, first_line
from otpo.models.disk.present import check_present
from otpo.models.disk.stored import model_places
from pipeline.progress import Progress, silent

Score = Callable[[list[Any], list[str], Callable[[int, int], None]], list[float]]
"""(prompts, outputs, called with done and total) -> scores."""

Key = tuple[str, str]
"""(instruction, output)."""

CHUNK = 512  # outputs that are scored between two steps of the progress


class RewardJudge:
    """Scores of outputs by a reward model. The model is loaded for the first output, and scores each only once.

    In a process that is connected to a Ray cluster with GPUs the model is loaded on one of them, elsewhere in this
    process. Engines that hold the GPUs must be closed before.

    Args:
        folder: of the reward model, or its hub name.
        template: "chat" or "literal", as the outputs were generated; "auto" is chat where there is a chat template.
        progress: called while outputs are scored.
    """

    def __init__(self, folder: str | Path, *, template: str = "auto", progress: Progress = silent):
        self.folder, self.template, self.progress = folder, template, progress
        self.known: dict[Key, float] = {}
        self._score: Score | None = None
        self._end: Callable[[], None] = lambda: None

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
            if self._score is None:
                self._score, self._end = _load(self.folder, self.template)
            scores = self._score(list(new.values()), [output for _, output in new], self._count)
            self.known |= dict(zip(new, scores, strict=True))
        return [self.known[key] for key in asked]

    def unload(self) -> None:
        """Give the model's memory back; the scores are kept, and a new output loads the model again."""
        if self._score is not None:
            self._end()
            self._score = None

    def _count(self, done: int, total: int) -> None:
        self.progress("score outputs", done, total, "")


def _load(folder: str | Path, template: str) -> tuple[Score, Callable[[], None]]:
    """A loaded reward model, and what gives its memory back."""
    from pipeline.cluster.placement import has_gpu

    if has_gpu():
        return _load_on_cluster(str(folder), template)
    from otpo.models.reward_model import RewardScorer

    scorer: Any = RewardScorer(folder, template=template)

    def score(prompts: list[Any], outputs: list[str], count: Callable[[int, int], None]) -> list[float]:
        return scorer(prompts, outputs, count)

    def end() -> None:
        nonlocal scorer
        import torch

        scorer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    return score, end


def _load_on_cluster(folder: str, template: str) -> tuple[Score, Callable[[], None]]:
    """As `_load`, in a Ray actor with a GPU of its own: the driver's machine may have none."""
    import ray

    from pipeline.cluster.placement import actor_options, check_engines, live_nodes

    options = actor_options(1, check_engines(1, 1, live_nodes())[0])
    actor: Any = ray.remote(_ScoringActor).options(**options).remote(folder, template)

    def score(prompts: list[Any], outputs: list[str], count: Callable[[int, int], None]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(outputs), CHUNK):
            chunk = slice(start, start + CHUNK)
            try:
                found += ray.get(actor.score.remote(prompts[chunk], outputs[chunk]))
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError | WorkError):
                    raise cause from None
                raise WorkError(
                    f"The reward model {folder} failed on its GPU: {cause or error}. The same command tries again."
                ) from error
            count(len(found), len(outputs))
        return found

    return score, lambda: ray.kill(actor)


class _ScoringActor:
    """A reward model in a process of its own. It is loaded by the first call, whose error then says what is wrong."""

    def __init__(self, folder: str, template: str) -> None:
        self.folder, self.template = folder, template
        self._scorer: Any = None

    def score(self, prompts: list[Any], outputs: list[str]) -> list[float]:
        """The score of each output of its prompt."""
        if self._scorer is None:
            from otpo.models.reward_model import RewardScorer

            self._scorer = RewardScorer(self.folder, template=self.template)
        return self._scorer(prompts, outputs)


def check_reward_model(key: str, path: str) -> None:
    """Find out, before anything starts, whether a local folder is a whole reward model. No weights are read.

    Args:
        key: of the recipe, or the option, that names the folder.

    Raises:
        UserError: the folder is none. Hub names are not looked up.
    """
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")):
            raise UserError(f"{key}: there is no folder '{path}'. Give a reward model's folder, or a hub name.")
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: expected a whole reward model at {path}, found an adapter (adapter_config.json): merge it into its"
            " model with peft (`merge_and_unload`), and give the merged folder."
        )
    check_present(key, path)
    try:
        config = json.loads((folder / "config.json").read_text())
        found = config.get("architectures") or ["a model without architectures"]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{key}: expected an object in the config.json of {path}: {first_line(error)}. Copy it anew."
        ) from None
    if not str(found[0]).endswith("ForSequenceClassification"):
        raise UserError(
            f"{key}: expected a reward model (ForSequenceClassification) at {path}, found {found[0]}. Train one with"
            " `method: reward-model`; its folder is runs/<name>/models/<label>/model."
        )
    head = model_places(folder).get("score.weight")
    if head is not None and head.kind[1][0] != 1:
        raise UserError(
            f"{key}: expected a reward model, which has one label, at {path}; found a classifier of {head.kind[1][0]}."
            " Give a reward model."
        )

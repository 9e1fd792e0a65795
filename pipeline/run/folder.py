"""The layout of a run's folder: every path of a run is spelled here, or in `eval.layout`, on which this builds.

runs/
  scorers/                      log-probabilities of frozen models, shared by all runs
  <name>/                       RunFolder
    recipe.yaml  manifest.json  the resolved recipe; which stages are finished, from which inputs
    writer-N.lock               who writes the folder now (pipeline.lock)
    events.jsonl                what happened, a line each (pipeline.events.log)
    world/                      the prepared world, where the recipe has one
    data/                       token ids as the workers read them
    pairs/pairs.jsonl           pairs that were sampled here
    models/<label>/             LabelFolder
      metrics.jsonl             a line a step
      start_check.json          what was checked before the first step
      tracking.json             the trackers' runs that hold it
      checkpoints/  model/  adapter/
      milestones/step-N/        models exported on the way, each laid out as a label (pipeline.milestones.judged)
      <task>/model_outputs.json
    judge/store.sqlite          every reply of the judge
    judge/<task>/               verdicts.parquet  reference.json
    weights.json  world.json  leaderboard.csv  leaderboard.json  leaderboard.md  report.html
    tracking/                   what trackers keep on disk
    ray/                        Ray's own files
    sweep/                      SweepFolder: a RunFolder whose labels are the trials
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval import layout

TRIAL = "trial.json"


@dataclass(frozen=True)
class LabelFolder:
    """`models/<label>`: what training, generation and a sweep leave for one model."""

    path: Path

    @property
    def metrics(self) -> Path:
        """A line a training step or evaluation."""
        return self.path / layout.METRICS

    @property
    def start_check(self) -> Path:
        """What training checked before its first step."""
        return self.path / "start_check.json"

    @property
    def tracking(self) -> Path:
        """The trackers' runs that hold this training; gone with it, so that a training done again starts new ones."""
        return self.path / "tracking.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints that an interrupted training resumes from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The adapters alone, in peft's format, where the model was trained with LoRA."""
        return self.path / "adapter"

    @property
    def trial(self) -> Path:
        """What a sweep tried with this label, and what came of it."""
        return self.path / TRIAL

    def milestone(self, step: int) -> LabelFolder:
        """The model as it was after a step, exported on the way: a folder as this one."""
        return LabelFolder(self.path / "milestones" / f"step-{step:06d}")

    def milestones(self) -> list[tuple[int, LabelFolder]]:
        """The milestones that have begun, with their steps, in order."""
        found = sorted(self.path.glob("milestones/step-*"))
        return [(int(folder.name.removeprefix("step-")), LabelFolder(folder)) for folder in found]

    @property
    def judged(self) -> Path:
        """Of a milestone: its figures."""
        return self.path / "judged.json"

    @property
    def selected(self) -> Path:
        """Which milestone became the model, where a judge chose it."""
        return self.path / "selected.json"

    def verdicts_on(self, task: str) -> Path:
        """The verdicts on a trial's outputs for a task."""
        return self.generation(task) / layout.VERDICTS

    def generation(self, task: str) -> Path:
        """Folder of a task's outputs and of how they were generated."""
        return layout.inside(self.path, task)

    def outputs(self, task: str) -> Path:
        """What the model generated for a task."""
        return self.generation(task) / layout.OUTPUTS

    def all_outputs(self) -> list[Path]:
        """The outputs for every task, in the order of the tasks' names."""
        return sorted(self.path.glob(f"*/{layout.OUTPUTS}"))


def name_of_model(model: str | Path) -> str:
    """What outputs of a model are called: its label where it is a run's (`models/<label>/model`), else its own name."""
    path = Path(model).absolute()
    label = LabelFolder(path.parent)
    return path.parent.name if path == label.model and path.parent.parent.name == layout.MODELS else path.name


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, `runs/<name>`."""

    path: Path

    # ---- what a run is ----

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / layout.RECIPE

    @property
    def manifest(self) -> Path:
        """Which stages are finished, and from which inputs."""
        return self.path / layout.MANIFEST

    @property
    def events(self) -> Path:
        """What happened, beside the figures."""
        return self.path / "events.jsonl"

    @property
    def world(self) -> Path:
        """Folder of the prepared world."""
        return self.path / "world"

    # ---- what training reads and writes ----

    @property
    def tokens(self) -> Path:
        """Folder of the token ids that the workers read."""
        return self.path / "data"

    @property
    def pairs(self) -> Path:
        """The preference pairs that were sampled from the base."""
        return self.path / "pairs" / "pairs.jsonl"

    @property
    def models(self) -> Path:
        """Folder of the labels."""
        return self.path / layout.MODELS

    def label(self, label: str) -> LabelFolder:
        """Everything of one model."""
        return LabelFolder(layout.label_folder(self.path, label))

    def model(self, label: str) -> Path:
        """The trained model of a label, a Hugging Face folder."""
        return self.label(label).model

    @property
    def tracking(self) -> Path:
        """Folder of what trackers keep on disk."""
        return self.path / "tracking"

    @property
    def ray(self) -> Path:
        """Folder of Ray Train's and Ray Tune's own files."""
        return self.path / "ray"

    @property
    def frozen_caches(self) -> Path:
        """Folder of the log-probabilities of frozen models; all runs beside this one share it."""
        return self.path.parent / "scorers"

    # ---- what is judged ----

    def outputs(self, label: str, task: str) -> Path:
        """What a model generated for a task, in AlpacaEval's own format."""
        return layout.outputs_file(self.path, label, task)

    @property
    def judge_store(self) -> Path:
        """Every reply of the judge: what it holds is not asked again."""
        return self.path / layout.JUDGE / layout.STORE

    def verdicts(self, task: str) -> Path:
        """The verdicts of a task."""
        return layout.verdicts_file(self.path, task)

    def reference(self, task: str) -> Path:
        """The outputs that a task's verdicts compare with."""
        return layout.reference_file(self.path, task)

    # ---- what comes out ----

    @property
    def weights(self) -> Path:
        """Token weights of a few pairs."""
        return self.path / layout.WEIGHTS

    @property
    def known_truth(self) -> Path:
        """What a world with known truth allowed to measure."""
        return self.path / layout.KNOWN_TRUTH

    @property
    def leaderboard(self) -> Path:
        """A row a model and task."""
        return self.path / layout.LEADERBOARD

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / layout.REPORT

    @property
    def sweep(self) -> SweepFolder:
        """Folder of the sweep over this run's recipe."""
        return SweepFolder(self.path / "sweep")


@dataclass(frozen=True)
class SweepFolder(RunFolder):
    """`runs/<name>/sweep`: laid out as a run, with a label for each trial, and the results at the top."""

    @property
    def frozen_caches(self) -> Path:
        """Those of all runs."""
        return RunFolder(self.path.parent).frozen_caches

    @property
    def results(self) -> Path:
        """A row a trial."""
        return self.path / "results.csv"

    @property
    def held_out(self) -> Path:
        """The winner's figures on prompts that no trial was judged on, and those of its values with fresh seeds."""
        return self.path / "held_out.csv"

    @property
    def summary(self) -> Path:
        """What the page shows of the sweep."""
        return self.path / layout.SWEEP

    @property
    def sweep_verdicts(self) -> Path:
        """The verdicts on all trials."""
        return self.path / layout.VERDICTS

    @property
    def plot(self) -> Path:
        """The metric against each swept key."""
        return self.path / "plot.svg"

    @property
    def best(self) -> Path:
        """The recipe with the best trial's values."""
        return self.path / "best.yaml"

    def trials(self) -> list[LabelFolder]:
        """The trials that have begun, by name."""
        return [LabelFolder(file.parent) for file in sorted(self.models.glob(f"*/{TRIAL}"))]

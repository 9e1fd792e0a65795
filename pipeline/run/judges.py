"""Who judges a run's outputs, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.judge.config import JudgeConfig
from otpo.data.template import trained_with
from otpo.files import Row
from otpo.identity import source_identity
from pipeline.judge.judging import Judge
from pipeline.judge.served import served
from pipeline.recipe import WORLD_PREFIX, Recipe
from pipeline.run.context import RunContext
from pipeline.run.stages.generate import read_outputs

if TYPE_CHECKING:
    from eval.tasks import Task


@dataclass(frozen=True)
class Reference:
    """What a task's outputs are compared with: a label of the run, a file, or (neither) the task's own references."""

    label: str | None = None
    file: str | None = None


def reference_of(run: RunContext, task: Task) -> Reference:
    """What a task's outputs are compared with: `judge.reference`, else the task's own references, else the base."""
    reference = run.recipe.judge.reference
    if reference in run.recipe.labels():
        return Reference(label=reference)
    if reference:
        return Reference(file=run.sources.resolve(reference))
    complete = task.prompts and all(prompt.reference for prompt in task.prompts)
    return Reference() if complete else Reference(label="base")


def reference_inputs(run: RunContext, task: Task) -> str:
    """Which reference a task's verdicts were made with."""
    reference = reference_of(run, task)
    return reference.label or source_identity(reference.file or task.source)


def reference_rows(run: RunContext, task: Task, *, say: bool = False) -> list[Row]:
    """The reference's outputs, as rows of a `model_outputs.json`. `say`: tell how a file was read."""
    from eval.outputs.columns import check_used
    from eval.outputs.matching import with_instructions_of
    from eval.outputs.reading import read_outputs as read_file

    reference = reference_of(run, task)
    if reference.label:
        return read_outputs(run, reference.label, task.name)
    if reference.file:
        judge = run.recipe.judge
        read = read_file(reference.file, judge.columns, reference=True, count_missing=judge.count_missing)
        check_used(judge.columns, [read.columns])
        for remark in read.said if say else ():
            run.progress(reference.file, 0, 0, remark)
        return with_instructions_of(read.rows, [{"instruction": prompt.instruction} for prompt in task.prompts])[0]
    names = ("instruction", "dataset")
    return [
        {name: getattr(prompt, name) for name in names} | {"output": prompt.reference, "generator": "reference"}
        for prompt in task.prompts
    ]


def judge_config(recipe: Recipe, task: Task) -> JudgeConfig:
    """The judge of a task: summaries have a protocol of their own unless the recipe names one."""
    judge = recipe.judge
    summary = task.kind == "summarization" and judge.protocol == "preference"
    return judge.model_copy(update={"protocol": "summary"}) if summary else judge


def own_model_of(run: RunContext, config: JudgeConfig) -> str | None:
    """Folder or hub name of the model that the pipeline loads to judge, if it does."""
    name = config.own_model
    if name is None:
        return None
    return run.sources.model(name) if name in {"base", *run.recipe.methods} else run.sources.resolve(name)


def own_model_inputs(run: RunContext, config: JudgeConfig) -> dict[str, Any]:
    """What the model that judges was made from; nothing for a judge behind an address."""
    path = own_model_of(run, config)
    if path is None:
        return {}
    made_from = run.manifest.inputs.get(f"train/{config.own_model}") or source_identity(path)
    return {"served_model" if config.vllm else "reward_model": made_from}


def judge_of(run: RunContext, config: JudgeConfig) -> Judge:
    """The judge that asks with a run's store and budget, by the settings of `ready_judge`.

    A reward model sees prompts as it was trained, else as the run renders them.
    """
    trained = trained_with(config.reward_model) if config.reward_model else None
    template = trained or run.sources.generation_template.template
    return Judge(config, run.folder.judge_store, template, run.progress, run.spending)


@contextmanager
def ready_judge(run: RunContext, config: JudgeConfig) -> Iterator[JudgeConfig]:
    """The judge's settings with an address, or a folder, that can be used.

    A world's judge runs for the time of the body.
    """
    ours = run.world if (config.url or "").startswith(WORLD_PREFIX) else None
    with ours.serve(run.folder.world) if ours else nullcontext(config.url) as url:
        own = own_model_of(run, config)
        changed = {"vllm": config.vllm.model_copy(update={"model": own})} if config.vllm else {"reward_model": own}
        yield config.model_copy(update={"url": url} | changed)


@contextmanager
def answering(run: RunContext, config: JudgeConfig) -> Iterator[JudgeConfig]:
    """The judge's settings while it can be asked: where vLLM is to serve a model, for the time of the body."""
    with served(config, run.progress) as asked:
        if config.vllm:
            from eval.judge.check import check_each

            for model, way in check_each(asked, run.folder.judge_store):
                run.progress(f"judge {model}", 0, 0, str(way))
        yield asked

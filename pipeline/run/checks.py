"""Checks before anything starts: missing files, models that cannot be served, judges that do not respond.

Every check raises a `UserError`. What only finished stages read is not checked again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from eval.judge.config import JudgeConfig
from otpo.errors import UserError
from otpo.files import NOT_READ, is_address
from otpo.methods.registry.hyperparameters import nearest
from otpo.models.disk.present import check_present
from pipeline.judge.reward_model import check_reward_model
from pipeline.recipe import WORLD_PREFIX, Recipe
from pipeline.run.context import RunContext
from pipeline.run.engines import engine_config
from pipeline.run.judges import reference_of, reference_rows
from pipeline.run.manifest import Manifest
from pipeline.run.sources import SHOWN
from pipeline.train.models import check_models

if TYPE_CHECKING:
    from eval.tasks import Task

PATH_BEGINNINGS = (WORLD_PREFIX, "/", "./", "../", "~")
PATH_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".yaml")


def check_work(recipe: Recipe, *, evaluates: bool) -> None:
    """Refuse a recipe in which there is nothing to train, and nothing to judge either."""
    if not (recipe.methods or recipe.base or recipe.pairs or (evaluates and recipe.generate.named_tasks())):
        raise UserError(
            "Nothing is to be trained: methods is empty. Name what to train in it, for example `methods: [dpo, otpo]`."
        )


def check_judges(recipe: Recipe, manifest: Manifest, *, evaluates: bool) -> None:
    """Check that the recipe names the judges that it needs; none is asked.

    Args:
        evaluates: whether outputs are judged.

    Raises:
        UserError: a judge without address or model, or a label that is no reward model by then.
    """
    tasks, judge = recipe.generate.named_tasks(), recipe.judge
    if recipe.pairs is not None and not manifest.finished("pairs"):
        _check_named(recipe, "pairs.scorer", recipe.pairs.scorer)
    if not evaluates or all(manifest.finished(f"judge/{name}") for name in tasks):
        return
    if judge.url or judge.own_model:
        _check_named(recipe, "judge", judge)
    elif recipe.methods:
        raise UserError(
            "judge.url, judge.vllm or judge.reward_model is needed to judge the outputs of generate.tasks; or use"
            " `otpo train`."
        )


def _check_named(recipe: Recipe, key: str, config: JudgeConfig) -> None:
    """`key` is the judge's section of the recipe."""
    if config.reward_model in recipe.methods:
        if key != "judge" or not recipe.trains_rewards(config.reward_model):
            raise UserError(
                f"{key}.reward_model: expected a reward model that exists by then, found the label"
                f" '{config.reward_model}'. Name a label of `method: reward-model` (of judge only), or a folder."
            )
    elif config.vllm and config.vllm.model in recipe.methods:
        if key != "judge" or recipe.trains_rewards(config.vllm.model):
            raise UserError(
                f"{key}.vllm: expected a model that exists by then and writes text, found the label"
                f" '{config.vllm.model}'. Name a label of a policy (of judge only), a folder, or a hub name."
            )
    elif not config.named:
        raise UserError(f"{key}.url and {key}.model are needed: the server's address, and the model as it knows it.")


def check_training(run: RunContext) -> None:
    """Check the files, models and rows that training reads."""
    _check_sources(run)
    _check_formats(run)
    _check_best_metric(run)
    run.notes.extend(check_models(run.recipe, _trained_now(run), run.sources.resolve))
    _check_adapters(run)
    _check_optimizers(run)
    _check_layers(run)
    _check_data(run)
    _check_saving(run)
    pairs = run.recipe.pairs
    sampling = pairs is not None and not run.manifest.finished("pairs")
    if sampling or _trained_now(run):
        run.sources.say_template()
    if pairs is not None and sampling:
        from eval.tasks import load_task

        _check_engines(run)
        _check_prompts(run, load_task(run.sources.resolve(pairs.prompts), "pairs.prompts", pairs.limit))
        _check_judge(run, "pairs.scorer", pairs.scorer)


def check_evaluation(run: RunContext) -> None:
    """Check, before anything is trained, that outputs can be generated and judged.

    Raises:
        UserError: an engine cannot serve the model, the reference has other instructions, or no judge responds.
    """
    recipe, tasks = run.recipe, run.sources.tasks
    if not tasks or all(run.manifest.finished(f"judge/{name}") for name in tasks):
        return
    from eval.outputs.matching import match_outputs

    _check_engines(run)
    for task in tasks.values():
        _check_prompts(run, task)
        if reference_of(run, task).file:
            outputs = [{"instruction": prompt.instruction, "output": "?"} for prompt in task.prompts]
            match_outputs(outputs, reference_rows(run, task, say=True), subset=recipe.generate.limit is not None)
    _check_judge(run, "judge", recipe.judge)


def _check_sources(run: RunContext) -> None:
    recipe, sources = run.recipe, run.sources
    named = {f"generate.tasks.{name}": source for name, source in recipe.generate.named_tasks().items()}
    named |= {"model.path": recipe.model.path}
    if recipe.base:
        named["base.data"] = recipe.base["data"]
    if recipe.data.path:
        named["data.path"] = recipe.data.path
    named |= {f"data.datasets.{name}.path": each.path for name, each in recipe.data.datasets.items()}
    if recipe.pairs:
        named["pairs.prompts"] = recipe.pairs.prompts
    models = ["model.path"]
    for label in recipe.methods:
        trained_here = recipe.frozen_labels(label)
        frozen = {
            f"methods.{label}.{name}": source
            for name, source in recipe.method(label).frozen_models.items()
            if name not in trained_here
        }
        named |= frozen
        models += frozen if label in _untrained(run) else []
    for key, source in named.items():
        if is_address(source) and not source.startswith(WORLD_PREFIX):
            raise UserError(f"{key}: expected a path or a hub name, found the address '{source}': {NOT_READ}.")
        # a hub name is "owner/name": what begins or ends like a path must be one
        looks_local = source.startswith(PATH_BEGINNINGS) or Path(source).suffix in PATH_ENDINGS
        if looks_local and not Path(sources.resolve(source)).exists():
            raise UserError(f"{key}: there is no file or folder '{source}'. Give a path that exists, or a hub name.")
    if _trained_now(run):
        for key in models:
            check_present(key, sources.resolve(named[key]))


def _untrained(run: RunContext) -> list[str]:
    return [label for label in run.recipe.methods if not run.manifest.finished(f"train/{label}")]


def _trained_now(run: RunContext) -> list[str]:
    """What is not trained yet, the base first."""
    waiting = ["base"] if run.recipe.base and not run.manifest.finished("base") else []
    return [*waiting, *_untrained(run)]


def _may_have_gpus(run: RunContext) -> bool:
    """Whether this machine has a GPU; a cluster's are counted later."""
    import torch

    elsewhere = run.recipe.cluster.address or os.environ.get("RAY_ADDRESS")
    return bool(elsewhere) or torch.cuda.is_available()


def _check_adapters(run: RunContext) -> None:
    model = run.recipe.model
    if model.lora is None or not _untrained(run):
        return
    from otpo.models.adapters import check_adapters, check_quantization

    check_quantization(model.quantization, gpu=_may_have_gpus(run))
    check_adapters(run.sources.resolve(model.path), model.lora.model_dump())


def _check_optimizers(run: RunContext) -> None:
    names = {run.recipe.train_of(label).optimizer for label in _trained_now(run)}
    if names - {"adamw"}:
        from otpo.training.optimizer import check_optimizer

        for name in names:
            check_optimizer(name, gpu=_may_have_gpus(run))


def _check_saving(run: RunContext) -> None:
    recipe, labels = run.recipe, _trained_now(run)
    if not labels:
        return
    from otpo.models.disk.trial_save import check_saving, check_space
    from otpo.training.optimizer import STATE_BYTES

    model = run.sources.resolve(recipe.model.path)
    check_saving(model, generates=not all(recipe.trains_rewards(label) for label in labels))
    train = recipe.train
    saves = bool(train.save_every or train.save_minutes)
    kept = saves * (train.keep_checkpoints + 1) + bool(train.best_metric)
    adapters = recipe.model.lora is not None
    largest = 4 + max(STATE_BYTES[recipe.train_of(label).optimizer] for label in labels)
    check_space(run.folder.models, model, models=len(labels), checkpoints=kept, adapters=adapters, weight_bytes=largest)


def _check_layers(run: RunContext) -> None:
    chosen = {label: run.recipe.method(label).layer for label in _untrained(run)}
    if all(layer == -1 for layer in chosen.values()):
        return
    from otpo.models.loading import check_layer

    for label, layer in chosen.items():
        check_layer(f"methods.{label}.layer", run.sources.resolve(run.recipe.model.path), layer)


def _check_formats(run: RunContext) -> None:
    """Look at the first rows of local files, before torch is loaded."""
    from pipeline.recipe.rows import check_methods, open_sets

    recipe, sources = run.recipe, run.sources
    if recipe.base and not run.manifest.finished("base") and Path(sources.base_rows).is_file():
        open_sets(recipe, sources.base_rows, supervised=True)
    if not (recipe.data.given and _untrained(run)):
        return
    given = sources.pairs
    local = {name: path for name, path in given.items() if Path(path).is_file()} if isinstance(given, dict) else given
    if isinstance(local, dict) or Path(local).is_file():
        for each in open_sets(recipe, local, supervised=False):
            check_methods(recipe, each.format, each.source)


def _check_best_metric(run: RunContext) -> None:
    recipe = run.recipe
    chosen = {label: recipe.train_of(label).best_metric for label in _untrained(run)}
    if not any(chosen.values()):
        return
    from otpo.training.figures import evaluation_figures

    for label, metric in chosen.items():
        if recipe.train_of(label).selects_by_judge:
            _check_chosen_by_judge(recipe, label)
            continue
        spec = recipe.method(label)
        figures = sorted(evaluation_figures(spec, list(recipe.data.datasets)))
        if metric is not None and metric not in figures:
            key = f"methods.{label}.best_metric" if "best_metric" in recipe.methods[label] else "train.best_metric"
            raise UserError(
                f"{key}: an evaluation of '{label}' ({spec.method.title}) gives no '{metric}'"
                f"{nearest(metric, figures)}. It gives: {', '.join(figures)}."
            )


def _check_chosen_by_judge(recipe: Recipe, label: str) -> None:
    train, judge = recipe.train_of(label), recipe.judge
    key = f"train.best_metric of '{label}' is {train.best_metric}, a figure of the judge's"
    if recipe.trains_rewards(label):
        raise UserError(f"{key}, and a reward model writes no outputs: take eval_rewards/accuracies or eval_loss.")
    if not recipe.generate.named_tasks():
        raise UserError(f"{key}, and generate.tasks is empty: name the prompts whose outputs are to be judged.")
    if other := next((name for name in (judge.reference, judge.own_model) if name in recipe.methods), None):
        own = "judge.vllm" if judge.vllm else "judge.reward_model"
        raise UserError(
            f"{key}, which is asked while labels train, and '{other}' is one of them: set judge.reference=base or a"
            f" file, and {own} to a folder."
        )
    if train.best_metric == "length_controlled_winrate" and not judge.calibration:
        raise UserError(f"{key}, which needs judge.calibration; length_adjusted_winrate needs none.")


def _check_data(run: RunContext) -> None:
    recipe, rows = run.recipe, dict[str, int]()
    if recipe.base and not run.manifest.finished("base"):
        rows["base"] = run.sources.tokens(supervised=True).n_train
    if recipe.data.given and (untrained := _untrained(run)):
        tokens = run.sources.tokens()
        rows |= {label: tokens.of(recipe.method(label)).epoch for label in untrained}
    if not rows:
        return
    from pipeline.train.steps import check_steps, small_data

    for label, n in rows.items():
        check_steps(label, n, recipe.train_of(label))
    for remark in dict.fromkeys(small_data(n, recipe.train_of(label)) for label, n in rows.items()):
        if remark:
            run.progress("batch", 0, 0, remark)


def _check_engines(run: RunContext) -> None:
    """Refuse engines that cannot serve the model."""
    from pipeline.generate.pool import preflight

    recipe, sources = run.recipe, run.sources
    preflight(sources.resolve(recipe.model.path), engine_config(recipe), sources.generation_template)


def _check_prompts(run: RunContext, task: Task) -> None:
    """Refuse prompts that do not fit the run's template, and show the first as the model will see it."""
    from otpo.data.encoder import encode_prompt
    from otpo.data.template import one_line
    from pipeline.generate.pool import check_prompts

    template = run.sources.generation_template
    check_prompts(task.prompts, template)
    tokenizer = run.sources.tokenizer
    first = task.prompts[0]
    asked = first.messages or first.instruction
    ids = encode_prompt(tokenizer, asked, template, first.tools, first.template_kwargs)
    run.progress(f"first prompt of {task.name}", 0, 0, one_line(str(tokenizer.decode(ids)), SHOWN))


def _check_judge(run: RunContext, key: str, config: JudgeConfig) -> None:
    """Ask a judge whether it responds. `key` is its section of the recipe; `check_judges` has passed."""
    if config.own_model in {"base", *run.recipe.methods}:
        if config.vllm and not run.sources.tokenizer.chat_template:
            raise UserError(
                f"{key}.vllm: a judge is asked through its chat template, and the tokenizer of '{config.own_model}' has"
                " none. Put chat_template.jinja beside it, or name another model."
            )
        return
    if config.reward_model:
        return check_reward_model(f"{key}.reward_model", run.sources.resolve(config.reward_model))
    if config.vllm:
        from pipeline.judge.served import check_served

        model = run.sources.resolve(config.vllm.model)
        check_served(f"{key}.vllm", config.vllm.model_copy(update={"model": model}))
        return None
    if config.url and not config.url.startswith(WORLD_PREFIX):
        from eval.judge.check import check_each

        asked = config if key == "judge" else config.model_copy(update={"protocol": "rating"})
        for model, way in check_each(asked, run.folder.judge_store):
            run.progress(f"{key} {model}", 0, 0, str(way))

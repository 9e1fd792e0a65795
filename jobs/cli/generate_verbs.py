"""Verbs that generate: generate, pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import (
    ANOTHER_OUT,
    ChatTemplateKwargs,
    Limit,
    MaxTokens,
    Out,
    Seed,
    Template,
    TopP,
    Workers,
    kwargs_of,
    local,
)
from jobs.cli.options.judge import JudgeModel, JudgeOptions, JudgeSettings, JudgeUrl, JudgeVllm
from jobs.cli.progress import Bars
from jobs.cli.terminal import console, one_of, say, show, stderr


def generate(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    task: Annotated[str, typer.Option("--task", help="alpaca_eval, tldr, or a prompts file")],
    out: Annotated[Path, typer.Option("--out", help="model_outputs.json, or a folder for it", callback=local)],
    name: Annotated[
        str | None,
        typer.Option("--name", help="the outputs' generator; by default the label of a run's model, else its name"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy")] = 0.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 1024,
    seed: Seed = 0,
    workers: Workers = 1,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", help="GPUs of one engine")] = 1,
    backend: Annotated[str, typer.Option("--backend", help="auto, vllm or transformers")] = "auto",
    template: Template = "auto",
    chat_template_kwargs: ChatTemplateKwargs = None,
    limit: Limit = None,
) -> None:
    """Outputs of a model for a task's prompts. The file is AlpacaEval's model_outputs.json."""
    from eval.layout import OUTPUTS
    from eval.tasks import load_task
    from otpo.data.template import of_model
    from pipeline.cluster.connect import connect
    from pipeline.generate.engine import EngineConfig, Sampling
    from pipeline.generate.pool import EnginePool, check_prompts, preflight
    from pipeline.lock.lock import one_writer
    from pipeline.run.folder import name_of_model

    prompts = load_task(task, limit=limit).prompts
    config = EngineConfig(
        backend=one_of("--backend", backend, "auto", "vllm", "transformers"),
        workers=workers,
        tensor_parallel_size=tensor_parallel_size,
    )
    setting = one_of("--template", template, "auto", "chat", "literal")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    kwargs = kwargs_of(chat_template_kwargs)
    choice = of_model(setting, preflight(model, config, setting).path, kwargs)
    check_prompts(prompts, choice.for_generation)
    say(f"template  {choice}")
    outputs = out if out.suffix == ".json" else out / OUTPUTS
    with (
        Bars(stderr) as bars,
        one_writer(outputs.parent, outputs.name, otherwise=ANOTHER_OUT, progress=bars.show),
    ):
        connect()
        with EnginePool(config, model, choice.for_generation) as pool:
            result = pool.generate(model, name or name_of_model(model), prompts, sampling, out, progress=bars.show)
    show(f"{result.report['n']} outputs, {result.report['truncated']} truncated: {result.path.absolute()}")


def pairs(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    prompts: Annotated[str, typer.Option("--prompts", help="a prompts file or a task's name")],
    out: Out,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_vllm: JudgeVllm = None,
    n: Annotated[int, typer.Option("--n", help="outputs for each prompt")] = 8,
    scorer: Annotated[
        str, typer.Option("--scorer", help="who rates the outputs: judge (at --judge-url), or a reward model's folder")
    ] = "judge",
    per_prompt: Annotated[int, typer.Option("--per-prompt", help="most pairs of a prompt")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="sampling temperature")] = 1.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    workers: Workers = 1,
    template: Template = "auto",
    chat_template_kwargs: ChatTemplateKwargs = None,
    limit: Limit = None,
    settings: JudgeSettings = None,
    name: Annotated[str, typer.Option("--name", help="the samples' generator")] = "policy",
) -> None:
    """On-policy preference pairs. Several outputs for each prompt, rated, best against worst."""
    from eval.judge.check import check
    from eval.tasks import load_task
    from otpo.data.template import of_model
    from pipeline.cluster.connect import connect
    from pipeline.generate.engine import EngineConfig, Sampling
    from pipeline.generate.pairs import sample_pairs
    from pipeline.generate.pool import EnginePool, check_prompts, preflight
    from pipeline.judge.reward_model import check_reward_model
    from pipeline.judge.served import check_served
    from pipeline.lock.lock import one_writer

    reward_model = None if scorer == "judge" else scorer
    asked = JudgeOptions(judge_url=judge_url, judge_model=judge_model, judge_vllm=judge_vllm, settings=settings)
    asked.check("--scorer", reward_model)
    setting = one_of("--template", template, "auto", "chat", "literal")
    task = load_task(prompts, limit=limit)
    config = asked.config(protocol="rating", reward_model=reward_model)
    engine = EngineConfig(workers=workers)
    if reward_model:
        check_reward_model("--scorer", reward_model)
    kwargs = kwargs_of(chat_template_kwargs)
    choice = of_model(setting, preflight(model, engine, setting).path, kwargs)
    check_prompts(task.prompts, choice.for_generation)
    if config.vllm:
        check_served("--judge-vllm", config.vllm)
    elif not reward_model:
        say(f"judge {config.model}: {check(config)}")
    say(f"template  {choice}")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, n=n, seed=seed)
    with Bars(stderr) as bars, one_writer(out.parent, out.name, otherwise=ANOTHER_OUT, progress=bars.show):
        connect()
        with EnginePool(engine, model, choice.for_generation) as pool:
            report = sample_pairs(
                model, task, sampling, pool, config, out, per_prompt=per_prompt, name=name, progress=bars.show
            )
    console.print_json(data=report)
    show(f"Pairs: {out.absolute()}")

"""Verbs that take files and models: data, fresh, pairs, generate, judge, report, weights, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli.progress import Bars
from jobs.cli.terminal import console, one_judge, one_of, stderr, writable
from otpo.errors import UserError, WorkError

Out = Annotated[Path, typer.Option("--out", help="where to write")]
JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge-url", help="base URL of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1"),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="the judge's model as its server knows it")]


def data(
    source: Annotated[str, typer.Argument(help="a JSON, JSONL, CSV or parquet file (also .gz), or a hub name")],
    model: Annotated[str | None, typer.Option("--model", help="count tokens with this model's tokenizer too")] = None,
    template: Annotated[str, typer.Option("--template", help="auto or chat")] = "auto",
    max_length: Annotated[int, typer.Option("--max-length")] = 1024,
    split: Annotated[str, typer.Option("--split")] = "train",
) -> None:
    """What a preference file holds: format, rows, lengths, how often the longer answer is chosen, unusable rows."""
    from otpo.data.convert import convert
    from otpo.data.load import load_rows

    rows = load_rows(source, split)
    _, report = convert(rows, source, template=template)
    if model:
        from otpo.data.tokens import load_tokenizer, tokenize_completions, tokenize_pairs

        tokenize: Any = tokenize_pairs if "chosen characters" in report.lengths else tokenize_completions
        _, report = tokenize(rows, load_tokenizer(model), template=template, max_length=max_length, source=source)
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def fresh(
    source: Annotated[str, typer.Argument(help="a preference file whose texts the tokenizer is trained on")],
    out: Out,
    architecture: Annotated[str, typer.Option("--architecture", help="llama or qwen3")] = "llama",
    vocab_size: Annotated[int, typer.Option("--vocab-size")] = 4096,
    hidden: Annotated[int, typer.Option("--hidden")] = 128,
    layers: Annotated[int, typer.Option("--layers")] = 2,
    heads: Annotated[int, typer.Option("--heads")] = 4,
    kv_heads: Annotated[int, typer.Option("--kv-heads")] = 2,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Make a tokenizer and a small random model out of a preference file: a start for trials without a download."""
    from otpo.models.fresh import fresh as make

    make(
        source,
        out,
        vocab_size=vocab_size,
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        seed=seed,
    )
    console.print(f"Model and tokenizer: {out.absolute()}", soft_wrap=True, highlight=False)


def pairs(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    prompts: Annotated[str, typer.Option("--prompts", help="a prompts file or a task's name")],
    out: Out,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    n: Annotated[int, typer.Option("--n", help="answers a prompt")] = 8,
    scorer: Annotated[
        str, typer.Option("--scorer", help="who scores the answers: judge (at --judge-url), or a reward model's folder")
    ] = "judge",
    per_prompt: Annotated[int, typer.Option("--per-prompt", help="pairs a prompt")] = 1,
    temperature: Annotated[float, typer.Option("--temperature")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens")] = 512,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="vLLM workers")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", help="only the first prompts")] = None,
) -> None:
    """On-policy preference pairs: several answers a prompt, scored, best against worst."""
    from eval.judge.check import check
    from eval.judge.config import JudgeConfig
    from eval.tasks import load_task
    from pipeline.cluster.connect import connect
    from pipeline.generate.engine import EngineConfig, Sampling
    from pipeline.generate.pairs import sample_pairs
    from pipeline.generate.pool import EnginePool, preflight
    from pipeline.judge.reward_model import check_reward_model

    reward_model = None if scorer == "judge" else scorer
    one_judge("--scorer", reward_model, judge_url, judge_model)
    task = load_task(prompts, limit=limit)
    config = JudgeConfig(url=judge_url, model=judge_model, protocol="rating", reward_model=reward_model)
    engine = EngineConfig(workers=workers)
    if reward_model:
        check_reward_model("--scorer", reward_model)
    preflight(model, engine)
    if not reward_model:
        check(config)
    connect()
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, n=n, seed=seed)
    with Bars(stderr) as bars, EnginePool(engine, model) as pool:
        report = sample_pairs(model, task, sampling, pool, config, out, per_prompt=per_prompt, progress=bars.show)
    console.print_json(data=report)
    console.print(f"Pairs: {out.absolute()}", soft_wrap=True, highlight=False)


def generate(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    task: Annotated[str, typer.Option("--task", help="alpaca_eval, tldr, or a prompts file")],
    out: Annotated[Path, typer.Option("--out", help="model_outputs.json, or a folder for it")],
    name: Annotated[
        str | None, typer.Option("--name", help="the answers' generator; by default the model's name")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens")] = 1024,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    workers: Annotated[int, typer.Option("--workers", help="vLLM workers")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size")] = 1,
    backend: Annotated[str, typer.Option("--backend", help="auto, vllm or transformers")] = "auto",
    template: Annotated[str, typer.Option("--template", help="chat or literal")] = "chat",
    limit: Annotated[int | None, typer.Option("--limit", help="only the first prompts")] = None,
) -> None:
    """Answers by vLLM workers, as AlpacaEval's model_outputs.json."""
    from eval.tasks import load_task
    from pipeline.cluster.connect import connect
    from pipeline.generate.engine import EngineConfig, Sampling
    from pipeline.generate.pool import EnginePool, preflight

    prompts = load_task(task, limit=limit).prompts
    config = EngineConfig(
        backend=one_of("--backend", backend, "auto", "vllm", "transformers"),
        workers=workers,
        tensor_parallel_size=tensor_parallel_size,
    )
    shape = one_of("--template", template, "chat", "literal")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    preflight(model, config, shape)
    writable(out.parent if out.suffix == ".json" else out)
    connect()
    with Bars(stderr) as bars, EnginePool(config, model, shape) as pool:
        result = pool.generate(
            model, name or Path(model).name, prompts, sampling, out, shape,
            progress=lambda done, total, rate: bars.show("generate", done, total, f"{rate:,.0f} tokens/s"),
        )  # fmt: skip
    console.print(
        f"{result.report['n']} answers, {result.report['truncated']} truncated: {result.path.absolute()}",
        soft_wrap=True,
        highlight=False,
    )


def judge(
    outputs: Annotated[list[Path], typer.Argument(help="model_outputs.json files (also .gz)")],
    reference: Annotated[Path, typer.Option("--reference", help="model_outputs.json of the baseline")],
    out: Out,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", help="folder whose scores are compared, in place of a judge's URL")
    ] = None,
    template: Annotated[
        str, typer.Option("--template", help="how the reward model sees prompts: auto, chat or literal")
    ] = "auto",
    task: Annotated[str, typer.Option("--task", help="the task's name on the board")] = "alpaca_eval",
    protocol: Annotated[
        str, typer.Option("--protocol", help="preference, summary, or alpaca_eval (the official prompt)")
    ] = "preference",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="folder with instruction_difficulty.csv and df_gamed*.csv")
    ] = None,
    both_orders: Annotated[bool, typer.Option("--both-orders")] = False,
    concurrency: Annotated[int, typer.Option("--concurrency")] = 32,
    budget_usd: Annotated[float | None, typer.Option("--budget-usd")] = None,
    price_input: Annotated[float, typer.Option("--price-input", help="USD per million prompt tokens")] = 0.0,
    price_output: Annotated[float, typer.Option("--price-output", help="USD per million completion tokens")] = 0.0,
    max_requests_per_minute: Annotated[int | None, typer.Option("--max-requests-per-minute")] = None,
    max_retries: Annotated[int, typer.Option("--max-retries")] = 10,
    subset: Annotated[
        bool, typer.Option("--subset", help="the outputs answer only a part of the reference's instructions")
    ] = False,
) -> None:
    """Verdicts, win rates and lengths of answers against a reference."""
    from eval.judge.config import JudgeConfig
    from jobs.judging import judge_files

    one_judge("--reward-model", reward_model, judge_url, judge_model)
    config = JudgeConfig(
        url=judge_url,
        model=judge_model,
        reward_model=reward_model,
        protocol=protocol,
        both_orders=both_orders,
        concurrency=concurrency,
        budget_usd=budget_usd,
        price_input=price_input,
        price_output=price_output,
        max_requests_per_minute=max_requests_per_minute,
        max_retries=max_retries,
        calibration=str(calibration) if calibration else None,
    )
    writable(out)
    with Bars(stderr) as bars:
        shape = one_of("--template", template, "auto", "chat", "literal")
        board = judge_files(outputs, reference, config, out, task, progress=bars.show, subset=subset, template=shape)
    from eval.board.terminal import terminal_table

    console.print(terminal_table(board))
    console.print(f"Report: {(out / 'report.html').absolute()}", soft_wrap=True, highlight=False)


def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or folders of `otpo judge`")], out: Out
) -> None:
    """One leaderboard and one page over any number of runs."""
    from eval.board.report import build

    writable(out)
    page = build(folders, out)
    console.print(f"Report: {page.absolute()}", soft_wrap=True, highlight=False)


def weights(
    model: Annotated[str, typer.Argument(help="model folder or hub name")],
    source: Annotated[str, typer.Argument(metavar="DATA", help="a preference file or hub name")],
    hyperparameters: Annotated[
        list[str] | None, typer.Argument(help="of the method, for example reg=0.1", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="FILE.html or FILE.json")] = Path("weights.html"),
    method: Annotated[str, typer.Option("--method")] = "otpo",
    limit: Annotated[int, typer.Option("--limit", help="pairs to weigh")] = 16,
    template: Annotated[str, typer.Option("--template", help="auto or chat")] = "auto",
    max_length: Annotated[int, typer.Option("--max-length")] = 1024,
) -> None:
    """What each token weighs, and the transport plan."""
    from otpo.methods.spec import resolve
    from pipeline.recipe import apply_overrides

    spec = resolve(method, apply_overrides({}, hyperparameters or []))
    if out.suffix not in (".html", ".json"):
        raise UserError(f"--out {out}: expected a name that ends in .html (a page) or .json (rows for programs).")
    writable(out.parent)
    from otpo.data.load import load_rows
    from otpo.data.tokens import load_tokenizer, tokenize_pairs
    from otpo.explain import model_token_weights

    items, _ = tokenize_pairs(
        load_rows(source)[:limit], load_tokenizer(model), template=template, max_length=max_length, source=source
    )
    page = out.suffix == ".html"
    rows = model_token_weights(model, items, spec, plan=page, grid=page)
    if out.suffix == ".json":
        out.write_text(json.dumps(rows, ensure_ascii=False))
    else:
        from eval.board.weights_page import build_weights_page

        build_weights_page(rows, out)
    from eval.board.effective_tokens import pairs_sentence

    if sentence := pairs_sentence(rows):
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    console.print(f"{len(rows)} pairs: {out.absolute()}", soft_wrap=True, highlight=False)


def doctor() -> None:
    """What is installed, which devices, what is missing and the line that mends it."""
    from jobs.cli.doctor_checks import examine

    findings = examine()
    for finding in findings:
        console.print(
            f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.found}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if not finding.ok:
            console.print(f"         {finding.mend}", markup=False, highlight=False, soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise WorkError("Something is missing; the lines above say how to mend it.")

"""`otpo`: one command, a verb for each stage.

What a person types, for example:
    otpo run small_world
    otpo train recipe.yaml train.max_steps=50
    otpo judge model_outputs.json --reference reference.json --judge-url URL --judge-model NAME --out board
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import eval.errors
import otpo.errors
from jobs.progress import Bars

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(__doc__ or "").split("\n")[0],
)
console = Console(width=None if sys.stdout.isatty() else 160)  # piped tables keep their rows whole
stderr = Console(stderr=True)

Recipe = Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped recipe such as small_world")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value, for example methods.otpo.reg=0.03", show_default=False)
]
Runs = Annotated[Path, typer.Option("--runs", help="folder that holds the runs")]
Out = Annotated[Path, typer.Option("--out", help="where to write")]
Redo = Annotated[
    bool, typer.Option("--redo", help="accept a changed recipe under an old name: the changed stages are done again")
]
JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge-url", help="base URL of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1"),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="the judge's model as its server knows it")]


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, runs: Runs = Path("runs"), redo: Redo = False) -> None:
    """Train, generate, judge, report; what is done already is skipped."""
    _run(recipe, overrides, runs, redo, until="report")


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, runs: Runs = Path("runs"), redo: Redo = False) -> None:
    """Train alone; several methods in one recipe share the cached reference."""
    _run(recipe, overrides, runs, redo, until="train")


@app.command()
def sweep(recipe: Recipe, overrides: Overrides = None, runs: Runs = Path("runs"), redo: Redo = False) -> None:
    """Ray Tune over any methods.* or train.* key: best trial, table, plot."""
    from jobs.worlds import world_of
    from pipeline.recipes import load_recipe
    from pipeline.sweep import sweep as sweep_recipe
    from pipeline.sweep_results import render

    loaded = load_recipe(recipe, overrides or [])
    say = partial(stderr.print, markup=False, highlight=False, soft_wrap=True)
    with Bars(stderr) as bars:
        outcome = sweep_recipe(loaded, runs / loaded.name, world=world_of(loaded), show=bars.show, say=say, redo=redo)
    if not outcome.did:
        console.print("Nothing to do: every trial is finished and its inputs are unchanged.")
    console.print(render(outcome))
    if outcome.caution:
        console.print(outcome.caution, soft_wrap=True, highlight=False)
    for name in ("plot.svg", "report.html", "best.yaml"):
        console.print(f"{name}: {outcome.folder / name}", soft_wrap=True, highlight=False)
    console.print(f"Best: {outcome.best}; train it with `otpo run {outcome.folder / 'best.yaml'}`.", soft_wrap=True)


@app.command()
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="the dashboard, e.g. http://127.0.0.1:8265"),
    ] = "",
    runs: Annotated[
        Path | None, typer.Option("--runs", help="folder of runs, absolute and seen by every node", show_default=False)
    ] = None,
    shared: Annotated[
        list[Path] | None, typer.Option("--shared", help="a folder that every node sees: files in it do not travel")
    ] = None,
    python: Annotated[str | None, typer.Option("--python", help="the interpreter on the cluster")] = None,
    redo: Redo = False,
    follow: Annotated[bool, typer.Option("--follow", help="show the log and exit with the job's own code")] = False,
) -> None:
    """The same run as a Ray job; submitted twice, it runs once."""
    from jobs.submit import submit as submit_recipe

    say = partial(stderr.print, markup=False, highlight=False, soft_wrap=True)
    code = submit_recipe(
        recipe,
        overrides or [],
        address=address,
        runs=runs,
        shared=shared or [],
        python=python,
        redo=redo,
        follow=follow,
        say=say,
        show_log=partial(print, end="", flush=True),
    )
    raise typer.Exit(code)


def _run(source: str, overrides: list[str] | None, runs: Path, redo: bool, until: str) -> None:
    from jobs.worlds import world_of
    from pipeline.recipes import load_recipe
    from pipeline.run import run as run_recipe

    recipe = load_recipe(source, overrides or [])
    folder = runs / recipe.name
    with Bars(stderr) as bars:
        done = run_recipe(recipe, folder, world=world_of(recipe), show=bars.show, until=until, redo=redo)
    if not done.did:
        console.print("Nothing to do: every stage is finished and its inputs are unchanged.")
    board = folder / "leaderboard.csv"
    if until == "report" and board.exists():
        from eval.leaderboard import read_leaderboard, render

        console.print(render(read_leaderboard(board)))
    for label in ["base", *recipe.methods] if until == "train" else []:
        if (path := done.model_of(label)).is_relative_to(done.folder):
            console.print(f"{label}: {path}", soft_wrap=True, highlight=False)
    for note in done.notes:
        stderr.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if until == "report":
        console.print(f"Report: {(folder / 'report.html').absolute()}", soft_wrap=True, highlight=False)


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="a JSON, JSONL, CSV or parquet file (also .gz), or a hub name")],
    model: Annotated[str | None, typer.Option("--model", help="count tokens with this model's tokenizer too")] = None,
    template: Annotated[str, typer.Option("--template", help="auto or chat")] = "auto",
    max_length: Annotated[int, typer.Option("--max-length")] = 1024,
    split: Annotated[str, typer.Option("--split")] = "train",
) -> None:
    """What a preference file holds: format, rows, lengths, how often the longer answer is chosen, unusable rows."""
    from otpo.data import convert, read_rows

    rows = read_rows(source, split)
    _, report = convert(rows, source, template=template)
    if model:
        from otpo.tokens import load_tokenizer, tokenize_completions, tokenize_pairs

        tokenize: Any = tokenize_pairs if "chosen characters" in report.lengths else tokenize_completions
        _, report = tokenize(rows, load_tokenizer(model), template=template, max_length=max_length, source=source)
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
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
    from otpo.fresh import fresh as make

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


@app.command()
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
    from eval.config import JudgeConfig
    from eval.judge import check
    from eval.tasks import load_task
    from pipeline.cluster import connect
    from pipeline.engine import EngineConfig, Sampling
    from pipeline.generate import EnginePool, preflight
    from pipeline.pairs import sample_pairs
    from pipeline.rewards import check_reward_model

    reward_model = None if scorer == "judge" else scorer
    _one_judge("--scorer", reward_model, judge_url, judge_model)
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


@app.command()
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
    from pipeline.cluster import connect
    from pipeline.engine import EngineConfig, Sampling
    from pipeline.generate import EnginePool, preflight

    prompts = load_task(task, limit=limit).prompts
    config = EngineConfig(
        backend=_one_of("--backend", backend, "auto", "vllm", "transformers"),
        workers=workers,
        tensor_parallel_size=tensor_parallel_size,
    )
    shape = _one_of("--template", template, "chat", "literal")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    preflight(model, config, shape)
    _writable(out.parent if out.suffix == ".json" else out)
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


@app.command()
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
    from eval.config import JudgeConfig
    from jobs.judging import judge_files

    _one_judge("--reward-model", reward_model, judge_url, judge_model)
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
    _writable(out)
    with Bars(stderr) as bars:
        shape = _one_of("--template", template, "auto", "chat", "literal")
        board = judge_files(outputs, reference, config, out, task, show=bars.show, subset=subset, template=shape)
    from eval.leaderboard import render

    console.print(render(board))
    console.print(f"Report: {(out / 'report.html').absolute()}", soft_wrap=True, highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or folders of `otpo judge`")], out: Out
) -> None:
    """One leaderboard and one page over any number of runs."""
    from eval.report import build

    _writable(out)
    page = build(folders, out)
    console.print(f"Report: {page.absolute()}", soft_wrap=True, highlight=False)


@app.command()
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
    from otpo.methods import resolve
    from pipeline.recipes import apply_overrides

    spec = resolve(method, apply_overrides({}, hyperparameters or []))
    if out.suffix not in (".html", ".json"):
        raise otpo.errors.UserError(
            f"--out {out}: expected a name that ends in .html (a page) or .json (rows for programs)."
        )
    _writable(out.parent)
    from otpo.data import read_rows
    from otpo.tokens import load_tokenizer, tokenize_pairs
    from otpo.weigh import weigh

    items, _ = tokenize_pairs(
        read_rows(source)[:limit], load_tokenizer(model), template=template, max_length=max_length, source=source
    )
    page = out.suffix == ".html"
    rows = weigh(model, items, spec, plan=page, grid=page)
    if out.suffix == ".json":
        out.write_text(json.dumps(rows, ensure_ascii=False))
    else:
        from eval.weights_page import build_weights_page

        build_weights_page(rows, out)
    from eval.evenness import pairs_sentence

    if sentence := pairs_sentence(rows):
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    console.print(f"{len(rows)} pairs: {out.absolute()}", soft_wrap=True, highlight=False)


@app.command()
def methods() -> None:
    """The table of methods."""
    from otpo.methods import METHODS, SHARED

    table = Table("method", "weights x loss", "needs", "defaults", title="Methods")
    table.add_column("paper", overflow="fold")
    for name, row in METHODS.items():
        defaults = ", ".join(f"{key}={value}" for key, value in row.defaults.items())
        needs = ", ".join(sorted(row.needs)) or "nothing"
        table.add_row(name, f"{row.weights} x {row.loss}", needs, defaults, row.paper.removeprefix("https://"))
    console.print(table)
    shared = ", ".join(f"{key}={value}" for key, value in SHARED.items())
    console.print(f"Every method also takes: {shared}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """What is installed, which devices, what is missing and the line that mends it."""
    from jobs.doctor import examine

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
        raise otpo.errors.WorkError("Something is missing; the lines above say how to mend it.")


def _one_judge(option: str, reward_model: str | None, url: str | None, model: str | None) -> None:
    if reward_model and (url or model):
        raise otpo.errors.UserError(
            f"{option} {reward_model} stands in place of --judge-url and --judge-model: keep one."
        )
    if not reward_model and not (url and model):
        raise otpo.errors.UserError(
            f"Who judges? Give --judge-url and --judge-model (an OpenAI-compatible server), or {option} FOLDER."
        )


def _one_of(option: str, value: str, *known: str) -> Any:
    if value not in known:
        raise otpo.errors.UserError(f"{option} {value}: expected one of {', '.join(known)}.")
    return value


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise otpo.errors.UserError(
            f"The folder {folder} cannot be written: {error.strerror}. Choose another with --out."
        ) from error


def main() -> None:
    """Entry point: errors meant for people are printed as they are, without a traceback."""
    try:
        app()
    except (otpo.errors.UserError, eval.errors.UserError) as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except (otpo.errors.WorkError, eval.errors.WorkError) as error:
        stderr.print(f"failed: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as exit:
        if exit.code != 130:  # typer's code for Ctrl-C
            raise
        stderr.print("Interrupted. What was finished is kept; the same command goes on from there.", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()

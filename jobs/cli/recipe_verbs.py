"""Verbs that take a recipe: plan, run, train, sweep, study, submit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli.progress import Bars
from jobs.cli.terminal import console, one_of, show, stderr
from otpo.errors import UserError
from otpo.files import is_address
from pipeline.storage.remote import check_address

Recipe = Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped recipe such as small_world")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value, for example methods.otpo.reg=0.03", show_default=False)
]


def _known(runs: str | None) -> str | None:
    """A folder of a file system, or an address of a kind that is understood."""
    if runs is not None and is_address(runs):
        check_address(runs)
    return runs


def _seen(shared: list[Path] | None) -> list[Path] | None:
    """Folders that every node sees, which no address is."""
    for folder in shared or ():
        if is_address(folder):
            raise UserError(f"--shared {folder}: expected a folder that every node sees, found an address.")
    return shared


Runs = Annotated[
    str, typer.Option("--runs", help="folder that holds the runs, or its address: s3://BUCKET/FOLDER", callback=_known)
]
Redo = Annotated[
    bool, typer.Option("--redo", help="accept a changed recipe under an old name: the changed stages are done again")
]


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="kind of GPU, such as H100; unset: this machine")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="nodes that train")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", help="GPUs of each; unset: train.workers", show_default=False)
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="USD of a GPU for an hour", show_default=False)
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option("--utilisation", help="share of the GPU's peak that a step reaches; assumed: 0.4")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="rows of the data, where they are not at hand", show_default=False),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="print one row of a Markdown table")] = False,
) -> None:
    """Memory, time and cost of a recipe. What to change where it does not fit; nothing is started or downloaded."""
    from jobs.planning import plan_recipe
    from pipeline.plan.page import lines, row

    made, served = plan_recipe(
        recipe,
        overrides or [],
        gpu=gpu,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        price=price,
        utilisation=utilisation,
        rows=rows,
    )
    for line in [f"| {' | '.join(row(made))} |"] if table else lines(made, served):
        show(line)


def run(recipe: Recipe, overrides: Overrides = None, runs: Runs = "runs", redo: Redo = False) -> None:
    """Train, generate, judge, report; what is done already is skipped."""
    _run(recipe, overrides, runs, redo, until="report")


def train(recipe: Recipe, overrides: Overrides = None, runs: Runs = "runs", redo: Redo = False) -> None:
    """Train alone. Several methods in one recipe share the cached reference."""
    _run(recipe, overrides, runs, redo, until="train")


def sweep(recipe: Recipe, overrides: Overrides = None, runs: Runs = "runs", redo: Redo = False) -> None:
    """Ray Tune over any methods.* or train.* key. Gives the best trial, a table and a plot."""
    from jobs.worlds import world_of
    from pipeline.recipe import load_recipe
    from pipeline.storage.stored import run_folder
    from pipeline.sweep.results import render, render_best
    from pipeline.sweep.sweep import sweep as sweep_recipe

    loaded = load_recipe(recipe, overrides or [])
    world = world_of(loaded)
    say = partial(stderr.print, markup=False, highlight=False, soft_wrap=True)
    with Bars(stderr) as bars, run_folder(runs, loaded.name, progress=bars.show) as place:
        outcomes = sweep_recipe(loaded, place, world=world, progress=bars.show, say=say, redo=redo)
    if not outcomes[0].did:
        console.print("Nothing to do: every trial is finished and its inputs are unchanged.")
    for outcome in outcomes:
        console.print(render(outcome))
    if len(outcomes) > 1:
        console.print(render_best(outcomes))
    for caution in filter(None, [outcome.caution for outcome in outcomes]):
        console.print(caution, soft_wrap=True, highlight=False)
    folder = outcomes[0].folder
    for path in (folder.plot, folder.report, folder.best):
        console.print(f"{path.name}: {path}", soft_wrap=True, highlight=False)
    best = ", ".join(outcome.best for outcome in outcomes if outcome.best)
    console.print(f"Best: {best}; train it with `otpo run {folder.best}`.", soft_wrap=True)


def study(recipe: Recipe, overrides: Overrides = None, runs: Runs = "runs", redo: Redo = False) -> None:
    """Tune methods with equal budgets, train each with fresh seeds, and compare them with intervals over the seeds."""
    from jobs.worlds import world_of
    from pipeline.recipe import load_recipe
    from pipeline.study.study import CSV, MARKDOWN
    from pipeline.study.study import study as study_recipe

    loaded = load_recipe(recipe, overrides or [])
    say = partial(stderr.print, markup=False, highlight=False, soft_wrap=True)
    with Bars(stderr) as bars:
        done = study_recipe(loaded, runs, world_of=world_of, progress=bars.show, say=say, redo=redo)
    if not done.did:
        console.print("Nothing to do: every run is finished and its inputs are unchanged.")
    print(done.text)
    for name in (CSV, MARKDOWN):
        console.print(f"{name}: {done.folder / name}", soft_wrap=True, highlight=False)


def submit(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="as for `otpo run`; with --verb judge and the like its first word")],
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="the dashboard, e.g. http://127.0.0.1:8265"),
    ] = "",
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            help="folder of runs, absolute and seen by every node, or an address as for `otpo run`",
            callback=_known,
            show_default=False,
        ),
    ] = None,
    shared: Annotated[
        list[Path] | None,
        typer.Option("--shared", help="a folder that every node sees: files in it do not travel", callback=_seen),
    ] = None,
    python: Annotated[str | None, typer.Option("--python", help="the interpreter on the cluster")] = None,
    redo: Redo = False,
    follow: Annotated[bool, typer.Option("--follow", help="show the log and exit with the job's own code")] = False,
    verb: Annotated[
        str,
        typer.Option(
            "--verb",
            help="what the job does: run, train, sweep or study; or generate, pairs, judge, agreement, report or board,"
            " whose words follow after --",
        ),
    ] = "run",
    kuberay: Annotated[
        bool, typer.Option("--kuberay", help="print a RayJob of Kubernetes that runs the recipe")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="with --kuberay: hand it to kubectl")] = False,
    image: Annotated[str, typer.Option("--image", help="with --kuberay: the image that Dockerfile builds")] = "",
    claim: Annotated[
        str, typer.Option("--claim", help="with --kuberay: volume claim, seen as /shared")
    ] = "otpo-shared",
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=1, help="with --kuberay: of a training node")
    ] = 8,
) -> None:
    """The same as a Ray job; submitted twice, it runs once."""
    from jobs.command_submission import COMMANDS
    from jobs.submit import submit as submit_recipe
    from jobs.submit import submit_command

    given = {
        "--apply": apply, "--image": image, "--address": address, "--follow": follow, "--python": python,
    }  # fmt: skip
    foreign = ("--address", "--follow", "--python") if kuberay else ("--apply", "--image")
    source = context.get_parameter_source("address")
    if source is not None and source.name == "ENVIRONMENT":
        del given["--address"]
    if wrong := [option for option in foreign if given.get(option)]:
        way = "Ray jobs, not for Kubernetes: leave it out, or --kuberay" if kuberay else "Kubernetes: add --kuberay"
        raise UserError(f"{wrong[0]} is for {way}.")
    if kuberay:
        _to_kubernetes(
            recipe, overrides or [], runs, shared or [], redo, verb,
            apply=apply, image=image, claim=claim, gpus_per_node=gpus_per_node,
        )  # fmt: skip
        return
    how: dict[str, Any] = {
        "address": address,
        "shared": shared or [],
        "python": python,
        "redo": redo,
        "follow": follow,
        "say": partial(stderr.print, markup=False, highlight=False, soft_wrap=True),
        "show_log": partial(print, end="", flush=True),
    }
    if verb in COMMANDS:
        words = [recipe, *(overrides or [])]
        commands: Any = context.find_root().command
        command = commands.commands[verb]
        if inner := getattr(command, "commands", None):  # `board add`
            one_of(f"--verb {verb}", words[0], *inner)
            command, verb, words = inner[words[0]], f"{verb} {words[0]}", words[1:]
        values = command.make_context(verb, list(words), parent=context.find_root()).params
        raise typer.Exit(submit_command(verb, words, values, **how))
    raise typer.Exit(submit_recipe(recipe, overrides or [], runs=runs, verb=verb, **how))


def _to_kubernetes(
    source: str,
    overrides: list[str],
    runs: str | None,
    shared: list[Path],
    redo: bool,
    verb: str,
    *,
    apply: bool,
    image: str,
    claim: str,
    gpus_per_node: int,
) -> None:
    from jobs.kuberay import VOLUME, name_of, rayjob
    from jobs.kuberay import apply as to_kubectl
    from jobs.submission import prepare
    from pipeline.recipe import load_recipe

    if not image:
        raise UserError("--image: expected the image that `docker build --tag REGISTRY/otpo:TAG .` made of Dockerfile.")
    job = prepare(
        load_recipe(source, overrides),
        runs=runs or f"{VOLUME}/runs",
        shared=[Path(VOLUME), *shared],
        python="python",
        redo=redo,
        verb=verb,
    )
    manifest = rayjob(job, image=image, claim=claim, gpus_per_node=gpus_per_node)
    if not apply:
        print(manifest, end="")
        return
    show(to_kubectl(manifest))
    show(f"Its log: kubectl logs -f job/{name_of(job)}. Its state: kubectl get rayjob {name_of(job)}")


def _run(source: str, overrides: list[str] | None, runs: str, redo: bool, until: str) -> None:
    from jobs.worlds import world_of
    from pipeline.recipe import load_recipe
    from pipeline.run.run import run as run_recipe
    from pipeline.storage.stored import run_folder

    recipe = load_recipe(source, overrides or [])
    with Bars(stderr) as bars, run_folder(runs, recipe.name, progress=bars.show) as place:
        done = run_recipe(recipe, place, world=world_of(recipe), progress=bars.show, until=until, redo=redo)
    if not done.did:
        console.print("Nothing to do: every stage is finished and its inputs are unchanged.")
    if until == "report" and done.folder.leaderboard.exists():
        from eval.board.leaderboard import read_leaderboard
        from eval.board.terminal import terminal_notes, terminal_table

        board = read_leaderboard(done.folder.leaderboard)
        console.print(terminal_table(board))
        for note in terminal_notes(board):
            show(note)
    trained = ["base", *recipe.methods] if recipe.base else recipe.methods
    for label in trained if until == "train" else []:
        console.print(f"{label}: {done.folder.model(label)}", soft_wrap=True, highlight=False)
    for note in done.notes:
        stderr.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if until == "report":
        console.print(f"Report: {done.folder.report}", soft_wrap=True, highlight=False)

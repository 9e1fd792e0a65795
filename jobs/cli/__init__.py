"""`otpo`: one command, a verb for each stage.

What a person types, for example:
    otpo run small_world
    otpo train recipe.yaml train.max_steps=50
    otpo judge model_outputs.json --reference reference.json --judge-url URL --judge-model NAME --out board
"""

from __future__ import annotations

import sys

import typer

from jobs.cli.board_verbs import board
from jobs.cli.data_verbs import data, fresh
from jobs.cli.doctor_verb import doctor
from jobs.cli.generate_verbs import generate, pairs
from jobs.cli.jobs_verb import jobs
from jobs.cli.judge_verbs import agreement, judge, rejudge, report
from jobs.cli.methods_verb import methods
from jobs.cli.options import in_flags
from jobs.cli.push_verb import push
from jobs.cli.recipe_verbs import plan, run, study, submit, sweep, train
from jobs.cli.terminal import stderr
from jobs.cli.weights_verb import weights
from jobs.machine_faults import outside_fault
from otpo.errors import UserError, WorkError
from pipeline.cluster.native_words import part_stderr
from pipeline.cluster.sudden_end import GOES_ON

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(__doc__ or "").split("\n")[0],
)
VERBS = (
    plan,
    run,
    train,
    sweep,
    study,
    submit,
    jobs,
    data,
    fresh,
    pairs,
    generate,
    judge,
    agreement,
    rejudge,
    report,
    weights,
    push,
    methods,
    doctor,
)
WITH_RECIPE = (plan, run, train, sweep, study, submit)
for verb in VERBS:
    app.command()(verb if verb in WITH_RECIPE else in_flags(verb))
app.add_typer(board, name="board")


def main() -> None:
    """Entry point: errors meant for people are printed as they are, without a traceback."""
    part_stderr()
    try:
        app()
    except UserError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except WorkError as error:
        stderr.print(f"failed: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        told = outside_fault(error)
        if told is None:
            raise
        stderr.print(f"failed: {told}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as exit:
        if exit.code != 130:  # typer's code for Ctrl-C
            raise
        stderr.print(f"Interrupted. {GOES_ON}", highlight=False)
        sys.exit(1)

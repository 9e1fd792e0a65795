"""The verb that pushes a trained model to the Hugging Face hub: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.terminal import say, show


def push(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    label: Annotated[str, typer.Argument(help="which of its trained models")],
    to: Annotated[str, typer.Option("--to", help="OWNER/NAME of the repository, which is made if it is not there")],
    public: Annotated[
        bool, typer.Option("--public", help="a repository that is made can be seen by everybody; else it is private")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch, made if it is not there", show_default=False)
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="for the card, such as apache-2.0", show_default=False)
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the adapters alone, in peft's format")] = False,
) -> None:
    """Push a trained model and its card to the Hugging Face hub. The token is read from HF_TOKEN."""
    from pipeline.hub.push import Target
    from pipeline.hub.push import push as push_model

    target = Target(to, public=public, revision=revision, license=license)
    show(push_model(run, label, target, adapter=adapter, say=say))

"""Options that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", help="where to write")]
ANOTHER_OUT = "choose another place with --out"
JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge-url", help="base URL of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1"),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="the judge's model as its server knows it")]
Template = Annotated[
    str,
    typer.Option(
        "--template",
        help="how prompts are rendered: chat (the tokenizer's chat template), literal (strings as they are), or auto"
        " (rows: messages by the chat template, strings literally; a model alone: as it was trained)",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="only the first prompts")]
MaxLength = Annotated[int, typer.Option("--max-length", help="most tokens of a prompt and one completion together")]
Workers = Annotated[int, typer.Option("--workers", help="engines, each in a process of its own")]
TopP = Annotated[float, typer.Option("--top-p", help="nucleus sampling: the probability mass that is sampled from")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="most tokens of an output")]
Seed = Annotated[int, typer.Option("--seed", help="seed of everything random")]

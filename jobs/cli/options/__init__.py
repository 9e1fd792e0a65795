"""Options that several verbs take."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from otpo.errors import UserError, WorkError
from otpo.files import is_address


def local(out: Path) -> Path:
    """A place of a file system.

    Raises:
        UserError: an address, which would become a folder of that name here.
    """
    if is_address(out):
        raise UserError(
            f"{out}: expected a path. Runs alone are kept at an address (--runs): write to a folder, and copy it."
        )
    return out


Out = Annotated[Path, typer.Option("--out", help="where to write", callback=local)]
ANOTHER_OUT = "choose another place with --out"
Template = Annotated[
    str,
    typer.Option(
        "--template",
        help="how prompts are rendered: chat (the tokenizer's chat template), literal (strings as they are), or auto"
        " (rows: messages by the chat template, strings literally; a model alone: as it was trained)",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="WHAT=COLUMN", show_default=False,
        help="which column is what, where its name does not say it: prompt=frage; `note=` leaves the column note out",
    ),
]  # fmt: skip
OutputColumn = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="WHAT=COLUMN", show_default=False,
        help="which column of the outputs is what, where its name does not say it: output=antwort; `note=` leaves the"
        " column note out; for the files that have such a column",
    ),
]  # fmt: skip
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs", metavar="JSON", show_default=False,
        help='variables of the chat template, for example \'{"enable_thinking": false}\'; by default those that the'
        " model was trained with here",
    ),
]  # fmt: skip
Rewritten = Annotated[
    str,
    typer.Option(
        "--rewritten",
        help="completions that the chat template rewrites: refuse, drop (leave the rows out), template (what it"
        " makes of them) or text (as written)",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="only the first prompts")]
MaxLength = Annotated[int, typer.Option("--max-length", help="most tokens of a prompt and one completion together")]
Workers = Annotated[int, typer.Option("--workers", help="engines, each in a process of its own")]
TopP = Annotated[float, typer.Option("--top-p", help="nucleus sampling: the probability mass that is sampled from")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="most tokens of an output")]
Seed = Annotated[int, typer.Option("--seed", help="seed of everything random")]


def columns_of(asked: Sequence[str] | None) -> dict[str, str | None]:
    """`--column` as `data.columns`.

    Raises:
        UserError: an option that is not WHAT=COLUMN.
    """
    pairs = [each.partition("=") for each in asked or ()]
    for what, equals, column in pairs:
        if not (what and equals):
            raise UserError(f"--column {what}{column}: expected WHAT=COLUMN, for example --column prompt=question")
    return {what: column or None for what, _, column in pairs}


def kwargs_of(asked: str | None) -> dict[str, Any] | None:
    """`--chat-template-kwargs` as `data.chat_template_kwargs`.

    Raises:
        UserError: no JSON object.
    """
    try:
        found = json.loads(asked) if asked else None
    except ValueError:
        found = asked
    if not isinstance(found, dict | None):
        raise UserError(f"--chat-template-kwargs: expected a JSON object such as '{{\"x\": false}}', found {asked!r}")
    return found


_MAPPING = re.compile(r"\b(?:data|judge)\.columns: \{([^:{}]+: [^{}]*)\}")
_KEY = re.compile(r"(?<!--set )\b(pairs\.scorer|generate|judge|data|pairs)\.([a-z_]+)(=?)")


def in_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb without a recipe: where an error names a key of a recipe, it says the option that sets it."""

    @wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except (UserError, WorkError) as error:
            options = _options_of(verb)
            said = _MAPPING.sub(_column, str(error)) if "--column" in options else str(error)
            said = _KEY.sub(partial(_option, options), said)
            raise type(error)(said).with_traceback(error.__traceback__) from error.__cause__

    return wrapped


def _options_of(verb: Callable[..., None]) -> set[str]:
    """The options that a verb declares. Typer has a context of its own, which click's does not know."""
    declared = get_type_hints(verb, include_extras=True).values()
    extras = [extra for each in declared for extra in getattr(each, "__metadata__", ())]
    # in an annotation, typer keeps an option's first name as its default
    names = [name for extra in extras for name in (extra.default, *(extra.param_decls or ()))]
    return {name for name in names if isinstance(name, str) and name.startswith("--")}


def _column(found: re.Match[str]) -> str:
    """`data.columns: {prompt: frage}` as `--column prompt=frage`, with an option for each column."""
    columns = [each.split(": ", 1) for each in re.split(r", (?=[^:,]+: )", found[1])]
    return " ".join("--column " + shlex.quote(f"{what}={'' if name == 'null' else name}") for what, name in columns)


def _option(options: set[str], found: re.Match[str]) -> str:
    """The option for a key of a recipe; the key itself where no option of the verb sets it."""
    section, key, equals = found.groups()
    name = key.replace("_", "-")
    option = next((each for each in (f"--{section}-{name}", f"--{name}") if each in options), None)
    if option is None and section == "judge" and "--set" in options:
        from eval.judge.config import JudgeConfig

        return f"--set {found[0]}" if key in JudgeConfig.model_fields else found[0]
    return found[0] if option is None else option + " " * bool(equals)

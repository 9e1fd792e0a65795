"""MkDocs hook: fills marked places of the pages from the code, so that a reference cannot lag behind it.

A line `<!-- generated: NAME -->` in a page becomes the Markdown that `GENERATED[NAME]` returns.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page."""
    return MARK.sub(lambda match: GENERATED[match[1]](), markdown)


# ---- methods ----


def methods_table() -> str:
    """A row for each method: its name, loss, weight rule and what it reads."""
    from otpo.methods import METHODS

    rows = ["| method | loss | token weights | reads, beside the policy |", "| --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        needs = ", ".join(sorted(method.needs)) or "nothing"
        rule = method.weight_rule.name if method.objective == "pair" else "none"
        rows.append(f"| [`{name}`](#{name}) | `{method.loss.name}` | `{rule}` | {needs} |")
    return "\n".join(rows)


def methods_reference() -> str:
    """A section for each method: formula, paper, note, hyperparameters."""
    from otpo.methods import METHODS
    from otpo.methods.describe import describe

    parts = []
    for title, chosen in FAMILIES.items():
        rows = [describe(method) for method in METHODS.values() if chosen(method)]
        notations = dict.fromkeys(row[key]["notation"] for row in rows for key in ("loss", "weight_rule") if row[key])
        parts += [f"## {title}", *(_text(notation) for notation in notations if notation), *map(_method, rows)]
    return "\n\n".join(parts)


FAMILIES: dict[str, Callable[[Any], bool]] = {
    "Pairs, against a reference": lambda m: m.objective == "pair" and "reference" in m.loss.needs,
    "Pairs, without a reference": lambda m: m.objective == "pair" and "reference" not in m.loss.needs,
    "Labelled completions": lambda m: m.objective == "unpaired",
    "Reward models": lambda m: m.objective == "reward",
}


def _method(row: dict[str, Any]) -> str:
    lines = [f"### {row['title']} {{ #{row['name']} }}", f"`{row['name']}` · [paper]({row['paper']})"]
    if row["note"]:
        lines.append(_text(row["note"]))
    lines.append(_function("Loss", row["loss"]))
    if row["weight_rule"]:
        lines.append(_function("Token weights", row["weight_rule"]))
    for each in row["hyperparameters"]:
        if each["of"] != "every method":
            lines.append(
                _key(each["name"], each["allowed"], _yaml(each["default"]), _sentence(each["meaning"]), of=row["name"])
            )
    return "\n\n".join(lines)


def _function(title: str, function: dict[str, str]) -> str:
    return f"{title}, `{function['name']}`: {_text(function['formula'])}"


def needs() -> str:
    """What a loss or a weight rule may read beside the policy."""
    from otpo.methods.registry.rows import NEEDS

    return "\n\n".join(f"`{name}`\n:   {_sentence(meaning)}" for name, meaning in NEEDS.items())


def shared_hyperparameters() -> str:
    """Those that every method takes."""
    from otpo.methods import SHARED

    return "\n\n".join(
        _key(each.name, each.allowed_text, _yaml(each.default), _sentence(each.meaning)) for each in SHARED.values()
    )


# ---- the recipe ----


def recipe_reference() -> str:
    """Every key of a recipe, section by section."""
    from eval.judge.config import PanelMember
    from pipeline.recipe.data import DatasetConfig
    from pipeline.recipe.recipe import Recipe
    from pipeline.recipe.sections import LoraConfig
    from pipeline.recipe.sweep import SweepRange

    parts = ["## Top level", _keys(Recipe, "", but={"name", *_sections(Recipe)} - {"name"})]
    for name, section in _sections(Recipe).items():
        parts += [f"## {name}", _first_line(section), _keys(section, f"{name}.")]
    parts += ["## A data set of a mix", _first_line(DatasetConfig), _keys(DatasetConfig, "data.datasets.NAME.")]
    parts += ["## model.lora", _first_line(LoraConfig), _keys(LoraConfig, "model.lora.")]
    parts += ["## A further judge of a panel", _first_line(PanelMember), _keys(PanelMember, "judge.panel.")]
    parts += ["## A range of a sweep", _first_line(SweepRange), _keys(SweepRange, "")]
    return "\n\n".join(parts)


def _sections(model: Any) -> dict[str, Any]:
    """Key -> pydantic model of the fields that are sections of their own."""
    from pydantic import BaseModel

    found = {}
    for name, field in model.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is not None:
            found[name] = section
    return found


def _keys(model: Any, prefix: str, but: set[str] | frozenset[str] = frozenset()) -> str:
    return "\n\n".join(
        _key(f"{prefix}{name}", _allowed(field), _default(field), field.description or "")
        for name, field in model.model_fields.items()
        if name not in but
    )


def _first_line(model: Any) -> str:
    return (model.__doc__ or "").split("\n\n")[0]


def _allowed(field: Any) -> str:
    """The type of a field in words, with its bounds."""
    words = " or ".join(_words(field.annotation))
    bounds = []
    for rule in field.metadata:
        for name, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if (value := getattr(rule, name, None)) is not None:
                bounds.append(f"{text} {value:g}")
    return " ".join([words, " and ".join(bounds)]).strip()


def _words(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            if argument is not type(None):
                yield from _words(argument)
    elif origin is list:
        choices = list(_words(arguments[0])) if typing.get_origin(arguments[0]) is typing.Literal else []
        yield f"a list of {', '.join(choices)}" if choices else "a list"
    elif origin is dict:
        yield "a mapping"
    elif origin is typing.Annotated:
        yield from _words(arguments[0])
    else:
        yield {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
            annotation, "a section"
        )


def _default(field: Any) -> str:
    from pydantic import BaseModel

    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    return "its own defaults" if isinstance(value, BaseModel) else _yaml(value)


def _yaml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`"


def _key(name: str, allowed: str, default: str, meaning: str, of: str = "") -> str:
    """One entry of a reference: a term that can be linked to, and its line."""
    anchor = f"{of}-{name}".strip("-").replace(".", "-")
    default = default if default == "needed" else f"default {default}"
    return f"[`{name}`](#{anchor}){{ #{anchor} .key }} {allowed}; {default}\n:   {meaning}"


def _sentence(text: str) -> str:
    text = _text(text).rstrip(".") + "."
    return text[:1].upper() + text[1:] if re.match(r"[a-z-]+[ ,:]", text) else text


def _text(text: str) -> str:
    """Plain text as Markdown: only its code spans mean anything."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]|])", r"\\\1", part) for part in parts)


# ---- other trainers ----


def other_trainers() -> str:
    """For each trainer a table: its keys, and what does the same here."""
    from pipeline.recipe.hints.lookup import TABLES

    parts = []
    for trainer, table in TABLES.items():
        answers: dict[str, list[str]] = {}
        for key, hint in table.items():
            answers.setdefault(hint.about or f"`{key}`", []).append(key)
        rows = ["| key | here |", "| --- | --- |"]
        rows += [f"| {', '.join(f'`{key}`' for key in keys)} | {_text(about)} |" for about, keys in answers.items()]
        parts += [f"## {trainer}", "\n".join(rows)]
    return "\n\n".join(parts)


# ---- data, judging, commands ----


def formats_table() -> str:
    """A row for each format that a data file may have."""
    from otpo.data.formats import FORMATS

    rows = ["| format | columns | what is read |", "| --- | --- | --- |"]
    for name, known in FORMATS.items():
        columns = ", ".join(f"`{column}`" for column in known.columns)
        rows.append(f"| `{name}` | {columns} | {known.about or _first_line(known.read)} |")
    return "\n".join(rows)


def protocols() -> str:
    """Every way of asking a judge, with its prompt as it is sent."""
    from eval.judge.protocols.registry import PROTOCOLS

    parts = []
    for protocol in PROTOCOLS.values():
        parts.append(f"### {protocol.name}\n\n{_sentence(protocol.about)}")
        if protocol.template:
            text = (ROOT / "eval" / "judge" / "prompts" / protocol.template).read_text("utf-8").strip()
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def commands() -> str:
    """Every verb with its arguments and options."""
    import typer

    from jobs.cli import app

    return "\n\n".join(_commands(typer.main.get_command(app), "##", ""))


def _commands(group: Any, level: str, before: str) -> Iterator[str]:
    """A section for each command of a group, with those of a command that is a group itself inside it."""
    for name, command in group.commands.items():
        words = f"{before}{name}"
        yield f"{level} otpo {words} {{ #{words.replace(' ', '-')} }}\n\n{(command.help or '').strip()}"
        yield from (_parameter(each) for each in command.params if each.name != "help")
        if hasattr(command, "commands"):
            yield from _commands(command, f"{level}#", f"{words} ")


def _parameter(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    term = ", ".join(parameter.opts) if option else (parameter.metavar or parameter.name.upper())
    kind = "flag" if getattr(parameter, "is_flag", False) else ""
    default = "" if kind else f"default {_yaml(parameter.default)}"
    if parameter.default is not None and not isinstance(parameter.default, bool | int | float | str):
        default = f"default `{parameter.default}`"
    words = "needed" if parameter.required else kind or default
    return f"`{term}` {words}\n:   {_sentence(parameter.help)}"


GENERATED: dict[str, Callable[[], str]] = {
    "methods-table": methods_table,
    "methods": methods_reference,
    "needs": needs,
    "shared-hyperparameters": shared_hyperparameters,
    "recipe": recipe_reference,
    "other-trainers": other_trainers,
    "formats": formats_table,
    "protocols": protocols,
    "commands": commands,
}

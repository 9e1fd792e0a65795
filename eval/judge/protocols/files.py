"""A user's own protocol: a YAML file with criteria, or with a prompt of their own for a protocol that is known.

    name: support
    template: support.txt          # beside this file; not needed where there are criteria
    criteria:
      correct: Every statement is true.
      polite: {asks: The tone is polite., points: 5, weight: 2}

    name: strict
    like: arena_hard               # its verdicts, orders and score
    template: strict.txt

A template is filled in one pass: what an output holds is never taken for a placeholder, and nothing in a template is
run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from eval.judge.protocols.protocol import Criterion, Kind, Protocol
from eval.judge.protocols.templates import CHATML, placeholders_of
from otpo.errors import UserError

_SUFFIXES = (".yaml", ".yml", ".json")
_NEEDED: dict[Kind, tuple[str, ...]] = {
    "pair": ("instruction", "output_1", "output_2"),
    "grades": ("instruction", "output_1", "output_2"),
    "rating": ("instruction", "output_1"),
    "criteria": ("instruction", "output_1", "criteria"),
}


class _Criterion(BaseModel):
    model_config = ConfigDict(extra="forbid")
    asks: str = Field(min_length=1)
    points: int | None = Field(None, ge=2, le=100)
    weight: float = Field(1.0, gt=0)


def _spelled_out(value: Any) -> Any:
    return {"asks": value} if isinstance(value, str) else value


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=60, pattern=r"^[\w .-]+$")
    like: str | None = None
    about: str = ""
    template: str | None = None
    criteria: dict[str, Annotated[_Criterion, BeforeValidator(_spelled_out)]] = Field(default_factory=dict)
    both_orders: bool | None = None
    max_tokens: int | None = Field(None, ge=1)


def is_file(name: str) -> bool:
    """Whether `judge.protocol` names a file in place of a protocol that is known."""
    return name.lower().endswith(_SUFFIXES)


def template_of(path: Path) -> Path | None:
    """The file of text that a protocol's file names as its template, if it names one."""
    try:
        tree = yaml.safe_load(_text(path, "judge.protocol"))
    except yaml.YAMLError:
        return None  # `read_protocol` says what is wrong with it
    named = tree.get("template") if isinstance(tree, dict) else None
    return Path(os.path.normpath(path.parent / named)) if isinstance(named, str) else None


def read_protocol(path: str | Path, known: Mapping[str, Protocol]) -> Protocol:
    """The protocol that a user's file describes.

    Args:
        path: of the file.
        known: what `like` may name.

    Raises:
        UserError: the file or its template cannot be read, a key is not one of them, `like` is not known, or the
            template does not show what the judge must see.
    """
    path = Path(path).expanduser()
    asked = _read(path, known)
    if asked.criteria:
        base = _of_criteria(asked)
    elif asked.like:
        base = known[asked.like]
    else:
        base = known["preference"]
    text = base.text
    if asked.template:
        text = _text(path.parent / asked.template, f"{path}: template")
        _check_template(text, base, f"{path}: {asked.template}")
    if asked.both_orders and base.single:
        raise UserError(f"{path}: both_orders: a judge that sees one output at a time has no orders; leave it out.")
    both_orders = base.both_orders if asked.both_orders is None else asked.both_orders
    if base.agreed and not both_orders:
        raise UserError(f"{path}: both_orders: {base.name} needs both orders; leave the key out.")
    found = replace(
        base,
        name=asked.name,
        about=asked.about or f"a protocol of your own ({path.name})",
        text=text,
        template=None if text is not None else base.template,
        max_tokens=asked.max_tokens or base.max_tokens,
        both_orders=both_orders,
        bare=base.bare and text is None,
    )
    decides = [base.name, text, both_orders, [[c.name, c.asks, c.points, c.weight] for c in found.criteria]]
    return replace(found, digest=hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8])


def _read(path: Path, known: Mapping[str, Protocol]) -> _File:
    try:
        tree = yaml.safe_load(_text(path, "judge.protocol"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: expected YAML, but {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys such as name and criteria, found {type(tree).__name__}.")
    try:
        asked = _File(**{str(key): value for key, value in tree.items()})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}. Known keys: {', '.join(_File.model_fields)}.") from None
    if asked.like is not None and asked.like not in known:
        raise UserError(f"{path}: like: expected one of {', '.join(known)}; found '{asked.like}'.")
    if asked.like is not None and asked.criteria:
        raise UserError(f"{path}: found criteria and like: criteria are a kind of verdict of their own; keep one.")
    if not asked.criteria and not asked.template:
        raise UserError(f"{path}: expected criteria, or a template (a file of text); found neither.")
    return asked


def _of_criteria(asked: _File) -> Protocol:
    return Protocol(
        asked.name,
        verdict="criteria",
        template="criteria.txt",
        max_tokens=1024,
        about=asked.about,
        reads=("json", "tool", "text"),
        criteria=tuple(Criterion(name, *_values(each)) for name, each in asked.criteria.items()),
    )


def _values(criterion: _Criterion) -> tuple[str, int | None, float]:
    return criterion.asks, criterion.points, criterion.weight


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: expected a text file (UTF-8) at {path}, found none: {error}") from None


def _check_template(text: str, base: Protocol, where: str) -> None:
    there = placeholders_of(text)
    if lacking := [name for name in _NEEDED[base.verdict] if name not in there]:
        raise UserError(
            f"{where}: expected the placeholders {', '.join('{' + name + '}' for name in _NEEDED[base.verdict])}; "
            f"{', '.join('{' + name + '}' for name in lacking)} is not there."
        )
    unasked = [grade.said for grade in base.grades if grade.said not in text]
    if unasked:
        raise UserError(f"{where}: expected every verdict that {base.name} reads to be named; {unasked[0]} is not.")
    if CHATML.search(text) and not text.lstrip().startswith("<|im_start|>"):
        raise UserError(f"{where}: a template in ChatML begins with <|im_start|>; found text before it.")

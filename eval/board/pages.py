"""Renders and writes pages with jinja2: everything is escaped, and a missing value is an error."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.board.numbers import number, signed
from otpo.files import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

# matplotlib's markers as SVG paths around (0, 0).
MARKER_PATHS = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "s": "M-4.5 -4.5h9v9h-9z",
    "^": "M0 -5.5L5.5 4.5h-11z",
    "D": "M0 -6L6 0L0 6L-6 0z",
    "v": "M0 5.5L5.5 -4.5h-11z",
    "P": "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "X": "M-5 -2.5L-2.5 -5L0 -2.5L2.5 -5L5 -2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0z",
    "h": "M0 -5.5L5 -2.8V2.8L0 5.5L-5 2.8V-2.8z",
}


TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **context: Any) -> str:
    """Fill a template of `templates/`. Everything but our own SVG and script is escaped."""
    return _environment().get_template(template).render(**context)


def write_page(path: Path, page: str) -> Path:
    """Write a page. Half a surrogate pair, which a model cut at its token limit may leave, becomes a question mark."""
    write_atomically(path, page, errors="replace")
    return path


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "breakable": _breakable, "sort_value": _sort_value}
    environment.globals["marker_path"] = lambda marker: MARKER_PATHS[marker]
    environment.globals |= {"script": _script, "script_hash": _script_hash}
    return environment


def _breakable(name: str) -> Markup:
    """A model's name that a narrow column breaks after its separators, not within a word; hyphens break anyway."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[_/:])|(?<=\.)(?!\d)", name))


def _sort_value(value: float | None) -> float | str:
    """What the script sorts a column by: a number, or nothing where it is not known."""
    return "" if value is None else value


@cache
def _script(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _script_hash(name: str) -> str:
    """As the page's policy names the one script that may run."""
    return base64.b64encode(hashlib.sha256(_script(name).encode()).digest()).decode()

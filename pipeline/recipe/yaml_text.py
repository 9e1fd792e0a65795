"""YAML that people write: safe, with numbers as people mean them, each key once, and errors in words of our own."""

from __future__ import annotations

import re
from typing import Any

import yaml

from otpo.errors import UserError

MERGE = "tag:yaml.org,2002:merge"

_WORDS = {
    r"found character '\t' that cannot start any token": "a tab: YAML indents with spaces alone, so use these",
    "mapping values are not allowed here": "a ':' where no key can be: indent like the lines above, or quote the value",
    "could not find expected ':'": "a key without a ':' behind it",
}
"""What PyYAML says -> what to do."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but for numbers as people write them.

    It reads `5e-7` as text, where people mean the number; and `010` as 8, `1:30` as 90 and `2024-01-01` as a date.
    These stay text here: a key for a number then takes 010 as 10, and a name may be any of them.
    """


_MISREAD = {"int", "float", "timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _MISREAD]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|-\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; None where it is empty.

    Args:
        where: what errors call the text.

    Raises:
        UserError: not YAML, a tag that is no plain value, or a key that stands twice.
    """
    loader = None
    try:
        loader = _Loader(text)  # refuses characters that cannot be in YAML
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, where, "", set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where} is not YAML{place}: {_WORDS.get(str(error.problem), error.problem)}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag such as !!int that the value is not
        raise UserError(f"{where} is not YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_keys(node: yaml.Node, where: str, path: str, seen: set[int]) -> None:
    """Refuse a key that stands twice in one mapping: YAML would let the last win without a word."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            _check_keys(item, where, path, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
            continue
        name = f"{path}.{key.value}" if path else str(key.value)
        line = key.start_mark.line + 1
        if name in lines:
            lines_of = f"lines {lines[name]} and {line}" if lines[name] != line else f"line {line}"
            raise UserError(
                f"{where}: the key '{name}' stands twice, in {lines_of}: remove one of the two, or rename it."
            )
        lines[name] = line
        _check_keys(value, where, name, seen)

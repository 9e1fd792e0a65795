"""A JSON object that holds rows, as rows: `{"data": [rows]}`, and the ways in which pandas writes a table."""

from __future__ import annotations

from typing import Any

OF_EACH_ROW = ("system", "system_prompt", "instruction", "instructions", "tools", "functions", "history")
"""Keys beside the rows that would belong to each of them."""


class NoRows(ValueError):
    """An object that holds no rows; the message says what it holds."""


def rows_of(found: dict[str, Any]) -> list[Any]:
    """The rows of an object, in their order.

    | object | rows |
    | --- | --- |
    | `{"data": [rows]}`, or any other key that alone holds a list of objects | this list |
    | `{"columns": [names], "data": [[cells], ...]}` | pandas' "split" |
    | `{"a": [cells], "b": [cells]}` | a row for each position |
    | `{"a": {"0": cell, ...}, "b": {"0": cell, ...}}` | pandas' "columns" |
    | `{"0": {"a": cell, ...}, "1": ...}` | pandas' "index" |

    Raises:
        NoRows: none of these, or a key beside the rows that no row would have.
    """
    names, data = found.get("columns"), found.get("data")
    if isinstance(names, list) and isinstance(data, list) and data and all(isinstance(row, list) for row in data):
        if any(len(row) != len(names) for row in data) or len({*map(str, names)}) < len(names):
            raise NoRows(f"expected a name of its own for each cell of a row of data, found the columns {names!s:.80}")
        return [dict(zip(map(str, names), row, strict=True)) for row in data]
    listed, cells = [key for key, value in found.items() if _are_objects(value)], list(found.values())
    if len(cells) > 1 and not listed and all(isinstance(value, list) for value in cells):
        if len({len(value) for value in cells}) > 1:
            raise NoRows(f"its columns differ in length: {_shown({k: len(v) for k, v in found.items()})}")
        return [dict(zip(found, row, strict=True)) for row in zip(*cells, strict=True)]
    held = "data" if isinstance(data, list) else listed[0] if len(listed) == 1 else None
    if held is not None:
        if lost := [key for key in OF_EACH_ROW if key != held and found.get(key)]:
            raise NoRows(f"the key {lost[0]} stands beside {held}, and no row would have it: write it into the rows")
        return found[held]
    if cells and all(isinstance(value, dict) for value in cells):
        if all(_is_number(key) for key in found):
            return cells
        numbers = list(dict.fromkeys(key for value in cells for key in value))
        if numbers and all(map(_is_number, numbers)):
            return [{name: column.get(number) for name, column in found.items()} for number in numbers]
    lists = f"several lists ({', '.join(map(_short, listed[:4]))})" if listed else f"an object with {_keys(found)}"
    raise NoRows(f'expected a list of rows or {{"data": [rows]}}, found {lists}')


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(each, dict) for each in value)


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdigit()


def _keys(found: dict[str, Any]) -> str:
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"the keys {', '.join(map(_short, list(found)[:8]))}{more}" if found else "no keys"


def _shown(lengths: dict[str, int]) -> str:
    return ", ".join(f"{_short(key)} {length}" for key, length in list(lengths.items())[:8])


def _short(key: str) -> str:
    line = " ".join(key.split())
    return line if len(line) <= 40 else f"{line[:40]}..."

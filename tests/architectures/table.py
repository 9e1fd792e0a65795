"""The sweep over all architectures, and its table in docs/architectures.md."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from otpo.errors import UserError

from .sweep import Differs, Row, check, quiet
from .tiny import tiny_config, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- begin: python -m tests.architectures --write -->", "<!-- end -->"


def run_sweep(names: Iterable[str], show: Callable[[str], object] = lambda line: None) -> list[Row]:
    """A row for each architecture; starts a process group of one where there is none."""
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, rows = init_device_mesh("cpu", (1,)), []
    try:
        for name in names:
            started = time.perf_counter()
            rows.append(sweep_one(name, mesh))
            row = rows[-1]
            show(f"{row.name:28} {row.outcome:10} {row.layout:15} {time.perf_counter() - started:5.1f} s  {row.words}")
    finally:
        if began:
            dist.destroy_process_group()
    return rows


def sweep_one(name: str, mesh) -> Row:
    """One architecture; whatever is neither equal nor refused in words is "wrong"."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_config(name)
            lm = tiny_model(config)
        except Exception as error:  # each config class has its own complaints
            return Row(name, "", "not built", words=_first_line(error))
        model = type(lm).__name__
        try:
            layout, remark = check(lm, Path(folder), mesh)
        except UserError as error:
            return Row(name, model, "refused", words=str(error).replace(folder, "PATH"))
        except Differs as error:
            return Row(name, model, "wrong", words=str(error))
        except Exception as error:
            return Row(name, model, "wrong", words=f"{type(error).__name__}: {_first_line(error)}")
        return Row(name, model, "equal", layout, remark)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    return _page_table({row.name: _line(row) for row in rows})


def _line(row: Row) -> str:
    words = row.words.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return f"| `{row.name}` | {row.model} | {row.outcome} | {row.layout} | {words} |"


def _page_table(lines: dict[str, str]) -> str:
    counts = Counter(line.split(" | ")[2] for line in lines.values())
    return "\n".join(
        [
            f"{', '.join(f'{counts[outcome]} {outcome}' for outcome in sorted(counts))}.",
            "",
            "| `model_type` | class | outcome | batches | remarks |",
            "| --- | --- | --- | --- | --- |",
            *(lines[name] for name in sorted(lines)),
        ]
    )


def written() -> str:
    """The table as the page has it."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def without_figures(text: str) -> str:
    """Refusals tell differences, whose last digits are another machine's; a set's order is any, and so is its error."""
    text = re.sub(r"(\| not built \|.*\|).*\|$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)


def write(rows: Sequence[Row]) -> str:
    """Put the rows into the page, in the place of earlier ones of the same names."""
    found = (line for line in written().splitlines() if line.startswith("| `") and "model_type" not in line)
    lines = {line.split("`")[1]: line for line in found} | {row.name: _line(row) for row in rows}
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{_page_table(lines)}\n\n{END}{rest.partition(END)[2]}")
    return f"{len(rows)} rows in {PAGE}"

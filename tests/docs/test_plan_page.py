"""The table of plans is what the commands beside it print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.plan.page import COLUMNS

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_what_the_commands_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "plan.md").read_text()
    header, _, *rows = re.findall(r"^\|.*\|$", page.split("## Llama 3")[1], re.MULTILINE)
    assert header == f"| model | {' | '.join(COLUMNS)} |"
    commands = re.findall(r"^otpo (plan .* --table)$", page, re.MULTILINE)
    assert len(commands) == len(rows) > 8
    for command, row in zip(commands, rows, strict=True):
        assert f"| {row.split('|', 2)[2].strip()}" == CliRunner().invoke(app, shlex.split(command)).output.strip()

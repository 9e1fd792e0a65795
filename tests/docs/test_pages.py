"""The pages name only commands, keys, paths and targets that exist, and fetch nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs.cli import app
from pipeline.recipe import Recipe, apply_overrides, load_recipe
from pipeline.recipe.sections import LoraConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
RECIPE_VERBS = {"plan", "run", "train", "sweep", "study", "submit"}
CODE = re.compile(r"^```\w*[^\n]*\n(.*?)^```$|`([^`\n]+(?:\n[^`\n]+)?)`", re.DOTALL | re.MULTILINE)


def code(page: Path) -> Iterator[str]:
    """Every fenced block and code span."""
    for block, span in CODE.findall(page.read_text()):
        yield block.replace("\\\n", " ") or span.replace("\n", " ")


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(page, verb, words) of every `otpo ...` in the pages."""
    for page in PAGES:
        for text in code(page):
            for verb, rest in re.findall(
                r"(?:^|\$ |; do |[A-Z_]+=\w+ )(?:\.venv/bin/)?otpo ([a-z]+)\b([^;|\n]*)", text, re.MULTILINE
            ):
                words = shlex.split(rest, comments=True)
                if "--" in words:  # what follows is the command of the job
                    end = words.index("--")
                    yield page.name, words[words.index("--verb") + 1], words[end + 1 :]
                    words = words[:end]
                yield page.name, verb, words


def all_verbs() -> dict[str, Any]:
    """Every command by its words, such as `judge` and `board add`."""
    found = {}
    for verb, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {})
        found |= {f"{verb} {name}": each for name, each in inner.items()} or {verb: command}
    return found


def known_key(key: str) -> bool:
    """Whether a dotted key can be set in some recipe."""
    parts = key.split(".")
    if parts[0] == "methods":
        return len(parts) in (2, 3)
    if parts[0] == "base":
        return parts[1:] == ["data"] or parts[-1] in TrainConfig.model_fields
    if parts[0] == "sweep" and parts[1:2] == ["params"]:
        return known_key(".".join(parts[2:]))
    if parts[0] in ("world", "generate") and parts[1:2] in (["seed"], ["tasks"]):
        return True
    model = Recipe
    for number, part in enumerate(parts):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return False
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((option for option in options if hasattr(option, "model_fields")), None)
        if model is None:
            return number == len(parts) - 1
    return True


def test_keys_are_told_from_what_is_none():
    assert all(
        map(known_key, ["train.seed", "model.lora.r", "pairs.scorer.url", "methods.a.reg", "world.seed", "name"])
    )
    assert not any(map(known_key, ["train.seeds", "model.lora.x", "trainer.seed", "train.seed.x"]))
    assert LoraConfig.model_fields.keys() >= {"r"}


def test_every_command_line_of_the_pages_parses():
    verbs = all_verbs()
    groups = {verb.split()[0] for verb in verbs if " " in verb}
    found = [
        (page, f"{verb} {words[0]}", words[1:]) if verb in groups and words else (page, verb, words)
        for page, verb, words in commands()
    ]
    assert len(found) > 20
    wrong = []
    for page, verb, words in found:
        if verb in groups and not words:  # the group itself
            continue
        if verb not in verbs:
            wrong.append(f"{page}: otpo {verb}")
            continue
        options = {name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            key, separator, _ = word.partition("=")
            if word.startswith("--") and key not in options:
                wrong.append(f"{page}: otpo {verb} {word}")
            elif separator and verb in RECIPE_VERBS and key != "key.path" and not known_key(key):
                wrong.append(f"{page}: otpo {verb} {word}")
    assert not wrong


def test_every_argument_and_option_says_what_it_is():
    verbs = all_verbs()
    silent = [f"{verb} {each.name}" for verb, command in verbs.items() for each in command.params if not each.help]
    assert not silent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_of_the_pages_is_one(page, tmp_path):
    for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if re.search(r"^name:", block, re.MULTILINE):
            (tmp_path / "recipe.yaml").write_text(block)
            assert load_recipe(tmp_path / "recipe.yaml").methods


def test_every_path_of_the_pages_exists():
    path = re.compile(r"(?<![\w/.])(?:otpo|pipeline|eval|jobs|tests|docs|\.ci)/[\w./*-]*[\w*]")
    named = {(page.name, name) for page in PAGES for text in code(page) for name in path.findall(text)}
    assert len(named) > 10
    assert not {(page, name) for page, name in named if not list(ROOT.glob(name))}


def test_every_target_of_the_pages_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    named = {name for page in PAGES for text in code(page) for name in re.findall(r"\bmake ([a-z][a-z-]*)", text)}
    missing = {name for name in named if not re.search(rf"^{name}:|^{name.split('-')[0]}-%:", makefile, re.MULTILINE)}
    assert named and not missing


def test_links_of_the_readme_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loads = re.compile(
        r"""(?:<(?:script|img|iframe|source)\b[^>]*\ssrc|<link\b[^>]*\shref)=["']?(https?://[^"'\s>]+)"""
    )
    for page in tmp_path.rglob("*.html"):
        assert not loads.findall(page.read_text()), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"""(?:@import|url\()\s*["']?(?:https?:)?//""", style.read_text()), style
    keys = (tmp_path / "recipe.html").read_text()
    for name in ("train.learning_rate", "judge.budget_usd", "model.lora.r", "sweep.params"):
        assert f'id="{name.replace(".", "-")}"' in keys
    assert "<!-- generated" not in "".join(page.read_text() for page in tmp_path.glob("*.html"))


def test_overrides_of_the_pages_make_recipes():
    """An override that a page shows for a shipped recipe is taken by it."""
    for page, verb, words in commands():
        if verb in RECIPE_VERBS and words and (ROOT / "jobs" / "recipes" / f"{words[0]}.yaml").is_file():
            overrides = [word for word in words[1:] if "=" in word and not word.startswith("--") and "$" not in word]
            assert load_recipe(words[0], overrides), page
            assert apply_overrides({}, overrides) is not None

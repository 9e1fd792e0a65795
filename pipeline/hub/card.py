"""The model card of a pushed model: what it was made from, how, and how it did on the board. It names no local path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from eval.board.leaderboard import read_leaderboard
from otpo.files import ROW_SUFFIXES
from pipeline.recipe import Recipe
from pipeline.run.folder import RunFolder
from pipeline.run.metrics import read_metrics

LOCAL = "a local folder"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(?<![\w/:.])(?:~|[A-Za-z]:)?[/\\][\w.@+~-]+(?:[/\\][\w.@+~ -]+)+")


@dataclass(frozen=True)
class Origin:
    """What the exported card says a model was made from. Local sources stand there as absolute paths.

    Attributes:
        start: hub name of the model that training started from; None for a local one.
        data: hub names of the data sets.
        files: how many data sets are files.
        rows: how many rows were used, in words.
    """

    start: str | None
    data: list[str]
    files: int
    rows: str


def origin(run: RunFolder, recipe: Recipe, label: str) -> Origin:
    """Where a label's model comes from, by the cards that training wrote."""
    card = _readme(run, label)
    start = _said(card, "Start and reference")
    if recipe.base and label != "base":  # trained here from the recipe's model, as the base's own card says
        start = _said(_readme(run, "base"), "Start and reference")
    sources, _, rows = _line(card, "Data").partition("`, ")
    data = [_hub_name(source) for source in sources.strip("`").split(", ")]
    return Origin(_hub_name(start), [name for name in data if name], data.count(None), rows)


def hub_card(run: RunFolder, recipe: Recipe, label: str, *, name: str, license: str | None, adapter: bool) -> str:
    """README.md of the repository.

    Args:
        name: of the repository, OWNER/NAME.
        license: as the hub names it; None leaves it out.
        adapter: whether the adapters alone are pushed.
    """
    made = origin(run, recipe, label)
    rewards = recipe.trains_rewards(label)
    method = None if label == "base" else recipe.method(label)
    kind = "sft" if method is None else "reward-model" if rewards else "preference-optimization"
    data = ModelCardData(
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if rewards else "text-generation",
        base_model=made.start,
        base_model_relation="adapter" if adapter else "finetune",
        datasets=made.data or None,
        tags=list(dict.fromkeys(["otpo", kind, *([method.method.name] if method else [])])),
    )
    title = "supervised training" if method is None else f"[{method.method.title}]({method.method.paper})"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name.split('/')[1]}",
        f"Trained by the OTPO pipeline with {title}, as the label `{label}` of the run `{recipe.name}`.",
        f"- Start{'' if rewards or method is None else ' and reference'}: {_link(made.start)}\n"
        f"- Data: {', '.join([_link(name, 'datasets/') for name in made.data] + ['a local file'] * made.files)}"
        + (f", {made.rows}" if made.rows else ""),
        *_board(run, label),
        *_evaluation(run, label),
        _sections(_readme(run, label)),
    ]
    return without_paths("\n\n".join(part for part in parts if part)) + "\n"


def without_paths(text: str) -> str:
    """The text with every absolute path replaced: a path names people and projects of the machine it comes from."""
    return _PATH.sub(f"({LOCAL})", text)


def _readme(run: RunFolder, label: str) -> str:
    file = run.model(label) / "README.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _line(card: str, name: str) -> str:
    """The rest of a line `- NAME: ...`."""
    found = re.search(rf"^- {name}: (.*)$", card, re.MULTILINE)
    return found[1] if found else ""


def _said(card: str, name: str) -> str:
    return _line(card, name).strip("`")


def _hub_name(source: str) -> str | None:
    file = source.endswith((*ROW_SUFFIXES, ".gz")) or Path(source).exists()
    return source if _HUB_NAME.fullmatch(source) and not file else None


def _link(name: str | None, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if name else LOCAL


def _sections(card: str) -> str:
    """What the exported card says from its settings on, and how to score with a reward model."""
    settings = card.find("## Settings")
    scoring = re.search(r"^- Scores a completion.*?(?=\n\n|\n##)", card, re.MULTILINE | re.DOTALL)
    return "\n\n".join(
        part for part in (scoring[0] if scoring else "", card[settings:].strip() if settings >= 0 else "") if part
    )


def _board(run: RunFolder, label: str) -> list[str]:
    """The label's rows of the leaderboard: quality with its interval, and beside it the length."""
    if not run.leaderboard.exists():
        return []
    table = read_leaderboard(run.leaderboard)
    rows = [row for row in table.to_dict("records") if row["name"] == label]
    if not rows:
        return []
    lines = [
        "| task | judge | against | win rate % | at equal length % | characters | length ratio | outputs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        adjusted = row["length_controlled_winrate"]
        equal = (
            _number(row["length_adjusted_winrate"], row["length_adjusted_low"], row["length_adjusted_high"])
            if _missing(adjusted)
            else f"{adjusted:.1f} ± {1.96 * row['lc_standard_error']:.1f} (AlpacaEval)"
        )
        judge = f"{_name(row['judge'])} ({row['protocol']})"
        lines.append(
            f"| {row['task']} | {judge} | {_name(row['reference'])}"
            f" | {_number(row['win_rate'], row['win_rate_low'], row['win_rate_high'])} | {equal}"
            f" | {_number(row['avg_length'])} | {_number(row['length_ratio'], digits=2)}"
            f" | {_number(row['n_total'], digits=0)} |"
        )
    note = "Brackets hold 95% intervals. The judge's preference is not a measure of truth."
    return ["## Board", "\n".join(lines), note]


def _evaluation(run: RunFolder, label: str) -> list[str]:
    """The last evaluation on held-out rows."""
    file = run.label(label).metrics
    lines = [line for line in read_metrics(file) if "eval_loss" in line] if file.exists() else []
    if not lines:
        return []
    names = [name for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins") if name in lines[-1]]
    figures = ", ".join(f"{name} {lines[-1][name]:.4f}" for name in names)
    return [f"On held-out rows, after step {lines[-1]['step']}: {figures}."]


def _number(value: Any, low: Any = None, high: Any = None, *, digits: int = 1) -> str:
    if _missing(value):
        return ""
    interval = "" if _missing(low) or _missing(high) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


def _missing(value: Any) -> bool:
    return value is None or value != value


def _name(value: Any) -> str:
    """A judge or reference by its name alone."""
    text = "" if _missing(value) else str(value)
    return text if _HUB_NAME.fullmatch(text) else re.split(r"[/\\]", text)[-1].replace("|", " ")

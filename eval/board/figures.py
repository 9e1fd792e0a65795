"""The page's pictures, drawn by matplotlib as inline SVG. Their text stays text and has the page's font."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from eval.front import on_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable under every common colour blindness, with a contrast of at least 4.5 on white. Marker and dash tell
# the labels apart too.
COLOURS = ("#0b62a4", "#c4500c", "#00805a", "#8a3d8f", "#8a6400", "#3b3f8f", "#b0305c", "#2f7f8f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES = ("", "6 2", "2 2", "8 2 2 2")
NEUTRAL = "#57606a"
INK, RULE = "#1f2328", "#d0d7de"
MANY_LABELS = 14
NAME_LENGTH = 32  # of a label; a longer one finds no place
NAMED_MARKS = 40  # beyond so many, only the models of the front get a label
RAMP = "Blues"
FRONT = {"win_rate": "max", "avg_length": "min"}  # a model is on it that no other beats with outputs as short
PICTURE = 256  # a larger transport plan is averaged down to so many entries a side

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


@dataclass(frozen=True)
class Style:
    """How a label looks everywhere on the page."""

    colour: str
    marker: str
    dash: str


def styles(labels: Sequence[str], neutral: Sequence[str] = ("base",)) -> dict[str, Style]:
    """The style of each label, by its place among the sorted labels. Labels in `neutral` are grey."""
    plain = sorted(set(labels) - set(neutral))
    found = {label: Style(NEUTRAL, "o", "1 2") for label in labels if label in neutral}
    for i, label in enumerate(plain):
        again = i // len(COLOURS)
        marker = MARKERS[(i + 3 * again) % len(MARKERS)]
        found[label] = Style(COLOURS[i % len(COLOURS)], marker, DASHES[(i + again) % len(DASHES)])
    return found


def svg(figure: Figure, label: str) -> str:
    """A figure as an `<svg>` element that scales with its container; `label` describes it to a screen reader."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        # The browser draws the text, so a glyph that matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message=".*Glyph.*missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    box = re.search(r'viewBox="([^"]+)"', text)
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{html.escape(label)}" class="plot"'
    return re.sub(r"<svg[^>]*>", head + ' xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)


def empty_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure in the page's style, sized in CSS pixels."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=NEUTRAL, labelsize=12, color=RULE, length=4)
    axes.grid(color="#eaeef2", linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def win_rate_against_length(
    board: pd.DataFrame, looks: Mapping[str, Style], width: int = 1000, height: int = 430
) -> str:
    """Win rate over mean length in characters; empty if nothing was judged.

    Filled marks are win rates with their intervals, hollow ones win rates at equal length. Steps join the models of
    the front of FRONT. Where there are too many to name, only those and the first ones are.

    Args:
        board: a leaderboard.
        looks: name -> its style.
        width: CSS pixels.
        height: CSS pixels.
    """
    rows = board[board["win_rate"].notna() & board["avg_length"].notna()]
    if rows.empty:
        return ""
    figure, axes = empty_figure(width, height)
    boxes: list[Box] = []
    front = on_front(rows, FRONT)
    reference = rows["reference_length"].dropna()
    if len(reference):
        axes.axvline(float(reference.iloc[0]), color=NEUTRAL, linestyle=(0, (4, 3)), linewidth=1)
    axes.axhline(50, color=NEUTRAL, linestyle=(0, (1, 2)), linewidth=1)
    for row in rows.to_dict("records"):
        look, x, y = looks[row["name"]], row["avg_length"], row["win_rate"]
        if not pd.isna(row["win_rate_low"]):
            axes.plot([x, x], [row["win_rate_low"], row["win_rate_high"]], color=look.colour, linewidth=2, alpha=0.55)
        controlled = row["length_controlled_winrate"]
        level = row["length_adjusted_winrate"] if pd.isna(controlled) else controlled
        if not pd.isna(level):
            axes.plot(x, level, look.marker, markersize=8, markerfacecolor="white", markeredgecolor=look.colour)
        axes.plot(x, y, look.marker, color=look.colour, markersize=9, markeredgecolor="white", markeredgewidth=0.8)
    steps = rows[front].sort_values("avg_length", kind="stable")
    axes.step(steps["avg_length"], steps["win_rate"], where="post", color=NEUTRAL, linewidth=1.2, alpha=0.6, zorder=1)
    low, high = axes.get_ylim()
    axes.set_ylim(max(-3, min(low, 44)), min(103, max(high, 56)))
    lengths = [*rows["avg_length"], *reference[:1]]
    span = (max(lengths) - min(lengths)) or max(lengths) or 1
    axes.set_xlim(max(0, min(lengths) - 0.12 * span), max(lengths) + 0.22 * span)
    axes.set_xlabel("Mean length of the outputs, characters", fontsize=13, color=INK)
    axes.set_ylabel("Win rate, %", fontsize=13, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixel = axes.transData.transform
    for row in rows.to_dict("records"):  # labels must not cover these
        x = row["avg_length"]
        for mark in ("win_rate", "length_adjusted_winrate", "length_controlled_winrate"):
            if not pd.isna(row[mark]):
                at_x, at_y = pixel((x, row[mark]))
                boxes.append((at_x - 8, at_y - 8, at_x + 8, at_y + 8))
        if not pd.isna(row["win_rate_low"]):
            (left, bottom), (_, top) = pixel((x, row["win_rate_low"])), pixel((x, row["win_rate_high"]))
            boxes.append((left - 3, bottom, left + 3, top))
    lines: list[Box] = []
    if len(reference):
        line_x, floor = pixel((float(reference.iloc[0]), axes.get_ylim()[0]))
        lines.append((line_x - 3, 0.0, line_x + 3, float(height)))
    for i, row in enumerate(rows.to_dict("records")):
        if i >= NAMED_MARKS and not front[i]:
            continue
        x, y = pixel((row["avg_length"], row["win_rate"]))
        text = _shortened(str(row["name"])) if len(rows) <= MANY_LABELS else str(i + 1)
        for obstacles in ([*boxes, *lines], boxes):  # better over the line than far from its mark
            if box := _write(axes, obstacles, x, y, text, looks[row["name"]].colour, 13, reach=width / 8):
                boxes.append(box)
                break
    if len(reference):
        _write(axes, boxes, line_x, floor + 10, "length of the reference", NEUTRAL, 12)
    for end in (1, 0):
        x, y = pixel((axes.get_xlim()[end], 50))
        if _write(axes, [*boxes, *lines], x, y + 9, "50%: as good as the reference", NEUTRAL, 12):
            break
    return svg(figure, _points_in_words(rows))


def _write(
    axes: Axes, boxes: Sequence[Box], x: float, y: float, text: str, colour: str, size: int, reach: float = 60
) -> Box | None:
    """Write `text` near a point where it covers no box; gives its box, or None if there is no place within `reach`.

    Positions and sizes are in pixels.
    """
    wide, tall = 0.6 * size * len(text), 1.15 * size
    frame = axes.get_window_extent()
    box = free_place(boxes, (frame.x0, frame.y0, axes.figure.bbox.width, frame.y1), x, y, wide, tall)
    if box is None or abs((box[1] + box[3]) / 2 - y) > reach:
        return None
    left, middle = box[0] + 2, (box[1] + box[3]) / 2
    pixels = axes.transData.inverted()
    if abs(middle - y) > 14 or (abs(left - x) > 30 and abs(left + wide - x) > 30):
        end = left - 3 if left > x else left + wide + 3
        line = pixels.transform([(x, y), (end, middle)])
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.8, alpha=0.6)
    # The browser's font may be wider than the estimate: the end beside the point is the one that stays.
    side, end = ("left", left) if left > x else ("right", left + wide)
    at = pixels.transform((end, middle))
    look = {"color": colour, "fontsize": size, "fontweight": "bold", "va": "center_baseline", "ha": side}
    axes.text(at[0], at[1], text, parse_math=False, **look)  # type: ignore[arg-type]
    return box


def free_place(boxes: Sequence[Box], frame: Box, x: float, y: float, wide: float, tall: float) -> Box | None:
    """The nearest place for a label beside (x, y), inside `frame` and over no box; None if there is none.

    Args:
        boxes: what is there already.
        frame: where labels may go.
        x: of the point to label.
        y: of the point to label.
        wide: width of the label.
        tall: height of the label.
    """
    offsets = np.array([0, *(sign * step for step in range(8, 400, 8) for sign in (1, -1))], dtype=float)
    gaps, rows = np.array([13.0, 40.0, 70.0]), np.repeat(offsets, 3)
    away = np.tile(gaps, len(offsets)) + np.abs(rows) / 8
    left, middle = np.concatenate([x + away, x - away - wide]), y + np.tile(rows, 2)
    anchor = np.where(left > x, x, x - wide)
    order = np.argsort(np.hypot(left - anchor, middle - y), kind="stable")
    left, middle = left[order], middle[order]
    places = np.stack([left - 2, middle - tall / 2, left + wide + 2, middle + tall / 2], axis=1)
    free = (places[:, :2] >= frame[:2]).all(axis=1) & (places[:, 2:] <= frame[2:]).all(axis=1)
    if len(boxes):
        other = np.array(boxes, dtype=float)
        apart = (places[:, None, :2] >= other[None, :, 2:]) | (places[:, None, 2:] <= other[None, :, :2])
        free &= np.all(np.any(apart, axis=2), axis=1)
    if not free.any():
        return None
    left_end, bottom, right_end, top = places[free.argmax()].tolist()
    return left_end, bottom, right_end, top


def _points_in_words(rows: pd.DataFrame) -> str:
    points = [f"{r['name']} {r['win_rate']:.1f}% at {r['avg_length']:,.0f}" for r in rows.to_dict("records")]
    return "Win rate against mean length in characters: " + "; ".join(points) + ". The table above has all numbers."


def plan_heatmap(
    plan: Any, chosen: Sequence[str], rejected: Sequence[str], words: str, *, named: bool = True
) -> tuple[str, int]:
    """A transport plan as a heat map, chosen tokens down and rejected ones across.

    Args:
        plan: (m, n) mass.
        chosen: (m,) tokens.
        rejected: (n,) tokens.
        words: the description for a screen reader.
        named: write each token beside its row or column. Otherwise the axes count tokens, and a large plan is averaged
            down.

    Returns:
        The picture, and the width in pixels at which it is readable.
    """
    mass = np.asarray(plan, dtype=float)
    m, n = mass.shape
    cell = (24 if max(m, n) <= 30 else 15) if named else 600 / max(m, n)
    width = round((240 if named else 170) + cell * n)
    figure, axes = empty_figure(width, (130 if named else 70) + max(70, cell * m))
    mesh = axes.imshow(
        block_means(mass, PICTURE), cmap=RAMP, vmin=0, aspect="auto", interpolation="none", extent=(0, n, m, 0)
    )
    axes.grid(False)
    if named:
        axes.set_yticks(np.arange(m) + 0.5, [_literal(t) for t in chosen], fontsize=12, color=INK)
        axes.set_xticks(np.arange(n) + 0.5, [_literal(t) for t in rejected], fontsize=12, rotation=90, color=INK)
        axes.hlines(np.arange(1, m), 0, n, color="white", linewidth=0.6)
        axes.vlines(np.arange(1, n), 0, m, color="white", linewidth=0.6)
    axes.set_ylabel("chosen", fontsize=12, color=INK)
    axes.set_xlabel("rejected", fontsize=12, color=INK)
    bar = figure.colorbar(mesh, ax=axes, shrink=min(1.0, 300 / max(70, cell * m)), aspect=12)
    bar.set_label("mass", fontsize=12, color=INK)
    bar.ax.tick_params(labelsize=11, colors=NEUTRAL)
    return svg(figure, words), width


def heat_image(values: Any, top: float) -> str:
    """A matrix as the data URI of a small picture, one pixel an entry: white at 0, darkest at `top` and above."""
    from matplotlib.image import imsave

    # 32 shades take half the bytes of 256 and look the same at this size.
    shades = np.round(31 * np.clip(np.atleast_2d(np.asarray(values, dtype=float)) / (top or 1.0), 0, 1)) / 31
    buffer = io.BytesIO()
    imsave(buffer, shades, cmap=RAMP, vmin=0, vmax=1, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def orders_image(better: np.ndarray) -> str:
    """(m, m) whether the row is better than the column, as the data URI of a picture, one pixel an entry."""
    from matplotlib.image import imsave

    shades = np.full((*better.shape, 3), 232, dtype=np.uint8)
    shades[better], shades[better.T] = (11, 98, 164), (226, 134, 84)
    buffer = io.BytesIO()
    imsave(buffer, shades, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def block_means(values: Any, most: int) -> Any:
    """A matrix averaged over blocks, so that neither side has more than `most` entries."""
    for axis in (0, 1):
        size = values.shape[axis]
        if size > most:
            starts = np.arange(most) * size // most
            totals = np.add.reduceat(values, starts, axis=axis)
            values = totals / np.expand_dims(np.diff([*starts, size]), 1 - axis)
    return values


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}\N{HORIZONTAL ELLIPSIS}"


def _literal(token: str) -> str:
    """A token as the text of a tick: without mathematics mode or line breaks, and not too long."""
    text = str(token).replace("\n", "\\n").replace("$", r"\$").strip() or "(space)"
    return text if len(text) <= 16 else text[:15] + "..."

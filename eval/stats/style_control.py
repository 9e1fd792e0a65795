"""Win rates with the style of the outputs held equal: how long they are and how much Markdown they have.

A logistic regression over all models of a board, in the manner of LMSYS's style control for Arena: the logit that model
m wins a game is c_m + b x, with x the differences in style to the reference's output, and b common to all models. The
score is that of outputs in the reference's own style, sigmoid(c_m). Differences are scaled and not centred: 0 is equal
style, whatever style the models have on average.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.stats.intervals import Interval, Z

FEATURES = ("length", "headers", "lists", "bold")
# Weights of the penalty on b, and of half a win and half a loss of each model in the reference's style: without them a
# model that wins every game, or a board on which style decides every game, would have no estimate.
SLOPE_RIDGE, HALF_GAME = 0.04, 0.5

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


@dataclass(frozen=True)
class Games:
    """The n games of one model.

    Attributes:
        won: (n,) in [0, 1]; NaN where there is no verdict.
        weight: (n,) how often each counts.
        style: (n, 4) differences in FEATURES (`style_differences`).
        prompt: (n,) numbers of the prompts, common to all models.
    """

    won: np.ndarray
    weight: np.ndarray
    style: np.ndarray
    prompt: np.ndarray


def style_of(text: str) -> np.ndarray:
    """(4,) words of a text, and its headers, list items and bold parts per word, none of which is counted in code."""
    words, prose = len(text.split()), _CODE.sub("", text)
    counts = [len(pattern.findall(prose)) for pattern in (_HEADER, _ITEM, _BOLD)]
    return np.array([words, *(count / (words + 1) for count in counts)])


def style_differences(ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
    """(n, 4) differences in style, each as (a - b) / (a + b), 0 where neither output has any."""
    a, b = (np.array([style_of(text) for text in side]).reshape(-1, len(FEATURES)) for side in (ours, theirs))
    whole = a + b
    return np.divide(a - b, whole, out=np.zeros_like(a), where=whole > 0)


def style_controlled(games: Mapping[str, Games]) -> dict[str, tuple[float | None, Interval]]:
    """The score of each model if its outputs had the reference's style, in percent, with a 95 % interval.

    The interval is that of the sandwich estimate clustered by prompt (Liang and Zeger 1986,
    doi:10.1093/biomet/73.1.13), on the scale of the logit: the games of a prompt, of any model, are not independent.

    Args:
        games: model -> its games, all against one reference.

    Returns:
        Model -> score and interval; None without a verdict.
    """
    names = [name for name, own in games.items() if (~np.isnan(own.won)).any()]
    nothing: dict[str, tuple[float | None, Interval]] = {
        name: (None, Interval(None, None, "no verdict came back")) for name in games
    }
    if not names:
        return nothing
    m, k = len(names), len(FEATURES)
    rows, won, weight, prompt = [], [], [], []
    for i, name in enumerate(names):
        own, known = games[name], ~np.isnan(games[name].won)
        one = np.zeros((int(known.sum()), m))
        one[:, i] = 1.0
        rows.append(np.hstack([one, own.style[known]]))
        won.append(own.won[known])
        weight.append(own.weight[known])
        prompt.append(own.prompt[known])
    x, y, w, of = np.vstack(rows), np.concatenate(won), np.concatenate(weight), np.concatenate(prompt)
    spread = x[:, m:].std(axis=0)
    # Equal numbers have a spread of rounding errors, and by one below 1e-6 the equations could not be solved.
    varied = spread > 1e-6 * np.abs(x[:, m:]).max(axis=0)
    x[:, m:] = np.where(varied, x[:, m:] / np.where(varied, spread, 1.0), 0.0)
    fitted, errors = _fit(x, y, w, of, m, k)
    found = dict(nothing)
    for i, name in enumerate(names):
        low, high = (100 * _sigmoid(fitted[i] + sign * Z * errors[i]) for sign in (-1, 1))
        found[name] = (float(100 * _sigmoid(fitted[i])), Interval(float(low), float(high)))
    return found


def _fit(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, prompt: np.ndarray, m: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(m + k,) parameters by Newton's method, and their standard errors clustered by prompt."""
    theta = np.zeros(m + k)
    # Half a game at p = sigmoid(c), won by half: its gradient is 1/2 - p, its curvature p (1 - p).
    ridge = np.concatenate([np.zeros(m), np.full(k, SLOPE_RIDGE)])
    for _ in range(100):
        p, middle = _sigmoid(x @ theta), _sigmoid(theta[:m])
        gradient = x.T @ (w * (y - p)) - ridge * theta
        gradient[:m] += 2 * HALF_GAME * (0.5 - middle)
        curvature = (x * (w * p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        curvature[range(m), range(m)] += 2 * HALF_GAME * middle * (1 - middle)
        step = np.clip(np.linalg.solve(curvature, gradient), -2.0, 2.0)
        theta += step
        if np.abs(step).max() < 1e-10:
            break
    own = np.zeros((int(prompt.max()) + 1, m + k))
    np.add.at(own, prompt, x * (w * (y - _sigmoid(x @ theta)))[:, None])
    # What half a win and half a loss of each model would have added: errors do not collapse where all games are alike.
    middle = _sigmoid(theta[:m])
    extra = np.zeros((2 * m, m + k))
    extra[range(m), range(m)] = math.sqrt(HALF_GAME) * (1 - middle)
    extra[range(m, 2 * m), range(m)] = -math.sqrt(HALF_GAME) * middle
    n = len(np.unique(prompt))
    meat = (own.T @ own + extra.T @ extra) * (n / (n - 1) if n > 1 else 1.0)
    bread = np.linalg.inv(curvature)
    return theta, np.sqrt(np.diag(bread @ meat @ bread))


def _sigmoid(z: npt.ArrayLike) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(np.asarray(z, dtype=float), -40, 40)))

"""Iterations of the solver of optimal transport, and what POT's cannot solve. Loads no torch: it checks recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from otpo.errors import UserError

MOST = 100_000  # of one micro-batch: minutes, where the paper's settings take 26
LARGEST_COST_OF_POT = 700.0  # in units of reg: POT takes exp(-cost / reg), which float64 loses from about 708 on


def iterations_for(tol: float, reg: float, reg_m: float) -> int:
    """Sinkhorn iterations after which the log-potentials' error has shrunk by `tol`.

    One iteration contracts it by (reg_m / (reg + reg_m))^2 in the sup norm.
    """
    return max(1, math.ceil(math.log(tol) / (2 * math.log(reg_m / (reg + reg_m)))))


def check_iterations(label: str, settings: Mapping[str, Any]) -> None:
    """Refuse hyperparameters of a label with which the solver would run for minutes to hours in each micro-batch.

    Raises:
        UserError: says how many iterations they take.
    """
    if "reg_m" not in settings or settings["iterations"]:
        return
    tol, reg, reg_m = (float(settings[name]) for name in ("tolerance", "reg", "reg_m"))
    contraction = 2 * math.log1p(reg / reg_m)  # as in `iterations_for`, but for ratios that float64 cannot tell from 1
    if contraction < -math.log(tol) / MOST:
        count = -math.log(tol) / contraction if contraction else math.inf
        told = f"{count:,.0f}" if math.isfinite(count) else "endless"
        raise UserError(
            f"methods.{label}: reg {reg:g} beside reg_m {reg_m:g} takes {told} iterations of the solver in each"
            f" micro-batch to reach tolerance {tol:g}, and {MOST:,} are the most: raise reg, lower reg_m, or say how"
            " many are enough (iterations)."
        )


def check_pot(label: str, settings: Mapping[str, Any]) -> None:
    """Refuse a `reg` with which POT's solver gives no plan, where it is known before any cost: normalised ones reach 1.

    Raises:
        UserError: says the least `reg`.
    """
    if settings.get("solver") == "pot" and settings["normalizer"] != "none":
        if settings["reg"] * LARGEST_COST_OF_POT < 1:
            raise UserError(f"methods.{label}: {not_by_pot(float(settings['reg']), 1.0)}")


def not_by_pot(reg: float, cost: float) -> str:
    """What to do where costs reach `cost` and POT would give zeros or NaN for a plan."""
    least = math.ceil(1e4 * cost / LARGEST_COST_OF_POT) / 1e4
    return (
        f"solver: pot gives no plan at reg {reg:g} where costs reach {cost:.3g}: it takes exp(-cost / reg), which"
        f" leaves float64's range (a reg of about {least:g} is the least). Take `solver: batched`, which works with"
        " logarithms, or raise reg."
    )

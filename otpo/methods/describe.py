"""A method's row as plain data: what `otpo methods NAME` prints and the reference page is made from."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from otpo.methods.registry import SHARED
from otpo.methods.registry.rows import NEEDS, Method


def describe(method: Method) -> dict[str, Any]:
    """Everything that the registry says about a method, ready for JSON or a template.

    Imports torch, because the formulas are the first paragraphs of the docstrings of the loss and of the weight rule.

    Returns:
        `name, title, paper, note, objective, means` as in `Method`, and
        `loss`, `weight_rule`: each `{name, path, formula, notation}`; `path` is "module:function", `notation` explains
            the formula's symbols ("" where it needs none); `weight_rule` is None where the loss reads no token weights;
        `needs`: `{name: meaning}` of what is read beside the policy's log-probabilities;
        `hyperparameters`: a list of `{name, default, allowed, meaning, of}` in the order of the method's own, then
            those that every method takes; `allowed` is text, `of` is "loss", "weights", "both" or "every method".
    """
    of_loss = {each.name for each in method.loss.hyperparameters}
    of_rule = {each.name for each in method.weight_rule.hyperparameters}

    def belongs(name: str) -> str:
        return "both" if name in of_loss & of_rule else "loss" if name in of_loss else "weights"

    owned = [(each, belongs(name)) for name, each in method.hyperparameters.items()]
    owned += [(each, "every method") for each in SHARED.values()]
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "note": method.note,
        "objective": method.objective,
        "means": method.means,
        "loss": _function(method.loss.function),
        "weight_rule": _function(method.weight_rule.function) if method.objective == "pair" else None,
        "needs": {name: NEEDS[name] for name in sorted(method.loss.needs | method.weight_rule.needs)},
        "hyperparameters": [
            {
                "name": each.name,
                "default": each.default,
                "allowed": each.allowed_text,
                "meaning": each.meaning,
                "of": of,
            }
            for each, of in owned
        ],
    }


def _function(function: Callable[..., Any]) -> dict[str, str]:
    module = sys.modules[function.__module__]
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")
    return {
        "name": function.__name__,
        "path": f"{function.__module__}:{function.__name__}",
        "formula": _one_line((inspect.getdoc(function) or "").split("\n\n")[0]),
        "notation": _one_line(next((text for text in paragraphs if text.startswith("Notation:")), "")),
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())

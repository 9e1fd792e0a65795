"""Runs: recipes and their stages, on Ray.

    from pipeline import load_recipe, make_recipe, open_run, run_recipe

    results = run_recipe(load_recipe("my_recipe.yaml"))
    results.leaderboard

All are loaded when they are first used, so that `import pipeline` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.notebook import Recipe, Results, load_recipe, make_recipe, open_run, run_recipe

__all__ = ["Recipe", "Results", "load_recipe", "make_recipe", "open_run", "run_recipe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}; it has {', '.join(__all__)}")
    import pipeline.notebook

    return getattr(pipeline.notebook, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

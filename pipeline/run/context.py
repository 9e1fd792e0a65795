"""What every stage of a run is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from eval.judge.budget import Spending
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.run.engines import Engines
from pipeline.run.folder import RunFolder
from pipeline.run.manifest import Manifest
from pipeline.run.sources import Sources
from pipeline.run.world import World


@dataclass(frozen=True)
class RunContext:
    """One call of a run.

    Attributes:
        folder: where everything is.
        manifest: what is done, and from which inputs.
        sources: what the recipe's names stand for.
        engines: what generates.
        world: what the recipe's `world:` values stand for, if it has any.
        spending: what the judges of all stages have cost.
        notes: sentences for the person at the end, about what is finished but not whole.
    """

    recipe: Recipe
    folder: RunFolder
    manifest: Manifest
    sources: Sources
    engines: Engines
    progress: Progress
    world: World | None
    spending: Spending = field(default_factory=Spending)
    notes: list[str] = field(default_factory=list)

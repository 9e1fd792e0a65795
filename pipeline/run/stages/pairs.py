"""On-policy preference pairs from the base, if the recipe asks for them."""

from __future__ import annotations

from otpo.identity import source_identity
from pipeline.recipe import identity
from pipeline.run.context import RunContext
from pipeline.run.inputs import engine_inputs
from pipeline.run.judges import own_model_inputs, ready_judge


def pairs(run: RunContext) -> None:
    """Sample completions from the base, have them scored, pair best against worst.

    Raises:
        UserError: settings that cannot be used.
        WorkError: an engine or the judge failed, or no pair came of it; what was finished is kept.
    """
    settings, manifest = run.recipe.pairs, run.manifest
    if settings is None:
        return
    prompts = run.sources.resolve(settings.prompts)
    inputs = {
        "pairs": {key: value for key, value in (identity(run.recipe)["pairs"] or {}).items() if key != "prompts"},
        "prompts": source_identity(prompts),
        "base": manifest.inputs["base"],
        "engine": engine_inputs(run.recipe, run.sources.generation_template),
        **own_model_inputs(run, settings.scorer),
    }
    if not manifest.needs("pairs", inputs):
        return
    from eval.tasks import load_task
    from pipeline.generate.engine import Sampling
    from pipeline.generate.pairs import sample_pairs

    names = ("temperature", "top_p", "max_tokens", "n", "seed")
    sampling = Sampling(**{name: getattr(settings, name) for name in names})
    out = run.folder.pairs
    manifest.begin("pairs", inputs, [out])
    with manifest.doing("pairs", inputs, [out]) as figures, ready_judge(run, settings.scorer) as judge:
        figures["report"] = sample_pairs(
            run.sources.start.path,
            load_task(prompts, "pairs", settings.limit),
            sampling,
            run.engines.pool(),
            judge,
            out,
            per_prompt=settings.per_prompt,
            template=run.sources.generation_template,
            progress=run.progress,
        )

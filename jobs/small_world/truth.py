"""What only a known truth allows to measure: whether outputs are right, how long they are, which tokens have weight.

`measure` writes `world.json` into a run's folder. Intervals are 95 % percentile bootstraps over entities (over pairs
for the weights): questions about one entity are right or wrong together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.small_world import world as small_world
from jobs.small_world.world import Item, World, read
from pipeline.run.folder import RunFolder

if TYPE_CHECKING:
    from otpo.methods.spec import MethodSpec

NOTE = (
    "A controlled experiment in a small world whose truth is known: real facts and invented posts, a model of half a "
    "million parameters made on the spot, and a judge that is a program. It shows what the methods do where everything "
    "can be checked; it is not evidence about large models."
)
REGS = (1.0, 0.3, 0.1, 0.03)
MOST_PAIRS = 300
SAMPLES = 2000

Row = dict[str, Any]


def measure(run: RunFolder, labels: Sequence[str], methods: dict[str, MethodSpec] | None = None) -> dict[str, Any]:
    """Measure a run against its world and write `world.json`.

    Args:
        run: the run's folder, with the world, the labels' outputs and, for the weights, the sampled pairs.
        labels: models to measure; the one called "base" is what the others are compared with.
        methods: the methods behind the labels; each that weights tokens, and reads no other model than the policy to do
            so, has its weights measured with its own settings too.

    Returns:
        What was written: `note`; `accuracy` label -> part -> {value, low, high, n}; `gain` the same for the difference
        to the base on the same questions; `words` label -> part -> mean words; `deciding_token` rows {label, reg, auc,
        auc_low, auc_high, ratio, n}. Parts are "trained" and "held_out" (facts) and "summaries_..." of these.
    """
    world = small_world.load(run.world / "truth.json")
    results = {label: read_outputs(world, _outputs(run, label)) for label in labels}
    report: dict[str, Any] = {"note": NOTE, **compare(results)}
    base = next((path for path in (run.model("base"), run.world / "model") if path.is_dir()), None)
    report["deciding_token"] = []
    if base and run.pairs.is_file():
        report["deciding_token"] = weights_of_pairs(world, run.pairs, base, methods or {})
    run.known_truth.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def read_outputs(world: World, outputs: Iterable[Row]) -> list[Row]:
    """A row for each output to a question of this world: {part, entity, instruction, right, words}."""
    items = {question: item for item in world.items for question in item.questions()}
    rows = []
    for output in outputs:
        item = items.get(output["instruction"])
        if item is not None:
            reading = read(output["output"], item.truth, world.words)
            row = {"part": _part(item), "entity": item.entity, "instruction": output["instruction"]}
            rows.append(row | {"right": float(reading.right), "words": reading.words})
    return rows


def compare(results: dict[str, list[Row]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`accuracy`, `gain` and `words` of `measure`, from the rows of `read_outputs` of each label."""
    report: dict[str, dict[str, Any]] = {"accuracy": {}, "gain": {}, "words": {}}
    base = {row["instruction"]: row["right"] for row in results.get("base", [])}
    for label, rows in results.items():
        parts = {part: [row for row in rows if row["part"] == part] for part in sorted({row["part"] for row in rows})}
        # Trained before held-out, facts before summaries: as a reader expects them.
        parts = dict(sorted(parts.items(), key=lambda item: ("summaries" in item[0], "held_out" in item[0])))
        for part, members in parts.items():
            entities = [row["entity"] for row in members]
            right = [row["right"] for row in members]
            report["accuracy"].setdefault(label, {})[part] = interval(right, entities, seed)
            report["words"].setdefault(label, {})[part] = round(float(np.mean([row["words"] for row in members])), 2)
            if label != "base" and all(row["instruction"] in base for row in members):
                change = [row["right"] - base[row["instruction"]] for row in members]
                report["gain"].setdefault(label, {})[part] = interval(change, entities, seed)
    return report


def interval(values: Sequence[float], groups: Sequence[Any], seed: int = 0) -> dict[str, float | int]:
    """Mean of N values with a 95 % percentile bootstrap over groups.

    Args:
        values: (N,). groups: (N,) what is drawn with replacement; values of one group come together.
        seed: of the draws.

    Returns:
        {value, low, high, n}.
    """
    index = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    of = np.array([index[group] for group in groups])
    sums, counts = np.bincount(of, values), np.bincount(of)
    draws = np.random.default_rng(seed).integers(len(index), size=(SAMPLES, len(index)))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high), "n": len(values)}


def deciding_token(rows: Iterable[Row], words: set[str], seed: int = 0) -> Row:
    """Compare the weight of the tokens that decide with the weight of the filler tokens.

    Only tokens after the prefix that both completions share count: from there on the two sides see different contexts.
    A token *decides* if it is a word that truth depends on and the other completion does not hold it; the others are
    filler. A side without both kinds is left out.

    Args:
        rows: pairs as in `weights.json`: chosen_tokens, rejected_tokens, chosen_weights, rejected_weights.
        words: the words that truth can depend on.
        seed: of the interval.

    Returns:
        `auc`, the probability that a deciding token has more weight than a filler token of its completion (a tie counts
        half), with `auc_low` and `auc_high`; `ratio`, the mean weight of the deciding tokens over the mean weight of
        all that count; both averaged over the n completions. None where n is 0.
    """
    aucs, ratios, pairs = [], [], []
    for number, row in enumerate(rows):
        sides = {side: [token.strip("\u2581 ") for token in row[f"{side}_tokens"]] for side in ("chosen", "rejected")}
        shared = 0
        for ours, theirs in zip(sides["chosen"], sides["rejected"], strict=False):
            if ours != theirs:
                break
            shared += 1
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            decides = np.array([token in words and token not in sides[other] for token in sides[side]][shared:], bool)
            weights = np.asarray(row[f"{side}_weights"], float)[shared:]
            if decides.any() and not decides.all():
                difference = weights[decides][:, None] - weights[~decides][None, :]
                aucs.append(float(((difference > 0) + 0.5 * (difference == 0)).mean()))
                ratios.append(float(weights[decides].mean() / weights.mean()))
                pairs.append(number)
    if not aucs:
        return {"auc": None, "auc_low": None, "auc_high": None, "ratio": None, "n": 0}
    auc = interval(aucs, pairs, seed)
    found = {"auc": auc["value"], "auc_low": auc["low"], "auc_high": auc["high"]}
    return found | {"ratio": float(np.mean(ratios)), "n": len(aucs)}


def weights_of_pairs(world: World, pairs: Path, model: Path, methods: dict[str, MethodSpec]) -> list[Row]:
    """`deciding_token` on the pairs under the base's hidden states: uniform, OTPO at REGS, the run's own rules."""
    from otpo.data.load import load_rows
    from otpo.data.tokens import load_tokenizer, tokenize_pairs
    from otpo.explain import model_token_weights
    from otpo.methods.spec import resolve

    items, _ = tokenize_pairs(load_rows(pairs), load_tokenizer(model), max_length=None)
    items = items[:: max(1, len(items) // MOST_PAIRS)]  # pairs lie in the order of their topics
    words = {word for group in world.words.values() for word in group}
    specs = [resolve("uniform", {"method": "dpo"})]
    specs += [resolve(f"otpo at reg {reg:g}", {"method": "otpo", "reg": reg}) for reg in REGS]
    specs += [spec for spec in methods.values() if _weights_by_itself(spec)]
    rows = []
    for spec in specs:
        figures = deciding_token(model_token_weights(str(model), items, spec, batch_size=32), words)
        rows.append({"label": spec.label, "reg": spec.hyperparameters.get("reg"), **figures})
    return rows


def _weights_by_itself(spec: MethodSpec) -> bool:
    """Whether a method of pairs weights tokens, by what the policy alone says of them."""
    rule = spec.method.weight_rule
    return spec.method.objective == "pair" and rule.name not in ("uniform", "mean") and rule.needs <= {"hidden"}


def _part(item: Item) -> str:
    return item.split if item.task == "facts" else f"summaries_{item.split}"


def _outputs(run: RunFolder, label: str) -> list[Row]:
    files = run.label(label).all_outputs()
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]

"""`otpo agreement`: a judge's verdicts beside people's labels, in both orders, into a folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import layout
from eval.judge.check import check_each
from eval.judge.config import JudgeConfig
from eval.judge.panels.members import judge_label
from eval.judge.protocols.registry import protocol_label
from eval.labelled_pairs import LabelledPair, load_pairs
from eval.stats.agreement import TIE, agreement, longer_is_right, majority
from eval.stats.calibration import calibration
from eval.stats.position_bias import position_bias
from jobs.judging import most_frequent
from otpo.errors import UserError, WorkError
from otpo.files import write_json
from pipeline.judge.judging import Judge, Match, judge_task
from pipeline.judge.served import served
from pipeline.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

Figures = dict[str, Any]
FIRST, SECOND = "output_1", "output_2"


def judge_agreement(files: Sequence[Path], config: JudgeConfig, out: Path, *, progress: Progress) -> Figures:
    """Ask the judge about pairs that people compared, then write agreement.json and agreement.parquet to `out`.

    Pairs that everybody calls a tie are not asked about: no verdict on them is right or wrong.

    Returns:
        What agreement.json holds: the judge, the files, the figures of all pairs (`eval.stats.agreement.agreement`,
        accuracy_longer, first_share, judge_price_usd, errors), and those of each category where there are several.

    Raises:
        UserError: files without labelled pairs, or a judge that cannot be asked; nothing was asked.
        WorkError: not one verdict came back.
    """
    if not config.both_orders or config.reward_model:
        raise UserError(
            "`otpo agreement` asks an endpoint, in both orders: leave out judge.both_orders=false and "
            "judge.reward_model."
        )
    pairs = load_pairs(files, config.seed)
    asked = [i for i, pair in enumerate(pairs) if set(pair.labels) != {TIE}]
    if not asked:
        raise UserError(
            f"{', '.join(map(str, files))}: every label is a tie, so there is nothing to ask a judge about."
        )
    outputs, reference = (
        [{"instruction": pairs[i].instruction, "output": getattr(pairs[i], name), "generator": name} for i in asked]
        for name in (SECOND, FIRST)
    )
    with served(config, progress) as answering:
        for model, way in check_each(answering, out / layout.STORE):
            progress(f"judge {model}", 0, 0, str(way))
        judge = Judge(answering, out / layout.STORE, progress=progress)
        verdicts = judge_task(judge, [Match("pairs", "people's labels", outputs, reference)], "agreement")
    verdicts["index"] = [asked[i] for i in verdicts["index"]]
    _write_verdicts(out, pairs, verdicts)
    if not verdicts["preference"].notna().any():
        raise WorkError(f"Not one verdict came back{most_frequent(verdicts)}. The same command asks again.")
    found: Figures = {
        "judge": judge_label(config),
        "protocol": protocol_label(config.protocol),
        "files": [str(file) for file in files],
        **_figures(pairs, verdicts, list(range(len(pairs)))),
    }
    members: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        members.setdefault(pair.category, []).append(i)
    if len(members) > 1:
        found["categories"] = {name: _figures(pairs, verdicts, own) for name, own in members.items()}
    write_json(out / layout.AGREEMENT, found)
    missing = verdicts[verdicts["preference"].isna()]
    if len(missing):
        counted = f"{len(missing)} of {len(verdicts)} verdicts failed{most_frequent(missing)}"
        progress(f"judge {config.model}", 0, 0, f"{counted}. They are counted, and the same command asks them again.")
    return found


def _figures(pairs: Sequence[LabelledPair], verdicts: pd.DataFrame, members: list[int]) -> Figures:
    """The figures of some of the pairs."""
    chosen = [pairs[i] for i in members]
    labels = [pair.labels for pair in chosen]
    own = verdicts[verdicts["index"].isin(set(members))]
    said = dict(zip(zip(own["index"], own["order"], strict=True), own["preference"], strict=True))
    first, second = (
        [said.get((i, order), said.get((i, "none"), math.nan)) for i in members]
        for order in ("reference_first", "model_first")  # output_1 first, output_2 first
    )
    bias = position_bias(own)
    lengths_1, lengths_2 = ([len(getattr(pair, name)) for pair in chosen] for name in (FIRST, SECOND))
    return {
        **agreement(first, second, labels, [pair.instruction for pair in chosen]),
        "accuracy_longer": longer_is_right(lengths_1, lengths_2, labels),
        "calibration": calibration(first, second, labels, [pair.instruction for pair in chosen]),
        **{
            name: None if share is None else share / 100
            for name, share in (
                ("first_share", bias.first_share),
                ("first_share_low", bias.low),
                ("first_share_high", bias.high),
            )
        },
        "judge_price_usd": float(own["price_usd"].sum()),
        "errors": {str(kind): int(n) for kind, n in own["error"].value_counts().items()},
    }


def _write_verdicts(out: Path, pairs: Sequence[LabelledPair], verdicts: pd.DataFrame) -> None:
    """The table of verdicts, with what most people say of the pair (1, 2, 0 for a tie, -1 for no majority)."""
    from eval.judge.table import write_verdicts

    about = [pairs[i] for i in verdicts["index"]]
    labelled = verdicts.assign(
        category=[pair.category for pair in about], label=[majority(pair.labels) for pair in about]
    )
    write_verdicts(labelled, out / layout.AGREEMENT_VERDICTS)

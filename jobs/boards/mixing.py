"""One board is one judge's: what would mix two is refused."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from eval import layout
from eval.judge.config import JudgeConfig
from eval.judge.panels.members import judge_label
from eval.judge.protocols.registry import protocol_label
from eval.judge.store import open_store
from eval.judge.table import answering_models
from jobs.boards.kept import Kept
from jobs.boards.state import differences
from otpo.errors import UserError
from pipeline.judge.served import served_name
from pipeline.progress import Progress


def refuse_another(kept: Kept, config: JudgeConfig) -> None:
    """Refuse a judge, or a way of asking it, that is not the board's.

    Raises:
        UserError: what differs, and the ways out.
    """
    there = kept.state.config(kept.folder)
    label = protocol_label(there.protocol)
    if label != kept.state.protocol:
        raise UserError(
            f"The protocol in {kept.folder} asks otherwise than when the board was judged: {kept.state.protocol} then, "
            f"{label} now. Put its earlier text back, or `otpo board rejudge {kept.folder} --protocol FILE`."
        )
    if found := differences(there, config):
        raise UserError(
            f"{kept.folder} is one judge's board: {'; '.join(found)}. Leave that out; or let it judge every model of "
            f"the board (`otpo board rejudge {kept.folder}`); or make a board of its own (`otpo board init`)."
        )


def refuse_mixed(kept: Kept, config: JudgeConfig, *, renew: bool) -> None:
    """Refuse to go on where the judge's name came to answer as another model, unless that one is asked everything.

    Raises:
        UserError: which models answered, and the ways out.
    """
    if not renew and (said := _mixed(kept, config, kept.written())):
        raise UserError(said)


def tell_mixed(kept: Kept, config: JudgeConfig, verdicts: pd.DataFrame, progress: Progress) -> None:
    """Say that a board's verdicts are of several models, where they are."""
    if said := _mixed(kept, config, verdicts):
        progress(f"judge {judge_label(config)}", 0, 0, said)


def _mixed(kept: Kept, config: JudgeConfig, verdicts: pd.DataFrame) -> str:
    """That a board has the verdicts of several models of one name, and the ways out; empty where it has not."""
    if config.reward_model:
        return ""
    counted = answering_models(verdicts)
    found: list[tuple[str, Counter[str], str]] = []  # the judge, how many verdicts each model gave, who answers now
    if config.vllm:  # its name says which weights it has; further judges of a panel go by their own names
        others = {member.model for member in config.panel}
        own: Counter[str] = Counter()
        for judge in [name for name in counted if name not in others]:
            own += counted.pop(judge)
        present = served_name(config)
        if not set(own) <= {present}:
            found.append((str(config.model), own, present))
    store = kept.folder / layout.STORE
    if any(len(counts) > 1 for counts in counted.values()) and store.is_file():
        with open_store(store) as opened:
            for name, counts in ((judge or str(config.model), counts) for judge, counts in counted.items()):
                first, present = opened.identity(name) or ("", "")
                if len(counts) > 1 and first != present:
                    found.append((name, counts, present))
    if not found:
        return ""
    told = " ".join(
        f"The judge {name} of {kept.folder} has come to answer as another model: "
        f"{', '.join(f'{model} gave {count:,} verdicts' for model, count in counts.most_common())}, and it answers as "
        f"{present} now."
        for name, counts, present in found
    )
    return (
        f"{told} `otpo board update {kept.folder} --renew` asks that one about every model; or take off what "
        "it judged (`otpo board remove`), and judge by a name that stands for one model (`otpo board rejudge`)."
    )

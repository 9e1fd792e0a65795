"""`otpo judge`: any number of output files against one reference, into a folder of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd

from eval.board.leaderboard import leaderboard, write_leaderboard
from eval.board.report import build
from eval.board.run_files import write_answers
from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.judge.reward_scores import judge_by_scores
from eval.judge.verdicts import judge, ledger, write_verdicts
from eval.outputs import load_outputs, match_outputs
from otpo.errors import UserError, WorkError
from pipeline.judge.reward_model import RewardJudge, check_reward_model
from pipeline.progress import Progress


def judge_files(
    files: list[Path],
    reference: Path,
    config: JudgeConfig,
    out: Path,
    task: str,
    *,
    show: Progress,
    subset: bool = False,
    template: str = "auto",
) -> pd.DataFrame:
    """Judge files, then write verdicts.parquet, leaderboard.csv and report.html to `out`.

    Args:
        template: how a reward model (`config.reward_model`) sees the instructions: auto, chat or literal.

    Returns:
        The leaderboard.

    Raises:
        UserError: files that do not fit or a judge that cannot be asked; nothing was asked.
        WorkError: not one verdict came back.
    """
    reference_rows = load_outputs(reference)
    outputs = {}
    for file in files:
        rows = load_outputs(file)
        match_outputs(rows, reference_rows, subset=subset)
        names = Counter(str(row.get("generator") or file.name.split(".")[0]) for row in rows)
        name = names.most_common(1)[0][0]
        if name in outputs:
            raise UserError(f"Two files hold answers of '{name}'. Give each file's rows a `generator` of its own.")
        outputs[name] = [{**row, "generator": name} for row in rows]
    rewards = None
    if config.reward_model:
        check_reward_model("--reward-model", config.reward_model)
        rewards = RewardJudge(
            config.reward_model, template=template, progress=lambda done, total: show("score answers", done, total, "")
        )
    else:
        check(config)
    frames, spent = [], 0.0
    for name, rows in outputs.items():

        def progress(done: int, total: int, failed: int, what: str = f"judge {name}") -> None:
            show(what, done, total, f"{failed} failed" if failed else "")

        if rewards is not None:
            frame = judge_by_scores(rows, reference_rows, rewards, task, subset=subset)
        else:
            frame = judge(
                rows, reference_rows, config, out / "store.sqlite", task, progress, subset=subset, spent_usd=spent
            )
        spent += ledger(frame)["spent_usd"]
        frames.append(frame)
    verdicts = pd.concat(frames, ignore_index=True)
    write_verdicts(verdicts, out / "verdicts.parquet")
    write_answers(out, task, outputs, reference_rows)
    calibration = Path(config.calibration) if config.calibration else None
    board = leaderboard(
        verdicts, outputs, reference_rows, judge=config.model or "", protocol=config.protocol, calibration=calibration
    )
    write_leaderboard(board, out / "leaderboard.csv")
    build([out], out)
    if not verdicts["preference"].notna().any():
        raise WorkError(
            f"Not one verdict came back; {out / 'report.html'} counts the failures. The same command asks again."
        )
    return board

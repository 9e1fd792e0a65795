"""On-policy preference pairs: a model answers each prompt several times, a judge rates the answers, best meets worst.

`sample_pairs(..., out="pairs.jsonl")` writes the pairs and, beside them, `pairs.report.json` (what became of every
prompt), `pairs.samples/` (the answers) and `pairs.ratings.sqlite` (the judge's replies): the same call after a kill
asks nothing twice. A reward model scores in this process, again in each call.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.errors import UserError, WorkError
from otpo.files import write_atomically
from pipeline.generate.engine import Sampling, Template
from pipeline.generate.outputs import write_json
from pipeline.judge.reward_model import RewardJudge

if TYPE_CHECKING:
    from eval.judge.config import JudgeConfig
    from eval.tasks import Prompt, Task
    from pipeline.generate.pool import EnginePool

Row = dict[str, Any]
Progress = Callable[[str, int, int, str], None]


def make_pairs(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Row]],
    scores: Sequence[Sequence[float | None]],
    per_prompt: int = 1,
    template: Template = "chat",
) -> tuple[list[Row], dict[str, Any]]:
    """Pair each prompt's best answer with its worst, the second best with the second worst, and so on.

    An answer enters once, however often it was given. One that was cut at its token limit may be rejected but is never
    chosen: training would teach its false end. Answers without text or without a score do not enter.

    Args:
        prompts: P prompts.
        answers: for each prompt its rows {output, truncated, error}, as `EnginePool.generate` gives them.
        scores: for each prompt the scores of its rows, higher is better; None where there is none.
        per_prompt: most pairs of a prompt.
        template: "chat" writes messages, "literal" plain strings, so that training sees what generation saw.

    Returns:
        Rows {id, prompt, chosen, rejected, score_chosen, score_rejected}, and the report: counts of prompts, of answers
        and what became of them, `without_pair` (reason -> prompts), how often the chosen answer has more characters.
    """
    counts: Counter[str] = Counter()
    without: Counter[str] = Counter()
    rows: list[Row] = []
    for prompt, given, rated in zip(prompts, answers, scores, strict=True):
        distinct: dict[str, tuple[float | None, bool]] = {}
        for answer, score in zip(given, rated, strict=True):
            counts["answers"] += 1
            counts["failed"] += bool(answer.get("error"))
            counts["empty"] += not answer["output"].strip() and not answer.get("error")
            counts["truncated"] += bool(answer.get("truncated"))
            if answer["output"].strip():
                distinct.setdefault(answer["output"], (score, bool(answer.get("truncated"))))
        counts["distinct"] += len(distinct)
        scored = [(score, cut, text) for text, (score, cut) in distinct.items() if score is not None]
        counts["unrated"] += len(distinct) - len(scored)
        pairs = _best_against_worst(scored)[:per_prompt]
        if not pairs:
            without[_why_none(len(distinct), scored)] += 1
        for (score_chosen, _, chosen), (score_rejected, _, rejected) in pairs:
            rows.append(
                {
                    "id": prompt.id,
                    **_as_training_reads(prompt, chosen, rejected, template),
                    "score_chosen": score_chosen,
                    "score_rejected": score_rejected,
                }
            )
            counts["chosen_longer"] += len(chosen) > len(rejected)
            counts["equally_long"] += len(chosen) == len(rejected)
    names = ("answers", "failed", "empty", "truncated", "distinct", "unrated")
    report = {
        "prompts": len(prompts),
        **{name: counts[name] for name in names},
        "pairs": len(rows),
        "without_pair": dict(without),
        "chosen_longer": counts["chosen_longer"] / len(rows) if rows else None,
        "equally_long": counts["equally_long"] / len(rows) if rows else None,
    }
    return rows, report


def sample_pairs(
    model: str | Path,
    task: Task,
    sampling: Sampling,
    pool: EnginePool,
    scorer: JudgeConfig,
    out: str | Path,
    *,
    per_prompt: int = 1,
    template: Template | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sample `sampling.n` answers to each prompt, have the distinct ones rated, write the pairs to `out` (JSONL).

    Args:
        model: the policy: a folder or a hub name.
        task: the prompts.
        sampling: with n of at least 2.
        pool: the engines.
        scorer: the judge that rates answers from 1 to 10, or a reward model, which scores them.
        out: the pairs' file; the other files lie beside it.
        per_prompt: most pairs of a prompt.
        template: how prompts reach the model; None is the pool's.
        progress: called with (what, done, total, remark).

    Returns:
        The report of `make_pairs`, with `sampling`, `generation` (tokens, seconds) and `scorer` (url and model).

    Raises:
        UserError: settings or inputs that cannot be used.
        WorkError: an engine or the judge failed, or not one pair came of it; what was finished is kept.
    """
    from eval.judge.ratings import rate

    if sampling.n < 2:
        raise UserError(f"pairs need at least 2 answers a prompt, found n={sampling.n}: set pairs.n.")
    tell = progress or (lambda what, done, total, remark: None)
    out = Path(out)
    template = template or pool.template
    generated = pool.generate(
        model,
        "policy",
        task.prompts,
        sampling,
        out.with_name(f"{out.stem}.samples"),
        template,
        lambda done, total, rate: tell("sample answers", done, total, f"{rate:,.0f} tokens/s"),
    )
    n = sampling.n
    answers = [generated.outputs[i * n : (i + 1) * n] for i in range(len(task.prompts))]
    asked = {
        (prompt.instruction, answer["output"]): prompt.messages or prompt.instruction
        for prompt, given in zip(task.prompts, answers, strict=True)
        for answer in given
        if answer["output"].strip()
    }
    ratings: Sequence[float | None]
    if scorer.reward_model:
        rewards = RewardJudge(scorer.reward_model, template=template, progress=tell)
        ratings = rewards(list(asked), list(asked.values()))
    else:
        ratings = rate(
            [{"instruction": instruction, "output": output} for instruction, output in asked],
            scorer,
            out.with_name(f"{out.stem}.ratings.sqlite"),
            lambda done, total, failures: tell("rate answers", done, total, f"{failures} failed" if failures else ""),
        )
    rating = dict(zip(asked, ratings, strict=True))
    scores = [
        [rating.get((prompt.instruction, answer["output"])) for answer in given]
        for prompt, given in zip(task.prompts, answers, strict=True)
    ]
    rows, report = make_pairs(task.prompts, answers, scores, per_prompt, template)
    report |= {
        "sampling": generated.report["sampling"],
        "generation": {key: generated.report[key] for key in ("model", "model_sha256", "tokens", "seconds")},
        "scorer": {"reward_model": scorer.reward_model}
        if scorer.reward_model
        else {"url": scorer.url, "model": scorer.model},
    }
    write_json(out.with_name(f"{out.stem}.report.json"), report)
    if not rows:
        raise WorkError(
            f"Not one pair came of {report['answers']} answers to {report['prompts']} prompts: "
            f"{report['without_pair']}; {report['truncated']} answers were cut at max_tokens. Raise pairs.n, "
            "pairs.temperature or pairs.max_tokens, or use a scorer that tells answers apart."
        )
    write_atomically(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return report


Scored = tuple[float, bool, str]  # score, cut at its limit, text


def _best_against_worst(scored: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Pairs of strictly different scores; no answer is used twice; equal scores keep the order of sampling."""
    ranked = sorted(scored, key=lambda answer: -answer[0])
    pairs: list[tuple[Scored, Scored]] = []
    while True:
        best = next((answer for answer in ranked if not answer[1]), None)
        if best is None or len(ranked) < 2 or best[0] <= ranked[-1][0]:
            return pairs
        pairs.append((best, ranked.pop()))
        ranked.remove(best)


def _why_none(distinct: int, scored: Sequence[Scored]) -> str:
    if distinct < 2:
        return "fewer than two distinct answers"
    if len(scored) < 2:
        return "fewer than two rated answers"
    if len({score for score, _, _ in scored}) < 2:
        return "equal scores"
    return "no complete answer above the worst"


def _as_training_reads(prompt: Prompt, chosen: str, rejected: str, template: Template) -> Row:
    if template == "literal":
        return {"prompt": prompt.instruction, "chosen": chosen, "rejected": rejected}
    return {
        "prompt": prompt.messages or [{"role": "user", "content": prompt.instruction}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }

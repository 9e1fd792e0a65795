"""On-policy preference pairs: a model completes each prompt several times, a judge rates, the best meets the worst.

`sample_pairs(..., out="pairs.jsonl")` writes the pairs and, beside them, `pairs.report.json` (what became of every
prompt), `pairs.samples/` (the outputs) and `pairs.ratings.sqlite` (the judge's replies): the same call after a kill
asks nothing twice. A reward model scores again in each call.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.data.template import Rendering, Template, trained_with
from otpo.errors import UserError, WorkError
from otpo.files import Row, write_atomically, write_json
from pipeline.generate.engine import Sampling
from pipeline.judge.reward_model import RewardJudge
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    from eval.judge.config import JudgeConfig
    from eval.tasks import Prompt, Task
    from pipeline.generate.pool import EnginePool


def make_pairs(
    prompts: Sequence[Prompt],
    outputs: Sequence[Sequence[Row]],
    scores: Sequence[Sequence[float | None]],
    per_prompt: int = 1,
    template: Template = "chat",
) -> tuple[list[Row], dict[str, Any]]:
    """Pair each prompt's best output with its worst, the second best with the second worst, and so on.

    An output enters once, however often it was drawn. One that was cut at its token limit may be rejected but is never
    chosen: training would teach its false end. Outputs without text or without a score do not enter.

    Args:
        prompts: P prompts.
        outputs: for each prompt its rows {output, truncated, error}, as `EnginePool.generate` gives them.
        scores: for each prompt the scores of its rows, higher is better; None where there is none.
        per_prompt: most pairs of a prompt.
        template: "chat" writes messages, "literal" plain strings, so that training sees what generation saw.

    Returns:
        Rows {id, prompt, chosen, rejected, score_chosen, score_rejected}, and the report: counts of prompts, of outputs
        (`answers`) and what became of them, `without_pair` (reason -> prompts), how often the chosen completion has
        more characters.
    """
    counts: Counter[str] = Counter()
    without: Counter[str] = Counter()
    rows: list[Row] = []
    for prompt, given, rated in zip(prompts, outputs, scores, strict=True):
        distinct: dict[str, tuple[float | None, bool]] = {}
        for output, score in zip(given, rated, strict=True):
            counts["answers"] += 1
            counts["failed"] += bool(output.get("error"))
            counts["empty"] += not output["output"].strip() and not output.get("error")
            counts["truncated"] += bool(output.get("truncated"))
            if output["output"].strip():
                distinct.setdefault(output["output"], (score, bool(output.get("truncated"))))
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
    judge: JudgeConfig,
    out: str | Path,
    *,
    per_prompt: int = 1,
    template: Rendering | Template | None = None,
    name: str = "policy",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Sample `sampling.n` outputs for each prompt, have the distinct ones rated, write the pairs to `out` (JSONL).

    Args:
        model: the policy: a folder or a hub name.
        task: the prompts.
        sampling: with n of at least 2.
        pool: the engines.
        judge: rates outputs from 1 to 10; or its reward model scores them, with the template it was trained with here,
            otherwise with that of the policy.
        out: the pairs' file; the other files lie beside it.
        per_prompt: most pairs of a prompt.
        template: how prompts are rendered (`otpo.data.template`); None is the pool's.
        name: the samples' generator.

    Returns:
        The report of `make_pairs`, with `sampling`, `generation` (tokens, seconds), `template` and `scorer` (the
        judge's url and model, or the reward model).

    Raises:
        UserError: settings or inputs that cannot be used.
        WorkError: an engine or the judge failed, or not one pair came of it; what was finished is kept.
    """
    from eval.judge.ratings import rate
    from pipeline.judge.served import served

    if sampling.n < 2:
        raise UserError(f"pairs need at least 2 outputs for each prompt, found n={sampling.n}: set pairs.n.")
    out = Path(out)
    rendering = Rendering.of(template or pool.template)
    generated = pool.generate(
        model,
        name,
        task.prompts,
        sampling,
        out.with_name(f"{out.stem}.samples"),
        rendering,
        progress,
        "sample outputs",
    )
    n = sampling.n
    outputs = [generated.outputs[i * n : (i + 1) * n] for i in range(len(task.prompts))]
    asked = {
        (prompt.instruction, output["output"]): prompt.messages or prompt.instruction
        for prompt, given in zip(task.prompts, outputs, strict=True)
        for output in given
        if output["output"].strip()
    }
    ratings: Sequence[float | None]
    if judge.reward_model:
        trained = trained_with(judge.reward_model)
        rewards = RewardJudge(judge.reward_model, template=trained or rendering.template, progress=progress)
        if pool.config.device == "gpu":
            pool.close()  # scoring wants their memory
        ratings = rewards(list(asked), list(asked.values()))
        rewards.unload()
    else:
        if judge.vllm and pool.config.device == "gpu":
            pool.close()  # so does the judge
        with served(judge, progress) as rater:
            ratings = rate(
                [{"instruction": instruction, "output": output} for instruction, output in asked],
                rater,
                out.with_name(f"{out.stem}.ratings.sqlite"),
                lambda done, total, failures: progress(
                    "rate outputs", done, total, f"{failures} failed" if failures else ""
                ),
            )
    rating = dict(zip(asked, ratings, strict=True))
    scores = [
        [rating.get((prompt.instruction, output["output"])) for output in given]
        for prompt, given in zip(task.prompts, outputs, strict=True)
    ]
    rows, report = make_pairs(task.prompts, outputs, scores, per_prompt, rendering.template)
    report |= {
        "sampling": generated.report["sampling"],
        "generation": {key: generated.report[key] for key in ("model", "model_sha256", "tokens", "seconds")},
        "template": str(rendering),
        "scorer": {"reward_model": judge.reward_model}
        if judge.reward_model
        else {"url": judge.url, "model": judge.model if judge.vllm is None else judge.vllm.model},
    }
    write_json(out.with_name(f"{out.stem}.report.json"), report)
    if not rows:
        raise WorkError(
            f"Not one pair came of {report['answers']} outputs for {report['prompts']} prompts: "
            f"{report['without_pair']}; {report['truncated']} outputs were cut at max_tokens. Raise pairs.n, "
            "pairs.temperature or pairs.max_tokens, or use a judge that tells outputs apart."
        )
    write_atomically(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return report


Scored = tuple[float, bool, str]  # score, cut at its limit, text


def _best_against_worst(scored: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Pairs of strictly different scores; no output is used twice; equal scores keep the order of sampling."""
    ranked = sorted(scored, key=lambda output: -output[0])
    pairs: list[tuple[Scored, Scored]] = []
    while True:
        best = next((output for output in ranked if not output[1]), None)
        if best is None or len(ranked) < 2 or best[0] <= ranked[-1][0]:
            return pairs
        pairs.append((best, ranked.pop()))
        ranked.remove(best)


def _why_none(distinct: int, scored: Sequence[Scored]) -> str:
    if distinct < 2:
        return "fewer than two distinct outputs"
    if len(scored) < 2:
        return "fewer than two rated outputs"
    if len({score for score, _, _ in scored}) < 2:
        return "equal scores"
    return "no complete output above the worst"


def _as_training_reads(prompt: Prompt, chosen: str, rejected: str, template: Template) -> Row:
    if template == "literal":
        return {"prompt": prompt.instruction, "chosen": chosen, "rejected": rejected}
    beside = {"tools": prompt.tools, "chat_template_kwargs": prompt.template_kwargs}
    return {
        "prompt": prompt.messages or [{"role": "user", "content": prompt.instruction}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **{column: value for column, value in beside.items() if value},
    }

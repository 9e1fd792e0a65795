"""`--batch-write`, `--batch-read` and `--dry-run`: judging in files, and its price, without calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import layout
from eval.judge.asking.ways import is_known, recall
from eval.judge.check import check
from eval.judge.client import Answer
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import Failure
from eval.judge.offline.batch_files import BatchReplies, BatchWriter
from eval.judge.offline.estimate import Estimate
from eval.judge.protocols.registry import find_protocol
from otpo.errors import UserError
from otpo.files import Row
from pipeline.judge.judging import Judge, Match, judge_task
from pipeline.progress import Progress, silent


@dataclass(frozen=True)
class Asked:
    """What a judge is asked about.

    Attributes:
        outputs: model -> its outputs.
        reference: the rows that they are compared with.
        config: the judge.
        out: the folder with the store of its replies.
        task: the task's name.
        against: what the progress calls the reference.
        subset: whether the outputs may cover only a part of the reference's instructions.
    """

    outputs: Mapping[str, list[Row]]
    reference: list[Row]
    config: JudgeConfig
    out: Path
    task: str
    against: str
    subset: bool = False

    @property
    def matches(self) -> list[Match]:
        """Each model's outputs beside the reference's."""
        return [Match(name, self.against, rows, self.reference) for name, rows in self.outputs.items()]


@dataclass(frozen=True)
class Offline:
    """Judging without calls. False where it is not wanted.

    Attributes:
        write: where a batch file of the questions goes.
        read: files of a batch's replies, which answer in place of the endpoint.
        dry_run: only say what the questions would cost.
    """

    write: Path | None = None
    read: Sequence[Path] = ()
    dry_run: bool = False

    def __bool__(self) -> bool:
        return bool(self.read) or self.asks_nothing

    @property
    def asks_nothing(self) -> bool:
        """Whether there is no verdict to come."""
        return self.write is not None or self.dry_run


def know_the_way(config: JudgeConfig, out: Path, progress: Progress, *, ask: bool) -> None:
    """Find out how the judge is asked: by a question where there is an address, else as it was found earlier.

    Raises:
        UserError: a model is not named, there are several, it is loaded here, or the endpoint cannot be asked.
    """
    if config.own_model:
        raise UserError(
            f"A batch, or a price, is of an endpoint; {config.model} is loaded here to judge. Leave out --batch-write, "
            "--batch-read and --dry-run."
        )
    if not config.model:
        raise UserError("A batch is for one model: give --judge-model.")
    if config.panel:
        raise UserError("A batch is for one model: leave judge.panel out, and write one for each judge.")
    protocol = find_protocol(config.protocol)
    store = out / layout.STORE
    if config.url and ask:
        progress(f"judge {config.model}", 0, 0, str(check(config, store)))
    elif not is_known(config, protocol):
        recall(config, protocol, store)


def ask_instead(answer: Answer, asked: Asked) -> None:
    """Hand every question that has no stored reply to `answer`. No board is made."""
    judge = Judge(asked.config, asked.out / layout.STORE, progress=silent, answer=answer)
    if asked.outputs:
        judge_task(judge, asked.matches, asked.task, subset=asked.subset)


def estimate(asked: Asked) -> Estimate:
    """What the questions that have no stored reply would cost."""
    found = Estimate(asked.config)
    ask_instead(found, asked)
    return found


def write_batch(path: Path, asked: Asked) -> tuple[BatchWriter, Estimate]:
    """Write the questions that have no stored reply to a batch file; gives what was written, and what it may cost."""
    counted = Estimate(asked.config)
    with BatchWriter(path) as writer:

        def write(key: str, body: dict) -> Failure:
            counted(key, body)
            return writer(key, body)

        ask_instead(write, asked)
    return writer, counted


def without_calls(offline: Offline, asked: Asked, progress: Progress) -> list[str]:
    """Write a batch file, or count what judging would cost; gives what to say of it.

    Raises:
        UserError: as `know_the_way`.
    """
    know_the_way(asked.config, asked.out, progress, ask=offline.write is not None)
    if offline.write is None:
        return [str(estimate(asked))]
    written, cost = write_batch(offline.write, asked)
    if not written.requests:
        return ["Every question has its reply; there is nothing to write."]
    return [
        f"{written.requests:,} requests in {', '.join(map(str, written.files))}",
        str(cost),
        "Hand them in; then run the same command with --batch-read and the files that come back.",
    ]


def read_batch(files: Sequence[Path], config: JudgeConfig, out: Path, progress: Progress) -> BatchReplies:
    """The replies in the files of a batch, counted on the terminal.

    Raises:
        UserError: a file that is no batch's output, or as `know_the_way`.
    """
    know_the_way(config, out, progress, ask=False)
    replies = BatchReplies(files)
    counts = replies.counts
    said = f"{counts['lines']:,} lines: {counts['replies']:,} replies, {counts['failed']:,} errors"
    broken = f", {counts['broken']:,} that are no line of a batch" if counts["broken"] else ""
    progress("batch", 0, 0, said + broken)
    return replies


def tell_used(replies: BatchReplies, progress: Progress) -> None:
    """Say which questions the batch answered, and which it did not."""
    counts, parts = replies.counts, [f"{replies.counts['used']:,} replies used"]
    if counts["missing"]:
        parts.append(
            f"{counts['missing']:,} questions are in no line of it: --batch-write writes them again, and the command "
            "without a batch asks them"
        )
    if replies.unknown:
        parts.append(
            f"{replies.unknown:,} replies are to no question that was open: known before, or of other outputs, "
            "protocol, settings or judge"
        )
    progress("batch", 0, 0, "; ".join(parts))

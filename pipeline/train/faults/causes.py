"""Ray's errors about a worker group in one sentence each: what happened, to which rank, on which node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MEMORY = r"Memory on the node \(IP: ([^,\s]+).*?was ([\d.]+ ?\w+)(?: used)? / ([\d.]+ ?\w+)(?: limit)? \(([\d.]+)\)"
LIMIT = 500  # characters of another library's text


@dataclass(frozen=True)
class Cause:
    """Why a worker group ended.

    Attributes:
        kind: "memory" (of a node), "node", "killed", "silent", "error" or "connection".
        text: the sentence, without a full stop.
        remedy: what to do about it; empty where trying again is all there is.
    """

    kind: str
    text: str
    remedy: str = ""


# First those that explain the others: a rank whose peer has died only sees that its connection is gone.
ORDER = ("memory", "node", "silent", "killed", "error", "connection")


def cause_of(failures: Mapping[int, BaseException], places: Mapping[int, str]) -> Cause:
    """The failure of a worker group that explains the others.

    Args:
        failures: rank -> what Ray Train says of it.
        places: rank -> where it ran, such as "process 17 on 10.0.0.2".
    """
    causes = [
        cause(f"rank {rank}" + (f" ({places[rank]})" if rank in places else ""), str(error))
        for rank, error in sorted(failures.items())
    ]
    return min(causes, key=lambda found: ORDER.index(found.kind), default=Cause("error", "the worker group ended"))


def cause(who: str, text: str) -> Cause:
    """What Ray's text about a process says.

    Args:
        who: the process, as the subject of the sentence.
    """
    if memory := re.search(MEMORY, text, re.DOTALL):
        node, used, total, share = memory.groups()
        return Cause(
            "memory",
            f"{who} was killed because node {node} ran out of memory: {used} of {total} in use ({float(share):.0%})",
            "Ray kills a worker before the node itself fails. Train fewer workers on a node (train.workers), lower"
            " train.micro_batch_tokens or train.micro_batch_size, which changes no result, set"
            " train.activation_checkpointing=true, or take nodes with more memory; end other programs that hold memory"
            " there.",
        )
    if "low on memory" in text or ("OutOfMemoryError" in text and "CUDA" not in text):
        return Cause("memory", f"{who} was killed because its node ran out of memory", "Take fewer workers on a node.")
    if re.search(r"node (has|was|is) (died|crashed|dead|terminated|preempted)|node_death|NodeDied|its node", text):
        return Cause("node", f"{who} is gone with its node")
    if "health check has been hanging" in text:
        return Cause("silent", f"{who} no longer responded")
    if re.search(r"actor died unexpectedly|ActorDiedError|The actor is dead|worker process has died", text):
        return Cause("killed", f"{who} died: {_how(text)}")
    last = _last_line(text)
    if re.search(r"gloo|nccl|Connection (closed|reset)|broken pipe|timed out|Dist\w*Error", text, re.IGNORECASE):
        return Cause("connection", f"{who} lost its connection to the others: {last}")
    return Cause("error", f"{who} raised {last}")


def sentence(found: Cause) -> str:
    """A cause and its remedy, as a message of their own."""
    return f"{found.text[:1].upper()}{found.text[1:]}." + (f" {found.remedy}" if found.remedy else "")


def _how(text: str) -> str:
    if re.search(r"SIGKILL|Signal 9|signal 9|exit code 137", text) or "connection error code 2" in text:
        return "its process was killed"
    detail = re.search(r"exit detail: *(.+?)(?:\n|$)", text, re.IGNORECASE) or re.search(r"Worker exit type.+", text)
    return _short(detail.group(0)) if detail else "its process ended"


def _last_line(text: str) -> str:
    """The last line of a traceback, which says what was raised."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return _short(lines[-1].rstrip(".")) if lines else "an error without a message"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LIMIT else f"{text[:LIMIT]}..."

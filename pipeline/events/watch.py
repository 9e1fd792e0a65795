"""What happens to a cluster while a run waits for it, on the terminal and in `events.jsonl`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import ray

from pipeline.cluster.connect import HEAD_ENVIRONMENT, head_seconds
from pipeline.cluster.placement import TrainingRoom
from pipeline.events.log import EventReader, record
from pipeline.progress import Progress
from pipeline.run.folder import RunFolder

EVENTS_SECONDS = 0.5  # between two looks at events.jsonl
NODES_SECONDS = 5.0  # between two questions to the cluster
HEAD_SECONDS = 10.0  # that a question may take before it is told
SHOWN = ("CPU", "GPU", "train", "generate")


@contextmanager
def watching(folder: RunFolder, progress: Progress, *, workers: int = 0, gpu: bool = False) -> Iterator[None]:
    """While the body runs, show the run's events, and tell of nodes that come and go.

    Args:
        folder: of the run.
        workers: training workers that need room, with a GPU each or none; 0 where nothing is trained.
    """
    stop, events, nodes, head = threading.Event(), EventReader(folder.events), NodeWatch(workers, gpu=gpu), HeadWatch()

    def show() -> None:
        for event in events.new():
            progress(event.about, 0, 0, event.text)

    def tell(text: str) -> None:
        if text:
            record(folder.events, "cluster", text)

    def look() -> None:
        while not stop.wait(NODES_SECONDS):
            head.asked = head.asked or time.monotonic()
            try:
                changes = nodes.changes()
            except Exception:  # Ray has no one type for a head that does not answer
                continue
            tell(head.answered())
            for change in changes:
                tell(change)

    def follow() -> None:
        while not stop.wait(EVENTS_SECONDS):
            tell(head.silent())
            show()

    # threads of their own: a question to a cluster that is lost does not return
    threads = [threading.Thread(target=target, daemon=True) for target in (look, follow)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        threads[1].join()
        show()


class HeadWatch:
    """Tells when the cluster's head takes long to answer, and when it answers again.

    Attributes:
        asked: when it was asked what it has not answered yet, by `time.monotonic`; None where nothing is open.
    """

    def __init__(self) -> None:
        self.asked: float | None = None
        self.told = False

    def silent(self) -> str:
        """A sentence, once, when the answer is late."""
        if self.told or self.asked is None or time.monotonic() - self.asked < HEAD_SECONDS:
            return ""
        self.told = True
        until = datetime.now().astimezone() + timedelta(seconds=head_seconds() - HEAD_SECONDS)
        return (
            f"the head has not answered for {HEAD_SECONDS:.0f} s; it is waited for until about {until:%H:%M:%S}, then"
            f" Ray ends this command ({HEAD_ENVIRONMENT}={head_seconds()} in the environment)"
        )

    def answered(self) -> str:
        """A sentence if the answer had been late."""
        told, self.told, self.asked = self.told, False, None
        return "the head answers again" if told else ""


class NodeWatch:
    """Tells what has changed since it was asked last.

    Args:
        workers: training workers that need room, with a GPU each or none.
    """

    def __init__(self, workers: int, *, gpu: bool) -> None:
        self.workers, self.gpu = workers, gpu
        self.alive = _names(_living())

    def changes(self) -> list[str]:
        """Sentences about nodes that are gone or new."""
        nodes = _living()
        now, before = _names(nodes), self.alive
        self.alive = now
        said = [f"node {name} is gone" for node, name in before.items() if node not in now]
        said += [f"node {name} has come" for node, name in now.items() if node not in before]
        if said:
            room = TrainingRoom.of([node["Resources"] for node in nodes]).workers(gpu=self.gpu)
            if room < self.workers:
                said.append(f"the nodes that are left have room for {room} of {self.workers} training workers")
        return said


def _living() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Id of a node -> its address and what it offers."""
    return {
        node["NodeID"]: f"{node['NodeManagerAddress']} ("
        + ", ".join(f"{node['Resources'][kind]:g} {kind}" for kind in SHOWN if node["Resources"].get(kind))
        + ")"
        for node in nodes
    }

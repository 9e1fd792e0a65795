"""What happens to a cluster while a run waits for it, on the terminal and in `events.jsonl`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.cluster.placement import TrainingRoom
from pipeline.events.log import EventReader, record
from pipeline.progress import Progress
from pipeline.run.folder import RunFolder

EVENTS_SECONDS = 0.5  # between two looks at events.jsonl
NODES_SECONDS = 5.0  # between two questions to the cluster
SHOWN = ("CPU", "GPU", "train", "generate")


@contextmanager
def watching(folder: RunFolder, progress: Progress, *, workers: int = 0, gpu: bool = False) -> Iterator[None]:
    """While the body runs, show the run's events, and tell of nodes that come and go.

    Args:
        folder: of the run.
        workers: training workers that need room, with a GPU each or none; 0 where nothing is trained.
    """
    stop, events, nodes = threading.Event(), EventReader(folder.events), NodeWatch(workers, gpu=gpu)

    def show() -> None:
        for event in events.new():
            progress(event.about, 0, 0, event.text)

    def look() -> None:
        while not stop.wait(NODES_SECONDS):
            for change in nodes.changes():
                record(folder.events, "cluster", change)

    def follow() -> None:
        while not stop.wait(EVENTS_SECONDS):
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

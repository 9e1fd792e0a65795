"""When a training saves: by steps, or by the clock with all ranks at the same step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.train import saving
from pipeline.train.saving import SaveSchedule


def saves(monkeypatch, schedule: SaveSchedule, seconds, *, first: int, last: int, cost: float = 0.0) -> list[int]:
    """The steps that are saved when step n takes `seconds(n)`."""
    now, found = 0.0, []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    for step in range(first, last + 1):
        now += seconds(step)
        if schedule.due(step):
            found.append(step)
            now += cost
            schedule.saved(step, cost)
    return found


def test_every_so_many_steps(monkeypatch, mesh):
    assert saves(monkeypatch, SaveSchedule(7, 1.0, start=0), lambda n: 600, first=1, last=30) == [7, 14, 21, 28]


def test_never(monkeypatch, mesh):
    assert saves(monkeypatch, SaveSchedule(None, None, start=0), lambda n: 600, first=1, last=30) == []


@pytest.mark.parametrize("start", [0, 100])
def test_every_so_many_minutes_after_a_slow_first_step(monkeypatch, mesh, start):
    """Steps of 6 s, the first of 300 s: ten minutes are a hundred steps."""
    schedule = SaveSchedule(None, 10.0, start=start)
    found = saves(monkeypatch, schedule, lambda n: 300 if n == start + 1 else 6, first=start + 1, last=start + 320)
    assert [step - start for step in found] == [103, 203, 303]


def test_steps_longer_than_the_interval_are_saved_one_by_one(monkeypatch, mesh):
    found = saves(monkeypatch, SaveSchedule(None, 1.0, start=0), lambda n: 100, first=1, last=12)
    assert found == list(range(4, 13))


def test_slow_saving_takes_a_twentieth_of_the_time(monkeypatch, mesh):
    """A save takes 60 s, so it comes every 20 minutes and not every minute."""
    found = saves(monkeypatch, SaveSchedule(None, 1.0, start=0), lambda n: 6, first=1, last=1000, cost=60)
    assert found[0] == 13, "what saving costs is not known before the first"
    assert {after - before for before, after in pairwise(found)} == {200}


def test_a_save_for_another_reason_begins_a_new_interval(monkeypatch, mesh):
    """The best step is saved whenever it comes, even before an interval could be measured."""
    schedule, now, found = SaveSchedule(None, 1.0, start=0), 0.0, []
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    for step in range(1, 40):
        now += 6
        due = schedule.due(step)
        if due or step in (1, 2, 8):
            schedule.saved(step, 0.0)
            found.append((step, due))
    assert found == [(1, False), (2, False), (8, False), (18, True), (28, True), (38, True)]

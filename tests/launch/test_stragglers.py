"""Ranks that compute slower than the others are told by rank and host."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.reporting.stragglers import LEAST, MOST, WINDOW, OwnTime, Slowest, Stragglers
from tests.distributed.ranks import Ranks
from tests.launch.common import run_with_slow_rank, tiny

HOSTS = ["one", "one", "two", "two"]


class Told:
    """What a report is told."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def slow_rank(self, *values: Any) -> None:
        self.said.append(values)


def judged(*each: list[float], factor: float = 1.5) -> tuple[list[Slowest], list[tuple[Any, ...]]]:
    """What comes of one log line after another."""
    told: Any = Told()
    stragglers = Stragglers(HOSTS, factor, told)
    return [stragglers.judge(step, seconds) for step, seconds in enumerate(each, 1)], told.said


def test_a_slow_rank_is_told_once_until_it_was_fast_again() -> None:
    slow, fast = [0.1, 0.12, 0.2, 0.11], [0.1, 0.12, 0.1, 0.11]
    found, said = judged(slow, slow, slow, fast, slow, slow)
    assert found[0] == Slowest(2, "two", 0.2, 0.11)
    assert said == [(2, 2, "two", 0.2, 0.11), (6, 2, "two", 0.2, 0.11)]
    slower = [0.1, 0.3, 0.2, 0.11]
    assert judged(slower, slower, factor=1.9)[1] == [(2, 1, "one", 0.3, 0.11)]
    # Another rank at each line is noise.
    assert judged([0.2, 0.1, 0.1, 0.1], [0.1, 0.2, 0.1, 0.1], [0.2, 0.1, 0.1, 0.1])[1] == []


def test_no_warning() -> None:
    assert judged(*[[0.1, 0.149, 0.1, 0.1]] * 2)[1] == []
    found, said = judged(*[[0.1, 9.0, 0.1, 0.1]] * 2, factor=0)
    assert (found[0].rank, said) == (1, [])
    # Nothing was timed: an engine whose parts all wait for others.
    found, said = judged(*[[0.0] * 4] * 2)
    assert (found[0].metrics(), found[0].host, said) == ({}, "", [])


def test_of_two_ranks_the_faster_one_is_the_median() -> None:
    found, said = judged([0.1, 0.2], [0.1, 0.2])
    assert said == [(2, 1, "one", 0.2, 0.1)]
    assert found[0].metrics() == {
        "own_time/median(s)": 0.1,
        "own_time/slowest(s)": 0.2,
        "own_time/slowest_rank": 1,
    }


class Clock:
    """Stands in for the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("launch.reporting.stragglers.time.perf_counter", lambda: self.now)


class Slow(nn.Module):
    """Takes a while, by a clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_own_time_is_that_of_the_parts_in_training(clock: Clock) -> None:
    parts = [Slow(clock, 1.0), Slow(clock, 2.0)]
    own = OwnTime(parts, torch.device("cpu"))
    for step in range(LEAST):
        assert own.median() == 0.0, step
        for part in parts:
            part(torch.ones(1))
        clock.now += 7.0  # Something that may wait for others.
        with torch.no_grad():
            parts[0](torch.ones(1))
        own.step_ends()
    assert own.median() == 3.0


def test_a_single_slow_step_does_not_count_and_old_ones_are_forgotten(clock: Clock) -> None:
    part = Slow(clock, 0.0)
    own = OwnTime([part], torch.device("cpu"))
    for part.seconds in (90.0, 1.0, 2.0, 3.0, 2.0):
        part(torch.ones(1))
        own.step_ends()
    assert own.median() == 2.0
    part.seconds = 8.0
    for _ in range(WINDOW):
        part(torch.ones(1))
        own.step_ends()
    assert own.median() == 8.0


def test_a_step_has_so_many_spans(clock: Clock) -> None:
    part = Slow(clock, 1.0)
    own = OwnTime([part], torch.device("cpu"))
    for _ in range(LEAST):
        for _ in range(2 * MOST):
            part(torch.ones(1))
        own.step_ends()
    assert own.median() == MOST


@pytest.mark.gpu
def test_events_are_read_when_they_have_passed() -> None:
    device = torch.device("cuda")
    part = nn.Linear(4096, 4096, device=device)
    own = OwnTime([part], device)
    x = torch.randn(8192, 4096, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            torch.cuda._sleep(50_000_000)  # The device is behind.
            part(x)
            own.step_ends()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(own._unread) > 1
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    part(x)
    end.record()
    torch.cuda.synchronize()
    assert math.isclose(own.median(), start.elapsed_time(end) / 1e3, rel_tol=1.0)


def test_a_run_names_its_slow_rank(
    ranks_of: Callable[[int], Ranks], root: Path, tmp_path: Path
) -> None:
    run = {"steps": 8, "log_every": 2, "folder": str(tmp_path), "slow_factor": 2.0}
    settings = tiny(root, parallel={"cp": 2}, run={**run, "validation_streams": 1})
    ranks_of(2).run(run_with_slow_rank, settings, 1, 0.1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    timed = [record for record in records if "own_time/median(s)" in record]
    assert [record["step"] for record in timed] == [6, 8]
    for record in timed:
        assert record["own_time/slowest_rank"] == 1
        assert record["own_time/slowest_host"] == socket.gethostname()
        assert record["own_time/slowest(s)"] >= 4 * 0.1  # Two layers, two micro-batches.
        assert record["own_time/slowest(s)"] > 2 * record["own_time/median(s)"] > 0
    (told,) = [record for record in records if "slow_rank" in record]
    assert (told["step"], told["slow_rank"], told["host"]) == (8, 1, socket.gethostname())
    assert told["times"] > 2


@pytest.mark.parametrize("value", [0.5, 1.0, -2.0])
def test_refused(root: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"run.slow_factor must be 0, or above 1, got"):
        tiny(root, run={"slow_factor": value})

"""Ranks that compute slower than the others: all wait for them, and no waiting shows who it is.

Timed is what every rank has equally much of and does alone: the forward of some parts of the model,
the engine's ``alone``. On GPUs events of the device do that, and are read when they have passed: no
step waits for them. The times of all ranks meet at each log line.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.processes.ranks import Ranks
from launch.reporting.report import Report

MOST = 64
"""Forwards that are timed in a step, the first ones."""
WINDOW = 20
"""Latest steps whose median counts."""
LEAST = 5
"""Steps that it needs: the first ones compile, and a single slow one is no reason to warn."""


class OwnTime:
    """Seconds of this rank's own computing, by step.

    Args:
        parts: whose forwards in training are timed.
    """

    def __init__(self, parts: Iterable[nn.Module], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._unread: deque[list[tuple[Any, Any]]] = deque()
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        for part in parts:
            part.register_forward_pre_hook(self._begin)
            part.register_forward_hook(self._end)

    def _begin(self, part: nn.Module, inputs: Any) -> None:
        # Validations and samples have no gradients.
        if len(self._spans) < MOST and torch.is_grad_enabled():
            self._begun = self._mark()

    def _end(self, part: nn.Module, inputs: Any, output: Any) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, self._mark()))
            self._begun = None

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_ends(self) -> None:
        """What was timed since the last call is of one step; reads steps that the device has
        done."""
        self._unread.append(self._spans)
        self._spans = []
        while len(self._unread) > 1 and self._has_passed(self._unread[0]):
            self._read()

    def _has_passed(self, spans: Sequence[tuple[Any, Any]]) -> bool:
        return not self._on_gpu or not spans or bool(spans[-1][1].query())

    def _read(self) -> None:
        spans = self._unread.popleft()
        if self._on_gpu:
            self._seconds.append(sum(a.elapsed_time(b) for a, b in spans) / 1e3)
        else:
            self._seconds.append(sum(b - a for a, b in spans))

    def median(self) -> float:
        """Of the latest steps, 0 of too few; the device has done all of them."""
        while self._unread:
            self._read()
        return statistics.median(self._seconds) if len(self._seconds) >= LEAST else 0.0


@dataclass(frozen=True)
class Slowest:
    """Own computing of all ranks, seconds a step.

    Attributes:
        rank: the slowest one.
        host: its machine; empty where nothing was timed.
        seconds: its own.
        median: of all ranks, of an even number the lower one of the two in the middle.
    """

    rank: int
    host: str
    seconds: float
    median: float

    def metrics(self) -> dict[str, float]:
        """The numbers by the names of ``metrics.jsonl``; none where nothing was timed."""
        if not self.host:
            return {}
        return {
            "own_time/median(s)": self.median,
            "own_time/slowest(s)": self.seconds,
            "own_time/slowest_rank": self.rank,
        }


def hosts_of(ranks: Ranks) -> list[str]:
    """The name of each rank's machine. Collective."""
    hosts = [""] * ranks.size
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


class Stragglers:
    """Finds the slowest rank, and warns of each that takes ``factor`` times the median at two log
    lines, one after the other.

    Args:
        hosts: of each rank.
        factor: ``run.slow_factor``; 0 for no warning.
    """

    def __init__(self, hosts: Sequence[str], factor: float, report: Report) -> None:
        self._hosts, self._factor, self._report = hosts, factor, report
        self._slow: set[int] = set()
        self._warned: set[int] = set()

    def judge(self, step: int, seconds: Sequence[float]) -> Slowest:
        """The slowest rank of a log line, after warnings of those that stay too slow.

        Args:
            seconds: of each rank.
        """
        median = statistics.median_low(seconds)
        slow = {
            rank
            for rank, own in enumerate(seconds)
            if self._factor and median > 0 and own > self._factor * median
        }
        for rank in sorted(slow & self._slow - self._warned):
            self._report.slow_rank(step, rank, self._hosts[rank], seconds[rank], median)
        # A rank that was as fast as the others in between is told again.
        self._warned = slow & (self._slow | self._warned)
        self._slow = slow
        rank = max(range(len(seconds)), key=lambda at: seconds[at])
        return Slowest(rank, self._hosts[rank] if median else "", seconds[rank], median)

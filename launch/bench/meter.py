"""Time and memory of what runs on the current CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from launch.bench.work import Peaks

CACHE_BYTES = 1 << 28
"""More than a GPU's L2 cache holds. Written before each repeat, so that no input is in it."""
MOST_REPEATS = 1000


class Meter:
    """Measures functions by device events."""

    def __init__(self, budget_ms: float) -> None:
        self.device = torch.device("cuda")
        self.gpu = torch.cuda.get_device_name()
        self.budget_ms = budget_ms
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=self.device)

    def of_all(self, measured: float) -> float:
        """The value that counts. Where several devices work together it is their largest, so that
        all repeat a function equally often."""
        return measured

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Median over at least three repeats, in about the budget, after two warm-up runs."""
        function()
        once = self.of_all(self._wait([self._record(function)])[0])
        repeats = int(min(MOST_REPEATS, max(3.0, self.budget_ms / max(1e-3, once))))
        times = self._wait([self._record(function) for _ in range(repeats)])
        return self.of_all(statistics.median(times))

    def memory_gib(self, function: Callable[[], Any]) -> float:
        """The most memory that was allocated within the function beyond what was before."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return self.of_all((torch.cuda.max_memory_allocated() - before) / 2**30)

    def peaks(self, dtype: torch.dtype) -> Peaks:
        """Rates of a large matrix product and of a copy."""
        size = 8192
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        product = self.milliseconds(lambda: torch.mm(a, b))
        source = torch.zeros(1 << 30, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        copy = self.milliseconds(lambda: target.copy_(source))
        return Peaks(2 * size**3 / product / 1e9, 2 * source.numel() / copy / 1e9)

    def _record(self, function: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.zero_()
        start.record()
        function()
        end.record()
        return start, end

    def _wait(self, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

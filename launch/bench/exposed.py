"""A trace of one forward and backward on a GPU, and which of its communication is exposed.

A message is exposed while it runs and no other kernel does. A message that waits for another rank
counts as running: that rank is late, or this one early.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nsa_dist.comm.collectives import MARK

Span = tuple[float, float]
"""Beginning and end, in microseconds."""

# FSDP2's own ranges, whose names go on with a module's.
_FSDP = {
    "FSDP::all_gather": "FSDP's weights",
    "FSDP::post_backward_reduce": "FSDP's gradients",
    "FSDP::post_backward_rs_wait": "FSDP's gradients",
}


@dataclass(frozen=True)
class Exposed:
    """Milliseconds of one trace.

    Attributes:
        total: from the first kernel's beginning to the last one's end.
        compute: in which a kernel that sends nothing runs.
        idle: in which nothing runs: the device waits for the host.
        running, exposed: by kind of message, in which such a message runs, and in which nothing
            else does.
        launches: number of kernels.
        parts: by name of ``part_of``, in which a kernel of such a range runs that sends nothing.
    """

    total: float
    compute: float
    idle: float
    running: Mapping[str, float]
    exposed: Mapping[str, float]
    launches: int
    parts: Mapping[str, float] = field(default_factory=dict)


def record(run: Callable[[], Any], path: Path | None) -> Exposed:
    """Run once under torch's profiler, after a warm-up.

    Args:
        path: where to write the trace, which https://ui.perfetto.dev opens; None: nowhere.
    """
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    if path is not None:
        profile.export_chrome_trace(str(path))
        return exposed(json.loads(path.read_text())["traceEvents"])
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(own))
        return exposed(json.loads(own.read_text())["traceEvents"])


def message_of(name: str) -> str | None:
    """The kind of message that a range stands for, of ours or of FSDP2's, or None."""
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    return _FSDP.get(name.partition(" ")[0])


def _of_no_part(name: str) -> None:
    """The parts of a trace of messages alone."""


def exposed(
    events: Iterable[Mapping[str, Any]], part_of: Callable[[str], str | None] = _of_no_part
) -> Exposed:
    """The times of a trace's events. Kernels of NCCL outside of such messages have kind ``other``.

    A kernel is of the innermost range that was open on the thread of the host that launched it.

    Args:
        part_of: the part of the computation that a range stands for, by the range's name, or None.

    Raises:
        ValueError: if no kernel is among them.
    """
    kernels: list[tuple[Span, Any, str]] = []
    launched: dict[Any, tuple[Any, float]] = {}
    messages = _Ranges()
    parts = _Ranges()
    for event in events:
        of, name = event.get("cat"), str(event.get("name"))
        launch = event.get("args", {}).get("correlation")
        thread = (event.get("pid"), event.get("tid"))
        if of in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((span_of(event), launch, name))
        elif of in ("cuda_runtime", "cuda_driver"):
            launched[launch] = thread, float(event["ts"])
        elif of == "user_annotation":
            messages.add(thread, span_of(event), message_of(name))
            parts.add(thread, span_of(event), part_of(name))
    if not kernels:
        raise ValueError("a trace must have kernels, got none: is the profiler without CUPTI?")
    of_kinds: dict[str, list[Span]] = {}
    of_parts: dict[str, list[Span]] = {}
    compute: list[Span] = []
    for span, launch, name in kernels:
        thread, at = launched.get(launch, (None, 0.0))
        if "nccl" in name.lower():
            of_kinds.setdefault(messages.innermost(thread, at) or "other", []).append(span)
            continue
        compute.append(span)
        part = parts.innermost(thread, at)
        if part is not None:
            of_parts.setdefault(part, []).append(span)
    everything = merged([span for span, *_ in kernels])
    busy = merged(compute)
    by_kind = {kind: merged(spans) for kind, spans in of_kinds.items()}
    total = everything[-1][1] - everything[0][0]
    return Exposed(
        total / 1e3,
        length(busy) / 1e3,
        (total - length(everything)) / 1e3,
        {kind: length(spans) / 1e3 for kind, spans in by_kind.items()},
        {kind: (length(spans) - common(spans, busy)) / 1e3 for kind, spans in by_kind.items()},
        len(kernels),
        {name: length(merged(spans)) / 1e3 for name, spans in of_parts.items()},
    )


class _Ranges:
    """Named ranges of the host's threads."""

    def __init__(self) -> None:
        self._of_threads: dict[Any, list[tuple[Span, str]]] = {}
        self._starts: dict[Any, list[float]] = {}

    def add(self, thread: Any, span: Span, name: str | None) -> None:
        if name is not None:
            self._of_threads.setdefault(thread, []).append((span, name))

    def innermost(self, thread: Any, at: float) -> str | None:
        """The name of the range that began last of those that are open at a time, or None."""
        if not self._starts:
            for each, ranges in self._of_threads.items():
                ranges.sort()
                self._starts[each] = [start for (start, _), _ in ranges]
        ranges = self._of_threads.get(thread, [])
        for (_, end), name in reversed(ranges[: bisect_right(self._starts.get(thread, []), at)]):
            if at <= end:
                return name
        return None


def span_of(event: Mapping[str, Any]) -> Span:
    """When an event begins and ends."""
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def common(a: Sequence[Span], b: Sequence[Span]) -> float:
    """The time that both have; each without overlaps and in order."""
    found, at = 0.0, 0
    for start, end in a:
        while at < len(b) and b[at][1] <= start:
            at += 1
        other = at
        while other < len(b) and b[other][0] < end:
            found += max(0.0, min(end, b[other][1]) - max(start, b[other][0]))
            other += 1
    return found

"""A trace of one forward and backward on a GPU, and which of its communication is exposed.

A message is exposed while it runs and no other kernel does. A message that waits for another rank
counts as running: that rank is late, or this one early.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa_dist.comm.collectives import MARK

Span = tuple[float, float]
"""Beginning and end, in microseconds."""


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
    """

    total: float
    compute: float
    idle: float
    running: Mapping[str, float]
    exposed: Mapping[str, float]
    launches: int


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


def exposed(events: Iterable[Mapping[str, Any]]) -> Exposed:
    """The times of a trace's events. Kernels of NCCL outside of our messages have kind ``other``.

    A kernel's message is the one whose mark was open on the thread of the host that launched it.

    Raises:
        ValueError: if no kernel is among them.
    """
    kernels: list[tuple[Span, Any, str]] = []
    launched: dict[Any, tuple[Any, float]] = {}
    marks: dict[Any, list[tuple[Span, str]]] = {}
    for event in events:
        of, name = event.get("cat"), str(event.get("name"))
        launch = event.get("args", {}).get("correlation")
        thread = (event.get("pid"), event.get("tid"))
        if of in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((_span(event), launch, name))
        elif of in ("cuda_runtime", "cuda_driver"):
            launched[launch] = thread, float(event["ts"])
        elif of == "user_annotation" and name.startswith(MARK):
            marks.setdefault(thread, []).append((_span(event), name.removeprefix(MARK)))
    if not kernels:
        raise ValueError("a trace must have kernels, got none: is the profiler without CUPTI?")
    messages: dict[str, list[Span]] = {}
    compute: list[Span] = []
    for span, launch, name in kernels:
        if "nccl" not in name.lower():
            compute.append(span)
            continue
        thread, at = launched.get(launch, (None, 0.0))
        kinds = [kind for (start, end), kind in marks.get(thread, ()) if start <= at <= end]
        messages.setdefault(kinds[-1] if kinds else "other", []).append(span)
    everything = merged([span for span, *_ in kernels])
    busy = merged(compute)
    by_kind = {kind: merged(spans) for kind, spans in messages.items()}
    total = everything[-1][1] - everything[0][0]
    return Exposed(
        total / 1e3,
        length(busy) / 1e3,
        (total - length(everything)) / 1e3,
        {kind: length(spans) / 1e3 for kind, spans in by_kind.items()},
        {kind: (length(spans) - common(spans, busy)) / 1e3 for kind, spans in by_kind.items()},
        len(kernels),
    )


def _span(event: Mapping[str, Any]) -> Span:
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

"""What is exposed in a trace."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.bench.distributed import DistributedOptions, RanksMeter, bench
from launch.bench.exposed import common, exposed, merged
from nsa_dist.comm.group import context_group
from tests.distributed.ranks import Ranks

HOST, STREAM = 1, 7


def kernel(name: str, start: float, end: float, launch: int = 0) -> dict[str, Any]:
    times = {"ts": start, "dur": end - start, "pid": 0, "tid": STREAM}
    return {"cat": "kernel", "name": name, "args": {"correlation": launch}, **times}


def launched(launch: int, at: float, thread: int = HOST) -> dict[str, Any]:
    times = {"ts": at, "dur": 1, "pid": 1, "tid": thread}
    kind = {"cat": "cuda_driver", "name": "cuLaunchKernelEx"}
    return {**kind, "args": {"correlation": launch}, **times}


def mark(kind: str, start: float, end: float, thread: int = HOST) -> dict[str, Any]:
    times = {"ts": start, "dur": end - start, "pid": 1, "tid": thread}
    return {"cat": "user_annotation", "name": f"nsa_dist.{kind}", **times}


TRACE = [
    kernel("window", 0, 1000),
    kernel("selected", 1500, 3000),
    # Ends behind the window; nothing runs for 500 microseconds.
    mark("fetch", 20, 40),
    launched(1, 30),
    kernel("ncclDevKernel_SendRecv", 400, 1200, 1),
    mark("fetch", 50, 60),
    launched(2, 55),
    kernel("ncclDevKernel_SendRecv", 1600, 1900, 2),
    mark("fetch_grad", 70, 90),
    launched(3, 80),
    kernel("ncclDevKernel_SendRecv", 3000, 3100, 3),
    # Of another library: between our marks, and beside one of another thread.
    launched(4, 95),
    mark("gather", 0, 4000, HOST + 1),
    kernel("ncclDevKernel_AllGather", 2000, 3200, 4),
    {"cat": "cpu_op", "name": "nsa_dist.fetch", "ts": 0, "dur": 5000, "pid": 1, "tid": HOST},
    {"ph": "M", "name": "process_name"},
]


def test_times_of_a_trace() -> None:
    found = exposed(TRACE)
    assert found.total == 3.2
    assert found.compute == 2.5
    assert found.idle == pytest.approx(0.3)
    assert found.running == pytest.approx({"fetch": 1.1, "fetch_grad": 0.1, "other": 1.2})
    assert found.exposed == pytest.approx({"fetch": 0.2, "fetch_grad": 0.1, "other": 0.2})
    assert found.launches == 6


def test_spans() -> None:
    assert merged([(3, 4), (0, 1), (1, 2), (3.5, 6)]) == [(0, 2), (3, 6)]
    assert common([(0, 2), (3, 6)], [(1, 4), (5, 7)]) == 3
    assert common([(0, 9)], [(1, 2), (3, 4)]) == 2
    assert common([], [(0, 1)]) == 0


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="a trace must have kernels, got none"):
        exposed(TRACE[-2:])


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trace must be None or an existing folder, got"):
        DistributedOptions(trace=tmp_path / "none")


def traced(options: DistributedOptions) -> None:
    context = context_group(dist.group.WORLD)
    rows, wrong = bench(options, context, RanksMeter(5, context))
    assert rows and not wrong


@pytest.mark.multi_gpu
def test_a_trace_on_gpus(tmp_path: Path) -> None:
    options = DistributedOptions(
        lengths=(16384,), heads=16, kv_heads=4, trace=tmp_path, dense=False
    )
    ranks = Ranks(torch.cuda.device_count(), timedelta(seconds=120), "nccl")
    try:
        ranks.run(traced, options)
    finally:
        ranks.close()
    found = exposed(json.loads((tmp_path / "nsa-16384.json").read_text())["traceEvents"])
    # Every kind is told apart: no message is left without its name.
    kinds = {"plan", "halo", "gather", "request", "fetch", "fetch_grad", "gather_grad", "halo_grad"}
    assert kinds <= set(found.running)
    assert 0 <= sum(found.exposed.values()) < found.total

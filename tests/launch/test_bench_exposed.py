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


def event(name: str, start: float, end: float, stream: int, cat: str = "kernel") -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": start, "dur": end - start, "pid": 0, "tid": stream}


def mark(kind: str, start: float, end: float) -> dict[str, Any]:
    return event(f"nsa_dist.{kind}", start, end, 20, "gpu_user_annotation")


TRACE = [
    event("window", 0, 1000, 7),
    event("selected", 1500, 3000, 7),
    # Ends behind the window; nothing runs for 500 microseconds.
    mark("fetch", 400, 1200),
    event("ncclDevKernel_SendRecv", 400, 1200, 20),
    mark("fetch", 1600, 1900),
    event("ncclDevKernel_SendRecv", 1600, 1900, 20),
    mark("fetch_grad", 3000, 3100),
    event("ncclDevKernel_SendRecv", 3000, 3100, 20),
    # Of another library: no mark of ours, and a mark of another stream.
    event("ncclDevKernel_AllGather", 2000, 3200, 21),
    mark("gather", 0, 4000) | {"tid": 22},
    {"cat": "cpu_op", "name": "nsa_dist.fetch", "ts": 0, "dur": 5000, "pid": 1, "tid": 1},
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
    pytest.importorskip("ring_flash_attn")
    options = DistributedOptions(lengths=(16384,), heads=16, kv_heads=4, trace=tmp_path)
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

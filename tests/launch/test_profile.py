"""Steps under torch's profiler: the trace, and the table of where the time goes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.reporting.profile import StepProfiler, StepTimes, step_times
from launch.settings import RunSettings
from nsa_dist import NativeSparseAttention, NSAConfig
from nsa_dist.attention.ranges import MARK, ranged
from tests.distributed.ranks import Ranks
from tests.launch.bench.test_bench_exposed import kernel, launched
from tests.launch.common import run_training, tiny

OPERATORS = ["compress", "compressed attention", "select blocks", "selected attention"]
OPERATORS += ["window attention", "combine"]


def annotation(name: str, start: float, end: float, thread: int = 1) -> dict[str, Any]:
    times = {"ts": start, "dur": end - start, "pid": 1, "tid": thread}
    return {"cat": "user_annotation", "name": name, **times}


HOST = [
    annotation("train.step 7", 0, 1000),
    annotation("FSDP::all_gather (blocks.0)", 0, 100),
    annotation("FSDP::all_gather_copy_out (blocks.0)", 100, 150),
    annotation("nsa_kernels.window_attention", 200, 300),
    annotation("nsa_dist.fetch", 300, 320),
    annotation("nsa_dist.fetch", 350, 400),
    # Computed again in backward: a forward in a backward.
    annotation("nsa_kernels.window_attention backward", 400, 700),
    annotation("nsa_kernels.window_attention", 450, 500),
    annotation("Optimizer.step#AdamW.step", 800, 900),
    annotation("train.step 8", 1000, 3000),
    annotation("nsa_kernels.combine", 2000, 2500),
    # Of a thread that runs no step: batches made ahead, a checkpoint that is written.
    annotation("nsa_kernels.combine", 0, 3000, thread=2),
    {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500, "pid": 1, "tid": 1},
    {"ph": "M", "name": "process_name"},
]


def test_times_of_a_host() -> None:
    found = step_times(HOST, 2)
    assert found.total == 1.5
    assert found.parts == pytest.approx(
        {
            ("window attention", "forward"): 0.075,
            ("window attention", "backward"): 0.125,
            ("optimizer", "forward"): 0.05,
            ("combine", "forward"): 0.25,
        }
    )
    assert found.running == found.exposed == pytest.approx({"FSDP's weights": 0.05, "fetch": 0.035})
    assert found.rest == pytest.approx(1.5 - 0.5 - 0.085)
    assert found.idle is None


def test_times_of_a_device() -> None:
    found = step_times(
        [
            annotation("nsa_kernels.window_attention", 0, 10),
            launched(1, 5),
            kernel("window", 100, 200, 1),
            annotation("nsa_kernels.window_attention backward", 20, 40, thread=2),
            launched(2, 30, thread=2),
            kernel("window_backward", 300, 500, 2),
            annotation("FSDP::all_gather (blocks.1)", 50, 60),
            launched(3, 55),
            kernel("ncclDevKernel_AllGather", 150, 350, 3),
            launched(4, 70),
            kernel("matmul", 500, 900, 4),
        ],
        1,
    )
    assert found.total == pytest.approx(0.8)
    assert found.parts == pytest.approx(
        {("window attention", "forward"): 0.1, ("window attention", "backward"): 0.2}
    )
    assert found.running == pytest.approx({"FSDP's weights": 0.2})
    assert found.exposed == pytest.approx({"FSDP's weights": 0.1})
    assert found.rest == pytest.approx(0.4)
    assert found.idle == pytest.approx(0.0)


def test_the_tables() -> None:
    parts = {("combine", "forward"): 1.0, ("combine", "backward"): 2.0}
    text = StepTimes(10.0, parts, {"fetch": 3.0}, {"fetch": 0.5}, 5.0, 1.5).text()
    assert "| combine | 1.00 | 2.00 | 30.0% |" in text
    assert "| idle | 1.50 |  | 15.0% |" in text
    assert "| fetch | 3.00 | 0.50 | 5.0% |" in text
    assert "fetch" not in StepTimes(10.0, parts, {}, {}, 5.0, None).text()


def test_operators_have_ranges_and_the_same_bits() -> None:
    layer = NativeSparseAttention(
        32, NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8), dtype=torch.float64
    )
    x = torch.randn(1, 96, 32, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    plain = run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = run()
    assert all(map(torch.equal, plain, found))
    names = {event.key for event in profile.key_averages()}
    for operator in OPERATORS:
        name = MARK + operator.replace(" ", "_")
        assert name in names
        assert (f"{name} backward" in names) == (operator != "select blocks")


def test_a_node_has_its_range_while_the_profiler_runs_alone() -> None:
    x = torch.ones(3, requires_grad=True)
    y = ranged(torch.exp, "combine")(x).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward(retain_graph=True)
    assert MARK + "combine backward" in {event.key for event in profile.key_averages()}
    y.backward()


@pytest.mark.gpu
def test_a_trace_of_a_gpu(tmp_path: Path) -> None:
    config = NSAConfig(num_heads=16, num_kv_heads=1, head_dim=64)
    layer = NativeSparseAttention(256, config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        layer(x).sum().backward()
        torch.cuda.synchronize()

    run()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    times = step_times(json.loads((tmp_path / "trace.json").read_text())["traceEvents"], 1)
    for operator in OPERATORS:
        assert times.parts[operator, "forward"] > 0
    for operator in ("compressed attention", "selected attention", "window attention"):
        assert times.parts[operator, "backward"] > 0
    assert times.rest > 0 and times.idle is not None and times.idle >= 0
    assert times.running == {}


def test_a_run_writes_a_trace_and_a_table(ranks_of: Any, root: Path, tmp_path: Path) -> None:
    profile = {"profile": True, "profile_after": 1, "profile_steps": 2, "profile_ranks": "all"}
    run = {"steps": 4, "folder": str(tmp_path / "run"), "validation_streams": 1, **profile}
    run["timeout"] = 170.0
    started: Ranks = ranks_of(2)
    losses = [r.losses for r in started.run(run_training, tiny(root, parallel={"cp": 2}, run=run))]
    plain = tiny(root, parallel={"cp": 2}, run={"steps": 4, "folder": str(tmp_path / "plain")})
    assert losses == [r.losses for r in started.run(run_training, plain)]
    folder = tmp_path / "run" / "profile"
    names = {f"rank_{rank:05d}" for rank in range(2)}
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{end}" for name in names for end in ("json.gz", "md")
    }
    with gzip.open(folder / "rank_00000.json.gz", "rt") as file:
        times = step_times(json.load(file)["traceEvents"], 2)
    # Everything that a step does has its row.
    assert {name for name, _ in times.parts} == {*OPERATORS, "optimizer"}
    kinds = {"plan", "halo", "gather", "request", "fetch", "fetch_grad", "gather_grad", "halo_grad"}
    assert {*kinds, "FSDP's weights", "FSDP's gradients"} == set(times.running)
    assert all(ms > 0 for ms in (*times.parts.values(), *times.running.values(), times.rest))
    text = (folder / "rank_00000.md").read_text()
    assert text.startswith(f"steps 2 to 3 on rank 0: {times.total:.1f} ms a step")


def recorded(folder: Path, stops_after: int, first_step: int = 0, after: int = 2) -> list[str]:
    """What is said where two of four steps are to be recorded, and some have run."""
    run = RunSettings(steps=4, profile=True, profile_after=after, profile_steps=2)
    said: list[str] = []
    ranks: Any = SimpleNamespace(rank=0, is_main=True, device=torch.device("cpu"))
    profiler = StepProfiler(run, folder, ranks, first_step, said.append)
    for step in range(first_step + 1, stops_after + 1):
        with profiler.step(step):
            pass
    profiler.end()
    profiler.end()
    return said


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    assert recorded(tmp_path, 2) == []
    (text,) = recorded(tmp_path, 3)
    assert text.startswith("steps 3 to 3 on rank 0")
    (text,) = recorded(tmp_path, 4)
    assert text.startswith("steps 3 to 4 on rank 0")
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "rank_00000.json.gz",
        "rank_00000.md",
    ]


def test_too_few_steps_are_left(tmp_path: Path) -> None:
    said = recorded(tmp_path, 4, first_step=2)
    assert said == ["profile: nothing is recorded, as only 2 steps are left"]
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_counts_from_where_it_begins(tmp_path: Path) -> None:
    (text,) = recorded(tmp_path, 4, first_step=2, after=0)
    assert text.startswith("steps 3 to 4 on rank 0")


def test_a_folder_that_cannot_be_written_to_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("")
    assert recorded(tmp_path, 4) == []
    assert "profile of steps 3 to 4 on rank 0: not written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"profile_steps": 5}, "run.profile_steps must be 3 without run.profile, got 5"),
        ({"profile": True, "profile_steps": 0}, "run.profile_steps must be at least 1, got 0"),
        (
            {"profile": True, "steps": 12},
            r"run.steps must be at least run.profile_after \+ run.profile_steps = 13 with",
        ),
    ],
)
def test_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(root, run=options)

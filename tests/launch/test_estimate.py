"""Estimates: bytes against counted ones of real runs, memory and time against measured ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from launch import estimate
from launch.bench.distributed import DistributedRow
from launch.bench.options import random_choices
from launch.bench.table import Row, read_rows
from launch.estimating.choices import carried_tokens, fetched_tokens, full_gather_tokens
from launch.estimating.costs import read_rates
from launch.estimating.estimates import Estimate, EstimateOptions, EstimateSettings, estimates
from launch.estimating.memory import attention_memory
from launch.estimating.schedule import exposed_in_backward, exposed_in_forward
from launch.estimating.traffic import SplitOptions, count_traffic, plans_of_all, split_stream
from launch.processes.ranks import start_ranks
from launch.settings import ModelSettings, ParallelSettings, Settings
from launch.train import dry_run
from nsa_dist import BlockCompressor, NSAConfig, native_sparse_attention
from nsa_dist.comm.nodes import nodes_of_neighbours
from tests.distributed.layer_case import SMALL, LayerCase, run_layer, variants
from tests.distributed.ranks import Ranks
from tests.launch.common import tiny, write_documents

RanksOf = Callable[[int], Ranks]
DOCS = Path(__file__).resolve().parents[2] / "docs"
PLAIN_RATES = DOCS / "benchmarks" / "h200_plain.csv"
"""Measured with the kernels of every GPU, before those for Hopper."""
MEASURED = NSAConfig(64, 4, 128)
"""The config of docs/benchmarks.md and docs/performance.md."""


def counted(
    case: LayerCase, options: SplitOptions, ranks_per_node: int | None = None
) -> tuple[dict[str, int], torch.Tensor | None]:
    given = {"fetch": options.fetch, "fetch_again": options.fetch_again}
    given |= {"ranks_per_node": ranks_per_node}
    result = run_layer(case, dist.group.WORLD, **given)
    return result.received, result.selected


CASES = {
    "zigzag": LayerCase(length=160),
    "contiguous": LayerCase(layout="contiguous", length=160, dtype=torch.float32),
    "per-document": LayerCase(layout="zigzag_per_document", length=160),
    "uneven": LayerCase(length=184),
    "shared": variants(LayerCase(length=160), independent_kv=False),
    "selected-alone": variants(LayerCase(length=160), branches=("selected",)),
    "window-alone": variants(LayerCase(length=160), branches=("window",)),
}


BYTES = [(name, 2 + 2 * (at % 2), SplitOptions()) for at, name in enumerate(CASES)]
BYTES += [
    ("zigzag", 4, SplitOptions(fetch_again=True)),
    ("contiguous", 2, SplitOptions("full", fetch_again=True)),
    ("per-document", 4, SplitOptions("full")),
]


@pytest.mark.parametrize(("name", "size", "options"), BYTES, ids=str)
def test_bytes_are_those_that_a_run_counts(
    name: str, size: int, options: SplitOptions, ranks_of: RanksOf
) -> None:
    case = CASES[name]
    answers = ranks_of(size).run(counted, case, options)
    boundaries = torch.tensor([0, case.length]).int()
    stream = split_stream(case.layout, size, case.length, boundaries)
    plans = plans_of_all(case.config, case.layout, size, case.length, boundaries)
    selected = answers[0][1]
    chosen: Any = "all" if selected is None or options.fetch == "full" else selected[0]
    fetched = fetched_tokens(case.config, stream, size, chosen)
    element_size = torch.finfo(case.dtype).bits // 8
    traffic = count_traffic(case.config, plans, fetched, element_size, options)
    for rank, (received, _) in enumerate(answers):
        found = {kind: int(traffic.of_rank(kind)[rank]) for kind in traffic.received}
        found["plan"] += found.pop("plan_grad")
        found["fetch"] += found.pop("fetch_again")
        assert not found.pop("share_again")
        assert {k: n for k, n in found.items() if n} == {k: n for k, n in received.items() if n}


@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_bytes_over_nodes_are_those_that_a_run_counts(name: str, ranks_of: RanksOf) -> None:
    case, options, nodes = CASES[name], SplitOptions(fetch_again=True), nodes_of_neighbours(2, 4)
    assert nodes is not None
    answers = ranks_of(4).run(counted, case, options, 2)
    boundaries = torch.tensor([0, case.length]).int()
    stream = split_stream(case.layout, 4, case.length, boundaries)
    plans = plans_of_all(case.config, case.layout, 4, case.length, boundaries)
    assert answers[0][1] is not None
    chosen = answers[0][1][0]
    fetched = fetched_tokens(case.config, stream, 4, chosen)
    carried = carried_tokens(case.config, stream, nodes, chosen)
    traffic = count_traffic(
        case.config, plans, fetched, case.dtype.itemsize, options, nodes, carried
    )
    for rank, (received, _) in enumerate(answers):
        found = {kind: int(traffic.of_rank(kind)[rank]) for kind in traffic.received}
        found["plan"] += found.pop("plan_grad")
        for kind in ("fetch", "share"):
            found[kind] += found.pop(f"{kind}_again")
        assert {k: n for k, n in found.items() if n} == {k: n for k, n in received.items() if n}


def test_random_choices_are_those_of_the_draws() -> None:
    """The mean over draws against three draws, where queries are too few to want everything."""
    config = replace(SMALL, num_selected=8, select_block=4)
    length, size = 2048, 32
    for layout in ("contiguous", "zigzag"):
        stream = split_stream(layout, size, length, None)
        expected = fetched_tokens(config, stream, size, "random")
        draws = [random_choices(length, config, "cpu") for _ in range(3)]
        found = sum(fetched_tokens(config, stream, size, draw) for draw in draws) / 3
        everything = fetched_tokens(config, stream, size, "all")
        coherent = fetched_tokens(config, stream, size, "coherent")
        assert abs(float(expected.sum() / found.sum()) - 1) < 0.03
        assert expected.sum() < 0.9 * everything.sum()
        assert coherent.sum() < 0.7 * expected.sum()
        assert bool((expected <= everything + 1e-9).all())
        full = full_gather_tokens(stream, size) * config.num_kv_heads
        assert float(everything.sum((1, 2)).max()) <= full


def test_choices_stay_within_documents() -> None:
    boundaries = torch.tensor([0, 64, 128, 192, 256]).int()
    stream = split_stream("contiguous", 4, 256, boundaries)
    for choices in ("all", "random", "coherent"):
        assert fetched_tokens(SMALL, stream, 4, choices).sum() == 0  # type: ignore[arg-type]
    stream = split_stream("contiguous", 2, 256, torch.tensor([0, 96, 256]).int())
    fetched = fetched_tokens(SMALL, stream, 2, "all")
    # The second document's first 32 tokens stand on rank 0.
    assert fetched[1].tolist() == [[32.0] * SMALL.num_kv_heads, [0.0] * SMALL.num_kv_heads]
    assert fetched[0].sum() == 0


def run_of(parallel: ParallelSettings | None = None, **options: Any) -> EstimateSettings:
    return EstimateSettings(
        attention=MEASURED,
        model=ModelSettings(layers=1, hidden_size=256, mlp_hidden=512),
        parallel=parallel or ParallelSettings(cp=2),
        estimate=EstimateOptions(**options),
    )


def test_bytes_and_time_are_those_measured_on_two_gpus() -> None:
    """docs/benchmarks/h200_ring.csv, of plain kernels: bytes within 1%, times within 10%."""
    rows = read_rows(DOCS / "benchmarks" / "h200_ring.csv", DistributedRow)
    rows = [row for row in rows if row.operator == "nsa"]
    lengths = tuple(row.length for row in rows)
    once = ParallelSettings(fetch_again="never")
    found = estimates(run_of(once, lengths=lengths, ranks=(2,), rates=str(PLAIN_RATES)), 256)
    for row, line in zip(rows, found, strict=True):
        assert row.forward_mib is not None and row.backward_mib is not None
        assert abs(line.forward_mib / row.forward_mib - 1) < 0.01
        assert abs(line.backward_mib / row.backward_mib - 1) < 0.01
        assert row.backward_ms is not None
        # Measured before anything overlapped, with another kernel of gates.
        assert abs(line.forward_open_ms / row.forward_ms - 1) < 0.1
        assert abs(line.backward_open_ms / row.backward_ms - 1) < 0.1


def test_bytes_time_and_memory_are_those_measured_on_four_gpus() -> None:
    """docs/benchmarks/h200_four.csv, of the kernels for Hopper: bytes within 1%, others 10%."""
    rows = read_rows(DOCS / "benchmarks" / "h200_four.csv", DistributedRow)
    rows = [row for row in rows if row.operator == "nsa"]
    assert [row.length for row in rows] == [131072, 1048576]
    for row in rows:
        heads, kv_heads = row.shape.heads, row.shape.kv_heads
        config = replace(MEASURED, compress="mean", num_heads=heads, num_kv_heads=kv_heads)
        run = run_of(ParallelSettings(cp=4), lengths=(row.length,), ranks=(4,))
        (line,) = estimates(replace(run, attention=config), 256)
        assert row.forward_mib is not None and row.backward_mib is not None
        assert abs(line.forward_mib / row.forward_mib - 1) < 0.01
        assert abs(line.backward_mib / row.backward_mib - 1) < 0.01
        assert row.backward_ms is not None and row.peak_gib is not None
        both = row.forward_ms + row.backward_ms
        assert abs((line.forward_ms + line.backward_ms) / both - 1) < 0.1
        assert abs(line.peak_gib / row.peak_gib - 1) < 0.1


MEMORY = {8192: 926, 16384: 1596, 32768: 2989, 65536: 5721}
"""Peak over the inputs, MiB, of mean compression and shared K, V (docs/performance.md)."""


def test_memory_is_that_measured_on_one_gpu() -> None:
    config = replace(MEASURED, compress="mean", independent_kv=False)
    for length, measured in MEMORY.items():
        (plan,) = plans_of_all(config, "zigzag", 1, length, None)
        memory = attention_memory(config, plan, 2, SplitOptions())
        assert abs(memory.peak / 2**20 / measured - 1) < 0.1
        if length == 65536:
            assert abs(memory.kept / 2**30 / 4.07 - 1) < 0.1  # docs/performance.md
    text = (DOCS / "performance.md").read_text()
    assert "| measured, MiB | " + " | ".join(map(str, MEMORY.values())) + " | |" in text
    assert "kept for backward, GiB | 5.07 | 4.07 |" in text


def test_memory_is_that_measured_on_one_hopper_gpu() -> None:
    """docs/benchmarks/h200_peers.csv, of the kernels for Hopper, within 10%."""
    rows = [
        row
        for row in read_rows(DOCS / "benchmarks" / "h200_peers.csv", Row)
        if row.operator == "whole"
    ]
    assert len({(row.length, row.shape.heads) for row in rows}) == 5
    for row in rows:
        heads, kv_heads = row.shape.heads, row.shape.kv_heads
        config = NSAConfig(heads, kv_heads, 128, compress="mean", independent_kv=False)
        (plan,) = plans_of_all(config, "zigzag", 1, row.length, None)
        memory = attention_memory(config, plan, 2, SplitOptions())
        assert row.peak_gib is not None
        assert abs(memory.peak / 2**30 / row.peak_gib - 1) < 0.1


def test_what_the_schedule_hides() -> None:
    """Numbers by hand, of two KV heads and three halos."""
    config = NSAConfig(8, 2, 64)
    messages = {"plan": 1.0, "halo": 6.0, "gather": 4.0, "request": 2.0}
    messages |= {"fetch": 8.0, "share": 2.0}
    kernels = {
        "compression": 3.0,
        "window_attention": 5.0,
        "compressed_attention": 2.0,
        "selected_attention": 8.0,
    }
    # plan, a halo of 2, 1 of the other two, gather; request, a wait of 3 and a head's 5 behind 5
    # of the window; the other head's 5 behind 4.
    assert exposed_in_forward(config, messages, kernels, 3, 3.0) == 1 + 2 + 1 + 4 + 5 + 1
    alone = replace(config, branches=("window", "compressed"))
    assert exposed_in_forward(alone, messages, kernels, 3, 0.0) == 1 + 2 + 1
    back = {"plan_grad": 1.0, "halo_grad": 6.0, "gather_grad": 4.0, "share_again": 0.0}
    back |= {"share_grad": 4.0, "fetch_grad": 12.0}
    # The last head's 8 behind 4 of the first, whose 8 are behind 7 of the other branches.
    expected = 1 + 2 + 1 + 4 + 4 + 1
    assert exposed_in_backward(config, back | {"fetch_again": 0.0}, kernels, 3) == expected
    # Fetched again: 3 in the open, then 3 behind 4.
    assert exposed_in_backward(config, back | {"fetch_again": 6.0}, kernels, 3) == expected + 3


def test_options_of_the_split_change_what_is_estimated() -> None:
    def of(**options: Any) -> Estimate:
        parallel = ParallelSettings(**options)
        (line,) = estimates(run_of(parallel, lengths=(32768,), ranks=(4,)), 256)
        return line

    usual, once, full = of(), of(fetch_again="never"), of(fetch="full")
    assert of(fetch_again="always") == usual  # With four KV heads it is what layers do by default.
    # Not its sum: another rank fetches most than the one to which most returns.
    assert once.backward_mib < usual.backward_mib < once.backward_mib + once.fetch_mib
    assert usual.kept_gib < once.kept_gib
    assert full.request_mib == 0 < once.request_mib
    assert full.fetch_mib >= once.fetch_mib
    assert full.forward_ms < once.forward_ms  # The host waits for no sizes.
    less = of(recompute_branches=("window", "selected", "compressed"))
    result = 32768 / 4 * 64 * (128 * 2 + 4)
    assert less.kept_gib == pytest.approx(usual.kept_gib - 3 * result / 2**30)
    assert less.backward_ms > usual.backward_ms


def test_time_grows_and_overlap_hides() -> None:
    lines = estimates(
        run_of(lengths=(131072, 1 << 20), ranks=(4, 32), layouts=("contiguous", "zigzag")), 256
    )
    for line in lines:
        assert 0 < line.forward_ms < line.forward_open_ms
        assert 0 < line.backward_ms < line.backward_open_ms
        assert 0 <= line.exposed < line.exposed_open < 1
        assert all(math.isfinite(x) for x in vars(line).values() if isinstance(x, float))
    by = {(line.length, line.ranks, line.layout): line for line in lines}
    for length in (131072, 1 << 20):
        contiguous, zigzag = (by[length, 4, name] for name in ("contiguous", "zigzag"))
        assert contiguous.imbalance > 0.4 > 0.02 > zigzag.imbalance
        # Causality leaves a half of a gather to contiguous chunks and three quarters to zigzag.
        assert abs(contiguous.fetch_share_mean - 0.5) < 0.01
        assert abs(zigzag.fetch_share_mean - 0.75) < 0.01
    assert by[1 << 20, 32, "zigzag"].far_mib > 0
    assert by[131072, 4, "zigzag"].far_mib == 0


def test_rates_are_of_the_nearest_shape_and_between_lengths() -> None:
    rates = read_rates(PLAIN_RATES, MEASURED)
    low, high = rates.at("compressed_attention", 65536), rates.at("compressed_attention", 131072)
    between = rates.at("compressed_attention", 92682)
    assert between[0] == pytest.approx((low[0] + high[0]) / 2, rel=1e-4)
    assert rates.at("compressed_attention", 1 << 22) == high
    assert read_rates(PLAIN_RATES, NSAConfig(32, 2, 128)).at("compressed_attention", 1)[
        0
    ] == pytest.approx(364, abs=1)


def test_the_program_prints_a_table_and_writes_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.csv"
    config = DOCS.parent / "configs" / "default.toml"
    more = ["--data.length", "4096", "--estimate.ranks", "1", "2", "--estimate.csv", str(path)]
    estimate.main([str(config), *more])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("| tokens | ranks | layout")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["length"], row["ranks"]) for row in rows] == [("4096", "1"), ("4096", "2")]
    assert float(rows[0]["forward_mib"]) == 0 < float(rows[1]["forward_mib"])


def test_recorded_choices_are_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    config = replace(MEASURED, select_block=64)
    chosen = random_choices(8192, config, "cpu").transpose(0, 1)[None].numpy()
    path = tmp_path / "choices.npz"
    numpy.savez(path, selected=chosen, select_block=64)
    (line,) = estimates(run_of(lengths=(8192,), ranks=(4,), choices=(str(path),)), 256)
    (all_blocks,) = estimates(run_of(lengths=(8192,), ranks=(4,), choices=("all",)), 256)
    assert line.choices == "choices"
    assert 0.5 < line.fetch_share <= all_blocks.fetch_share


def described(settings: Settings) -> list[str]:
    lines: list[str] = []
    with mock.patch("builtins.print", lambda *words, **_: lines.extend(map(str, words))):
        dry_run(settings, start_ranks(settings))
    return lines


def test_a_dry_run_says_what_a_run_would_cost(tmp_path: Path, ranks_of: RanksOf) -> None:
    write_documents(tmp_path)
    settings = tiny(tmp_path, run={"dry_run": True}, parallel={"cp": 2})
    first, other = ranks_of(2).run(described, settings)
    assert other == []
    assert first[0] == "2 processes on cpu, pp 1 x dp 1 x cp 2 x tp 1, neighbours last"
    text = "\n".join(first)
    # 150 tokens, padded to a multiple of four; two streams a step.
    assert "layout: zigzag, 152 tokens over 2 ranks, 76 each" in text
    assert "step: 300 tokens, 2 micro-batches a replica" in text
    for name in ("memory of a rank", "received in an attention call", "time of a step"):
        assert f"\n{name}: " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents"]
    with pytest.raises(ValueError, match=r"run\.dry_run must be False with dense layers"):
        tiny(tmp_path, run={"dry_run": True}, model={"dense_every": 2})


def test_exact_gradients_have_no_estimate() -> None:
    parallel = ParallelSettings(exact_gradients=4)
    with pytest.raises(ValueError, match=r"parallel\.exact_gradients must be 0 .*, got 4"):
        estimates(run_of(parallel, lengths=(1024,)), 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choices": ("some",)}, r"estimate\.choices must be one of all, random, coherent or an"),
        ({"lengths": (0,)}, r"estimate\.lengths must be at least 1"),
        ({"link": 0.0}, r"estimate\.link must be a positive number of GB/s"),
        ({"rates": "nowhere.csv"}, r"estimate\.rates must be a CSV of launch/bench/operators\.py"),
        (
            {"lengths": (1001,)},
            r"estimate\.lengths: sequence length must be a multiple of 4|document",
        ),
        (
            {"lengths": (1000,), "documents": 3},
            r"estimate\.lengths must be a multiple of estimate\.d",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        estimates(run_of(**options), 256)


def peak_and_kept(length: int) -> tuple[float, float, float, float]:
    """Measured peak over the inputs and kept until backward, and their estimates, bytes."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    group, device, dtype = dist.group.WORLD, torch.device("cuda"), torch.bfloat16
    size = dist.get_world_size()
    local = length // size

    def draw(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, local, heads, width, device=device, dtype=dtype, requires_grad=True)

    q, gates = draw(64, 128), torch.rand(1, local, 64, 3, device=device, requires_grad=True)
    k, v = ({branch: draw(4, 128) for branch in MEASURED.branches} for _ in range(2))
    compressors = [BlockCompressor(MEASURED, 128, device=device, dtype=dtype) for _ in range(2)]
    grad = torch.randn(1, local, 64, 128, device=device, dtype=dtype)

    def both() -> tuple[float, float]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = native_sparse_attention(q, k, v, gates, *compressors, config=MEASURED, group=group)
        kept = torch.cuda.memory_allocated() - before
        wanted = [q, gates, *k.values(), *v.values()]
        torch.autograd.grad(out, wanted, grad)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, kept

    both()
    peak, kept = both()
    stream = split_stream("zigzag", size, length, None)
    fetched = fetched_tokens(MEASURED, stream, size, "random")
    rank = dist.get_rank()
    memory = attention_memory(
        MEASURED,
        plans_of_all(MEASURED, "zigzag", size, length, None)[rank],
        2,
        SplitOptions(),
        fetched=float(fetched[rank].sum()),
        sent=float(fetched[:, rank].sum()),
    )
    return peak, kept, memory.peak, memory.kept


@pytest.mark.multi_gpu
@pytest.mark.parametrize("length", [32768, 131072])
def test_memory_is_that_of_gpus(length: int) -> None:
    ranks = Ranks(2, timedelta(seconds=120), "nccl")
    try:
        answers = ranks.run(peak_and_kept, length)
    finally:
        ranks.close()
    for peak, kept, estimated_peak, estimated_kept in answers:
        assert abs(estimated_peak / peak - 1) < 0.1
        assert abs(estimated_kept / kept - 1) < 0.1

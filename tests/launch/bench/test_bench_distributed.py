"""The benchmark over ranks but for its clock: what it runs, checks, counts and refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from launch.bench import distributed
from launch.bench.distributed import (
    DistributedOptions,
    DistributedRow,
    RanksMeter,
    bench,
    candidates,
    markdown,
    with_ring_ratios,
)
from launch.bench.judges import Verdict
from launch.bench.stream import Stream
from launch.bench.table import Shape, read_rows
from nsa_dist import Sharding
from nsa_dist.comm.group import context_group
from tests.distributed.ranks import RankError, Ranks
from tests.launch.bench.test_bench import NoClock

pytestmark = pytest.mark.skipif(
    find_spec("ring_flash_attn") is None, reason="needs ring-flash-attn, not here"
)

RanksOf = Callable[[int], Ranks]
SMALL = DistributedOptions(
    lengths=(96, 128),
    heads=4,
    kv_heads=2,
    head_dim=16,
    v_head_dim=32,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=20,
    dtype="float32",
    backend="pytorch",
    layout="contiguous",
)
RUNS = {
    "contiguous": SMALL,
    "contiguous-packed": replace(SMALL, documents=2),
    "zigzag": replace(SMALL, layout="auto", dtype="bfloat16"),
    "zigzag-packed": replace(SMALL, layout="auto", dtype="bfloat16", documents=2),
}


def run_bench(options: DistributedOptions) -> tuple[list[DistributedRow], list[str]]:
    context = context_group(dist.group.WORLD)
    return bench(options, context, NoClock())  # type: ignore[arg-type]


def test_exact_gradients_are_timed_beside_the_usual_ones(ranks_of: RanksOf) -> None:
    options = replace(SMALL, lengths=(128,), dense=False, exact_gradients=4)
    (rows, wrong), _ = ranks_of(2).run(run_bench, options)
    assert wrong == []
    assert [row.operator for row in rows] == ["nsa", "nsa_exact"]
    usual, exact = rows
    assert exact.forward_mib == usual.forward_mib
    assert exact.backward_mib is not None and usual.backward_mib is not None
    assert exact.backward_mib > usual.backward_mib
    assert distributed.cost_line(rows).endswith("exact gradients cost +0.0% forward, +0.0% both")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_a_row_of_each_attention(ranks_of: RanksOf, tmp_path: Path, name: str) -> None:
    options = replace(RUNS[name], csv=tmp_path / "out.csv")
    (rows, wrong), *others = ranks_of(2).run(run_bench, options)
    assert wrong == []
    assert all(other == (rows, wrong) for other in others)
    expected = [(kind, length) for length in (96, 128) for kind in ("dense_ring", "nsa")]
    assert [(row.operator, row.length) for row in rows] == expected
    for row in rows:
        assert (row.ranks, row.layout) == (2, options.layout_name)
        assert row.forward_ms == row.backward_ms == 2.0
        assert row.error is not None and row.limit is not None and 0 < row.error <= row.limit
        assert row.peak_gib == 1.0 and row.commit
        assert row.forward_tflops is not None and row.backward_tflops is not None
        if row.operator == "nsa":
            assert row.forward_over_ring == row.both_over_ring == 1.0
    # Keys and values of one other rank, and twice these or their float32 gradients on top; and the
    # 16 bytes by which ranks agree on each pass.
    size = {"float32": 4, "bfloat16": 2}[options.dtype]
    for row in rows:
        if row.operator == "dense_ring":
            moved = row.length // 2 * 2 * (32 + 32) * size  # Widths are filled up to 32.
            back = 2 * moved if row.layout == "contiguous" else moved + 2 * 4 / size * moved
            assert row.forward_mib == (moved + 16) / 2**20
            assert row.backward_mib == (back + 16) / 2**20
    found = read_rows(tmp_path / "out.csv", DistributedRow)
    assert [(row.operator, row.length, row.ranks) for row in found] == [
        (row.operator, row.length, row.ranks) for row in rows
    ]
    text = markdown(rows)
    assert f"### 2 ranks, {options.layout_name}, a clock that stands: 4 heads" in text
    assert "| 96, nsa | 2.00 / 2.00 | 1.00 / 1.00 |" in text


def test_a_run_over_two_nodes(ranks_of: RanksOf) -> None:
    options = replace(SMALL, lengths=(160,), documents=1, dense=False, layout="auto")
    found = {}
    for ranks_per_node in (1, 2):
        of_ranks = ranks_of(4).run(run_bench, replace(options, ranks_per_node=ranks_per_node))
        ((row,), wrong) = of_ranks[0]
        assert wrong == [] and row.operator == "nsa"
        found[ranks_per_node] = row.forward_mib
    assert found[1] != found[2]
    must = "ranks_per_node must be None or a divisor of the group's 4 ranks"
    with pytest.raises(RankError, match=must):
        ranks_of(4).run(run_bench, replace(options, ranks_per_node=3))


def run_twisted(options: DistributedOptions) -> tuple[list[DistributedRow], list[str]]:
    """With gradients of one rank's keys of dense attention doubled."""
    original = distributed.dense_attention

    def twisted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        if dist.get_rank() == 1:
            k = 2 * k - k.detach()
        return original(q, k, v, **more)

    distributed.dense_attention = twisted
    try:
        return run_bench(options)
    finally:
        distributed.dense_attention = original


def test_a_wrong_result_on_one_rank_is_not_timed(ranks_of: RanksOf) -> None:
    for rows, wrong in ranks_of(2).run(run_twisted, replace(SMALL, lengths=(96,))):
        assert [row.operator for row in rows] == ["nsa"]
        assert len(wrong) == 1 and wrong[0].startswith("dense_ring at 96: error ")
        assert rows[0].forward_over_ring is None


def checked_twisted(options: DistributedOptions, what: str) -> Verdict:
    """The verdict on nsa with an error on rank 1."""
    torch.manual_seed(0)
    context = context_group(dist.group.WORLD)
    stream = Stream(options, options.lengths[0], "cpu")
    candidate = candidates(stream, options.layout_name, context)[-1]()
    attend, choose = candidate.attend, candidate.choose
    assert candidate.name == "nsa" and choose is not None
    here = dist.get_rank() == 1

    def twisted(*inputs: torch.Tensor) -> torch.Tensor:
        out = attend(*inputs)
        if here and what == "output":
            out = out * 1.01
        if here and what == "other rows":
            out = out + 1e-3 * (inputs[0].sum() - inputs[0].detach().sum())
        return out

    def chosen(*inputs: torch.Tensor) -> torch.Tensor:
        blocks = choose(*inputs)
        if here and what == "choice":  # The last query takes its earliest free block.
            last = blocks[-1]
            free = next(j for j in range(1, int(last.max())) if not (last == j).any())
            last[:, 1] = torch.where(last[:, 1] > free, free, last[:, 1])
            blocks[-1] = last.sort(-1).values
        return blocks

    if here and what.isdigit():  # The gradient of one input.
        candidate.local[int(what)].register_hook(lambda grad: 1.01 * grad)
    return replace(candidate, attend=twisted, choose=chosen).verdict()


@pytest.mark.parametrize(
    "what", ["nothing", "output", "other rows", "choice", *map(str, range(10))]
)
def test_an_error_on_one_rank_is_found(ranks_of: RanksOf, what: str) -> None:
    """Of the output, of each input's gradient, of rows without gradient, and of chosen blocks."""
    options = replace(SMALL, lengths=(256,), dense=False, layout="auto")
    first, second = ranks_of(2).run(checked_twisted, options, what)
    assert first == second and first.right == (what == "nothing")


def test_one_set_of_keys_for_all_branches(ranks_of: RanksOf) -> None:
    options = replace(SMALL, lengths=(96,), dense=False, independent_kv=False, documents=2)
    (rows, wrong), _ = ranks_of(2).run(run_bench, options)
    assert wrong == [] and [row.operator for row in rows] == ["nsa"]


def gathered_by_check(options: DistributedOptions) -> tuple[list[tuple[int, ...]], bool]:
    """Shapes of what a check gathers of whole streams."""
    context, gathered = context_group(dist.group.WORLD), []
    stream = Stream(options, options.lengths[0], "cpu")
    candidate = candidates(stream, options.layout_name, context)[-1]()
    assert not {"q", "k", "v", "gates"} & set(vars(stream))

    def unshard(sharding: Sharding, x: torch.Tensor) -> torch.Tensor:
        whole = original(sharding, x)
        gathered.append(tuple(whole.shape))
        return whole

    original = Sharding.unshard
    with mock.patch.object(Sharding, "unshard", unshard):
        right = candidate.verdict().right
    return gathered, right


def test_a_check_gathers_keys_and_values_of_one_head_at_a_time(ranks_of: RanksOf) -> None:
    options = replace(SMALL, lengths=(128,), dense=False, layout="auto")
    for gathered, right in ranks_of(2).run(gathered_by_check, options):
        assert right and set(gathered) == {(1, 128, 1, 16), (1, 128, 1, 32)}


def whole_gradients(options: DistributedOptions) -> list[list[torch.Tensor]]:
    """Of each attention, its output and the gradients of its inputs, gathered from the ranks."""
    torch.manual_seed(0)
    context = context_group(dist.group.WORLD)
    stream = Stream(options, options.lengths[0], "cpu")
    found = []
    for build in candidates(stream, options.layout_name, context):
        candidate = build()
        out = candidate.attend(*candidate.local)
        shape, sharding = (stream.length, *out.shape[1:]), candidate.sharding
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grads = torch.autograd.grad(out, candidate.local, sharding.shard(weight[None])[0])
        by_token = [out.detach(), *grads[: candidate.by_token]]
        of_weights = list(grads[candidate.by_token :])
        for x in of_weights:
            dist.all_reduce(x)
        found.append([*(sharding.unshard(x[None])[0] for x in by_token), *of_weights])
    return found


def test_gathered_runs_are_those_of_one_rank(ranks_of: RanksOf) -> None:
    """Outputs and all gradients, weights included, to rounding in float32."""
    options = replace(SMALL, lengths=(96,), documents=2)
    (expected,) = ranks_of(1).run(whole_gradients, options)
    for found in ranks_of(2).run(whole_gradients, options):
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert float((a - b).norm()) <= 64 * 2**-23 * float(b.norm())


def test_ratios_are_of_the_same_run() -> None:
    shape = Shape("a GPU", "bfloat16", 4, 2, 16, 16, 1, 8, 4, 16, 4, 20)
    rows = [
        DistributedRow(kind, length, "", ms, 3 * ms, shape, ranks=ranks, layout="zigzag")
        for kind, length, ms, ranks in (
            ("dense_ring", 64, 10.0, 2),
            ("nsa", 64, 4.0, 2),
            ("nsa", 64, 2.0, 4),
            ("nsa", 128, 5.0, 2),
        )
    ]
    ratios = [(row.forward_over_ring, row.both_over_ring) for row in with_ring_ratios(rows)]
    assert ratios == [(None, None), (2.5, 2.5), (None, None), (None, None)]


def refusal(options: DistributedOptions) -> str:
    try:
        run_bench(options)
    except ValueError as error:
        return str(error)
    return "no error"


def test_what_does_not_fit_the_ranks_is_refused_by_name(ranks_of: RanksOf) -> None:
    for options, message in (
        (replace(SMALL, lengths=(97,)), "lengths must be multiples of 2 with layout"),
        (
            replace(SMALL, lengths=(100,), documents=2, layout="zigzag_per_document"),
            "lengths must be multiples of 8 with layout",
        ),
        (replace(SMALL, layout="auto"), "layout must be 'contiguous'"),
    ):
        for found in ranks_of(2).run(refusal, options):
            assert message in found


def test_tables_go_into_a_document_that_has_a_place_for_the_file(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    with pytest.raises(ValueError, match=r"docs must be None, or with csv .*, got .*document.md'"):
        DistributedOptions(csv=tmp_path / "out.csv", docs=document)
    document.touch()
    with pytest.raises(ValueError, match=r"docs must be None, or with csv .*, got .*document.md'"):
        DistributedOptions(docs=document)
    assert DistributedOptions(csv=tmp_path / "out.csv", docs=document).docs == document


def test_a_start_without_ranks_or_gpus_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as error:
        distributed.main(["--lengths", "64"])
    assert "ranks must be started by torchrun --nproc-per-node=GPUS, got none" in str(
        error.value.code
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as error:
        distributed.main(["--lengths", "64"])
    assert "machines must have NVIDIA GPUs, got no CUDA device" in str(error.value.code)


def timed_on_gpus(options: DistributedOptions) -> tuple[list[DistributedRow], list[str]]:
    context = context_group(dist.group.WORLD)
    return bench(options, context, RanksMeter(5, context))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("documents", [1, 4])
def test_a_run_on_gpus_times_both(documents: int) -> None:
    options = DistributedOptions(
        lengths=(4096,), heads=16, kv_heads=1, documents=documents, balance=True
    )
    ranks = Ranks(2, timedelta(seconds=120), "nccl")
    try:
        (rows, wrong), (others, _) = ranks.run(timed_on_gpus, options)
    finally:
        ranks.close()
    assert wrong == []
    assert [row.operator for row in rows] == ["dense_ring", "nsa"]
    for row, other in zip(rows, others, strict=True):
        times = (row.forward_ms, row.backward_ms, row.peak_gib)
        # Of all ranks, so the same on each.
        assert times == (other.forward_ms, other.backward_ms, other.peak_gib)
        assert all(value is not None and value > 0 for value in times)
        # Nothing is faster than the GPU: what such a rate would count is wrong.
        assert row.forward_of_floor is not None and 0 < row.forward_of_floor < 1.1

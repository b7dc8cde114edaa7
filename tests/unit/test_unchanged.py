"""What is found again by a tensor: not after another batch was written into it."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from nsa_dist import NSAConfig, get_plan
from nsa_dist.attention import plan_cache
from nsa_dist.comm import fetch
from nsa_kernels import QuerySegments
from nsa_kernels.pytorch.few_queries import _queries_of
from nsa_kernels.unchanged import Seen, assert_same

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = NSAConfig(4, 2, 16)


def plan_of(cu_seqlens: Tensor, device: torch.device = CPU) -> Any:
    return get_plan(
        *(CONFIG, "contiguous", None),
        batch=1,
        local_length=int(cu_seqlens[-1]),
        cu_seqlens=cu_seqlens,
        dtype=torch.float32,
        device=device,
    )


def by_operators(x: Tensor) -> None:
    x[1] = 40


def uncounted(x: Tensor) -> None:
    """As messages of torch.distributed write: no version tells."""
    before = x._version
    x.data[1] = 40
    assert x._version == before


WRITERS = pytest.mark.parametrize("write", [by_operators, uncounted], ids=["counted", "uncounted"])


@WRITERS
def test_boundaries_written_into_a_tensor_are_read_again(write: Any) -> None:
    cu_seqlens = torch.tensor([0, 32, 64], dtype=torch.int32)
    before = plan_cache._copy_of(cu_seqlens)
    assert plan_cache._copy_of(cu_seqlens) is before
    write(cu_seqlens)
    after = plan_cache._copy_of(cu_seqlens)
    assert after.tolist() == [0, 40, 64] and before.tolist() == [0, 32, 64]
    assert plan_cache._copy_of(cu_seqlens) is after


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@WRITERS
def test_blocks_written_into_a_table_are_read_again(write: Any, inference: bool) -> None:
    if inference and write is uncounted:
        pytest.skip("nothing is counted in inference mode")
    with torch.inference_mode() if inference else nullcontext():
        segments = QuerySegments.from_rows([(0, 1, 50, 0, 0, 0)])
        rows = torch.tensor([0, 16, 32, 48])
        arguments = (None, 0, 0, 1, 8, 4, 16, 40)
        before = _queries_of(segments, rows, *arguments)
        assert _queries_of(segments, rows, *arguments) is before
        write(rows)
        after = _queries_of(segments, rows, *arguments)
        assert after is not before
        # Of the key at position 16, the first of its block.
        assert [int(x.window.rows_mK[0, 5]) for x in (before, after)] == [16, 40]
        assert _queries_of(segments, rows, *arguments) is after


def test_a_device_fails_where_values_differ() -> None:
    """On a GPU the failure comes later; the CPU shows its words."""
    values = torch.tensor([0, 3])
    assert_same(values.clone(), values, "cu_seqlens")
    with pytest.raises(RuntimeError, match="cu_seqlens must be a new tensor"):
        assert_same(values + 1, values, "cu_seqlens")


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    x = torch.tensor([0, 3], device="cuda")
    seen = Seen(x, "x")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert seen.again(x)
        x += 1
        assert not seen.again(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_plan_that_a_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan = plan_of(torch.tensor([0, 5, 70], dtype=torch.int32))
    gone = weakref.ref(plan)
    for _ in range(2):
        plan_cache._keep_if_captured(plan, torch.device("cuda", 0))
    plan_cache._keep_if_captured(plan_of(torch.tensor([0, 71], dtype=torch.int32)), CPU)
    del plan
    for length in range(1, 1 + plan_cache.CACHED_PLANS):
        plan_of(torch.tensor([0, length], dtype=torch.int32))
    assert gone() is not None and len(plan_cache._captured) == 1
    with pytest.raises(ValueError, match="must have run with these documents before a CUDA graph"):
        plan_cache._keep_if_captured(None, torch.device("cuda", 0))


def test_a_plan_is_read_on_another_stream_after_its_tables_and_keeps_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[tuple[int, object]] = []
    waited: list[object] = []
    other = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plan_cache, "_current_stream", lambda device: 2)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, to: recorded.append((id(x), to)))
    plan = plan_of(torch.tensor([0, 5, 72], dtype=torch.int32))
    made = cast(torch.cuda.Event, object())
    for streams, count in (({2}, 0), ({1}, 1)):
        entry = plan_cache._Entry((), None, plan, made, streams)
        for _ in range(2):
            entry.read_by_current_stream()
        assert waited == [made] * count
    tables = {id(plan.positions), id(plan.documents), id(plan.segments.table)}
    assert {of for of, _ in recorded} > tables
    assert len(recorded) == len({of for of, _ in recorded})
    assert all(to is other for _, to in recorded)


@pytest.mark.gpu
def test_memory_of_a_plan_waits_for_all_streams_that_read_it() -> None:
    """Else the stream that made its tables would write over them before the other one reads."""
    lengths = torch.tensor([0, 5, 70_000], dtype=torch.int32)
    other = torch.cuda.Stream()
    plan = plan_of(lengths, CUDA)
    expected = plan.positions.cpu()
    with torch.cuda.stream(other):
        found = plan_of(lengths, CUDA)
        assert found is plan
        torch.cuda._sleep(1_000_000_000)
        read = plan.positions.clone()
    del plan, found
    plan_cache._plans_of_one_rank.clear()
    overwriting = [torch.full((70_000,), -1, device=CUDA) for _ in range(8)]
    torch.cuda.synchronize()
    assert len(overwriting) == 8 and torch.equal(read.cpu(), expected)


def test_threads_share_the_plans() -> None:
    errors: list[BaseException] = []

    def run(first: int) -> None:
        try:
            for i in range(200):
                end = 1 + (first + i) % (2 * plan_cache.CACHED_PLANS)
                assert plan_of(torch.tensor([0, end], dtype=torch.int32)).local_length == end
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(plan_cache._plans_of_one_rank) <= plan_cache.CACHED_PLANS


def test_hooks_that_copy_on_a_gpu_keep_fetched_blocks() -> None:
    """A copy on a stream of its own would read memory that was given back."""
    host, gpu = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda:0"))
    assert not fetch._hooks_read_later(gpu)
    with save_on_cpu():
        assert fetch._hooks_read_later(gpu)
        assert not fetch._hooks_read_later(host)  # Where copies are done when the hook returns.
    found = []

    def forward(x: Tensor) -> Tensor:
        found.append(fetch._hooks_read_later(gpu))
        return x.sin()

    x = torch.zeros(2, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert found == [False, False]  # In the recomputation as well.

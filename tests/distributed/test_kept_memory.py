"""What a call keeps for its backward, against the formula of docs/distributed.md, which
launch/estimate.py computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from launch.estimating.memory import attention_memory
from launch.estimating.traffic import SplitOptions
from nsa_dist import (
    BRANCHES,
    BlockCompressor,
    CommunicationCounter,
    NSAConfig,
    get_plan,
    native_sparse_attention,
)
from nsa_dist.plan import Plan
from tests.distributed.ranks import Ranks
from tests.ops.backends import INTERPRETED

SMALL = NSAConfig(
    8,
    4,
    16,
    compress_block=4,
    compress_stride=2,
    select_block=16,
    num_selected=4,
    window=20,
    compress="mean",
)
LARGE = NSAConfig(64, 4, 128, compress="mean")


@dataclass(frozen=True)
class Case:
    """A call on each rank, of ``tokens`` local tokens."""

    config: NSAConfig
    tokens: int
    dtype: torch.dtype
    device: str
    fetch_again: bool
    recompute_branches: tuple[str, ...]
    backend: str = "triton"


def formula(case: Case, plan: Plan, fetched: int) -> float:
    """Bytes kept over inputs, without the output.

    Args:
        fetched: bytes of the fetched blocks of all KV heads.
    """
    config, size = case.config, torch.empty(0, dtype=case.dtype).element_size()
    options = SplitOptions("chosen", case.fetch_again, case.recompute_branches)
    tokens = fetched / ((config.head_dim + config.value_dim) * size)
    parts = dict(attention_memory(config, plan, size, options, fetched=tokens).parts)
    del parts["output"]
    if case.backend == "pytorch":  # It keeps inputs alone.
        del parts["results"]
    return sum(parts.values())


def kept(case: Case) -> tuple[float, float]:
    """Bytes kept over inputs, by count or on a GPU by the allocator, and by the formula."""
    config, group = case.config, dist.group.WORLD
    torch.manual_seed(dist.get_rank())
    factory: dict[str, Any] = {"dtype": case.dtype, "device": case.device}
    heads, kv_heads = config.num_heads, config.num_kv_heads
    shapes = [(heads, config.head_dim), *[(kv_heads, config.head_dim)] * 3]
    shapes += [(kv_heads, config.value_dim)] * 3 + [(heads, 3)]
    q, *kv, gates = (
        torch.randn(1, case.tokens, *shape, **factory).requires_grad_() for shape in shapes
    )
    plan = get_plan(
        *(config, "zigzag", group),
        batch=1,
        local_length=case.tokens,
        cu_seqlens=None,
        dtype=case.dtype,
        device=q.device,
    )
    counter = CommunicationCounter()
    inputs = {x.untyped_storage().data_ptr() for x in (q, *kv, gates)}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in inputs:
            storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    def attend() -> Tensor:
        out = native_sparse_attention(
            q,
            dict(zip(BRANCHES, kv[:3], strict=True)),
            dict(zip(BRANCHES, kv[3:], strict=True)),
            gates,
            BlockCompressor(config, config.head_dim),
            BlockCompressor(config, config.value_dim),
            config=config,
            group=group,
            backend=case.backend,
            plan=plan,
            communication=counter,
            fetch_again=case.fetch_again,
            recompute_branches=case.recompute_branches,
        )
        assert isinstance(out, Tensor)
        return out

    if case.device != "cuda":
        with saved_tensors_hooks(pack, lambda x: x):
            attend()
        counted = sum(s.nbytes() for s in storages.values())
        return counted, formula(case, plan, counter.received["fetch"])
    # Without hooks: on a GPU they keep fetched blocks.
    attend()
    expected = formula(case, plan, counter.received["fetch"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = attend()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
    return allocated, expected


OPTIONS = [(False, ()), (True, ()), (True, ("window",)), (True, BRANCHES)]


@pytest.mark.parametrize("backend", ["pytorch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("again", "recomputed"), OPTIONS, ids=str)
def test_kept_memory_is_that_of_the_formula(
    again: bool, recomputed: tuple[str, ...], backend: str, ranks_of: Callable[[int], Ranks]
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("kernels run on a GPU here: see test_kept_memory_on_gpus")
    case = Case(SMALL, 96, torch.float32, "cpu", again, recomputed, backend)
    for counted, expected in ranks_of(2).run(kept, case):
        assert 0.9 * expected <= counted <= 1.1 * expected


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("again", "recomputed"), OPTIONS, ids=str)
def test_kept_memory_on_gpus(again: bool, recomputed: tuple[str, ...]) -> None:
    case = Case(LARGE, 16384, torch.bfloat16, "cuda", again, recomputed)
    ranks = Ranks(torch.cuda.device_count(), timedelta(seconds=120), "nccl")
    try:
        for allocated, expected in ranks.run(kept, case):
            assert 0.9 * expected <= allocated <= 1.1 * expected
    finally:
        ranks.close()

"""Dense attention over ranks against dense attention on one process, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nsa_dist import CommunicationCounter
from nsa_dist.adapters.ring.loading import ring_functions
from tests.adapters.ring.attention_case import Case, assert_right, on_ranks, on_world
from tests.distributed.ranks import Ranks

RanksOf = Callable[[int], Ranks]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Odd lengths, so that every layout pads; documents of no token, and over several ranks.
PACKED = (21, 37, 0, 50, 22)
SHORT = (1, 37, 3, 0, 50, 2, 22)
CASES = {
    "zigzag": Case("zigzag"),
    "zigzag-rows": Case("zigzag", batch=3, length=43),
    "zigzag-fp16-mqa": Case("zigzag", F16, kv_heads=1),
    "zigzag-scale-wide-values": Case("zigzag", value_dim=24, scale=0.4),
    "varlen": Case("zigzag_per_document", lengths=PACKED),
    "varlen-short": Case("zigzag_per_document", lengths=SHORT),
    "varlen-one-document": Case("zigzag_per_document", lengths=(75,)),
    "varlen-fp16-mha": Case("zigzag_per_document", F16, lengths=PACKED, kv_heads=4),
    "varlen-narrow-values": Case("zigzag_per_document", lengths=PACKED, value_dim=8),
    "llama3": Case("contiguous"),
    "llama3-rows": Case("contiguous", batch=3, length=43),
    "llama3-packed": Case("contiguous", lengths=PACKED),
    "llama3-short": Case("contiguous", lengths=SHORT),
    "llama3-packed-fp16-mqa": Case("contiguous", F16, lengths=PACKED, kv_heads=1),
    "llama3-fp32": Case("contiguous", F32),
    "llama3-fp32-rows": Case("contiguous", F32, batch=2, length=43),
    "llama3-fp32-packed": Case("contiguous", F32, lengths=PACKED, value_dim=24, scale=0.4),
    "llama3-fp32-short": Case("contiguous", F32, lengths=SHORT),
    "llama3-fp64-packed": Case("contiguous", F64, lengths=PACKED),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_dense_attention_is_that_of_one_process(ranks_of: RanksOf, name: str, size: int) -> None:
    case = CASES[name]
    found, received = ranks_of(size).run(on_world, case)[0]
    assert_right(case, found)
    assert bool(received) == (size > 1)


def test_long_rows_in_tiles_are_rows(monkeypatch: pytest.MonkeyPatch, ranks_of: RanksOf) -> None:
    case = Case("contiguous", F32, lengths=(300, 57))
    found, _ = ranks_of(2).run(in_small_tiles, case)[0]
    assert_right(case, found)


def in_small_tiles(case: Case) -> Any:
    from nsa_dist.adapters.ring import flash

    tile, flash.TILE = flash.TILE, 5000
    try:
        return on_world(case)
    finally:
        flash.TILE = tile


def on_halves(case: Case) -> Any:
    """Two groups side by side, of which one has no rank 0."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found, _ = on_ranks(case, halves[dist.get_rank() // 2])
    return found


@pytest.mark.parametrize("name", ["zigzag", "varlen", "llama3-packed"])
def test_subgroups_compute_apart(ranks_of: RanksOf, name: str) -> None:
    for found in ranks_of(4).run(on_halves, CASES[name]):
        assert_right(CASES[name], found)


def counted_and_moved(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """What is counted as received, and what torch.distributed was given to receive."""
    functions = ring_functions("plain")
    assert functions.zigzag.__globals__["dist"] is dist
    moved = {"ring": 0, "ring_grad": 0}
    counter, kind = CommunicationCounter(), "ring"
    size = dist.get_world_size()
    originals = {
        name: getattr(dist, name)
        for name in ("irecv", "all_gather_into_tensor", "reduce_scatter_tensor", "P2POp")
    }

    def p2p(op: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if op is originals["irecv"]:
            moved[kind] += tensor.nbytes
        return originals["P2POp"](op, tensor, *args, **kwargs)

    def gather(output: torch.Tensor, own: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        moved[kind] += output.nbytes - own.nbytes
        return originals["all_gather_into_tensor"](output, own, *args, **kwargs)

    def scatter(own: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        moved[kind] += own.nbytes * (size - 1)
        return originals["reduce_scatter_tensor"](own, given, *args, **kwargs)

    from nsa_dist import make_sharding
    from nsa_dist.adapters.ring import dense_attention

    inputs = case.inputs()
    options: dict[str, Any] = {"layout": case.layout, "group": dist.group.WORLD}
    sharding = make_sharding(inputs["q"].shape[1], cu_seqlens=case.cu_seqlens, **options)
    q, k, v = (sharding.shard(inputs[name]).requires_grad_() for name in "qkv")
    bounds = sharding.cu_seqlens
    dense_attention(q, k, v, cu_seqlens=bounds, **options)  # Makes the plan.
    dist.P2POp, dist.all_gather_into_tensor = p2p, gather  # type: ignore[assignment, misc]
    dist.reduce_scatter_tensor = scatter
    try:
        out = dense_attention(q, k, v, cu_seqlens=bounds, communication=counter, **options)
        kind = "ring_grad"
        out.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    # Agreement on the call, and on its backward, is the same for all.
    assert counter.received.pop("plan") == 2 * 16 * (size - 1)
    return dict(counter.received), moved


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["zigzag-rows", "varlen", "llama3-rows", "llama3-fp32-packed"])
def test_bytes_are_counted(ranks_of: RanksOf, name: str, size: int) -> None:
    for counted, moved in ranks_of(size).run(counted_and_moved, CASES[name]):
        assert counted == moved
        assert min(counted.values()) > 0

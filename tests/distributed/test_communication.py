"""What moves: exactly the blocks that were chosen, and nothing where nothing is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import (
    BlockCompressor,
    CommunicationCounter,
    NSAConfig,
    make_sharding,
    native_sparse_attention,
)
from tests.distributed.layer_case import SMALL, LayerCase, run_layer, token_owners, variants
from tests.distributed.ranks import Ranks

LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
ELEMENT_SIZES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}


def expected_fetch(
    selected: Tensor, case: LayerCase, size: int, rank: int, element_size: int
) -> dict[int, int]:
    """Bytes by KV head that ``rank`` must receive, from the choices and the layout alone."""
    config = case.config
    width = (config.head_dim + config.value_dim) * element_size
    owner = token_owners(case, size)
    starts = [0] if case.cu_seqlens is None else case.cu_seqlens[:-1].tolist()
    received = {}
    for g in range(config.num_kv_heads):
        tokens = 0
        for d, start in enumerate(starts):
            mine = [t for t, r in enumerate(owner[d]) if r == rank]
            blocks = set(selected[0, [start + t for t in mine], g].flatten().tolist()) - {-1}
            for j in blocks:
                first = j * config.select_block
                if owner[d][first] != rank:
                    tokens += min(config.select_block, padded_length(case, size, d) - first)
        received[g] = tokens * width
    return received


def padded_length(case: LayerCase, size: int, document: int) -> int:
    """Tokens of a document with the padding that its layout gives it."""
    bounds = case.cu_seqlens
    if bounds is None:
        multiple = size if case.layout == "contiguous" else 2 * size
        return -(-case.length // multiple) * multiple
    length = int(bounds[document + 1] - bounds[document])
    if case.layout == "zigzag_per_document":
        return -(-length // (2 * size)) * 2 * size
    return length


def counted_run(case: LayerCase) -> tuple[Tensor | None, dict[int, int], dict[str, int]]:
    result = run_layer(case, dist.group.WORLD)
    return result.selected, result.fetched_per_head, result.received


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_fetch_receives_exactly_the_chosen_remote_blocks(
    size: int, layout: str, dtype: torch.dtype, packed: bool, ranks_of: Callable[[int], Ranks]
) -> None:
    # A length that every layout takes as it stands: then padding chooses nothing of its own.
    lengths = (48, 64, 48) if packed else None
    case = LayerCase(layout=layout, lengths=lengths, length=160, dtype=dtype)
    total = returned = 0
    for rank, (selected, received, by_kind) in enumerate(ranks_of(size).run(counted_run, case)):
        expected = expected_fetch(selected, case, size, rank, ELEMENT_SIZES[dtype])
        assert received == expected
        assert by_kind["fetch"] == sum(expected.values())
        total += by_kind["fetch"]
        returned += by_kind["fetch_grad"]
    # What was fetched is what returns, to other ranks.
    assert total == returned > 0


CRAFTED = NSAConfig(
    2,
    2,
    8,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=5,
    window=8,
    compress="mean",
    gate="static",
    branches=("selected",),
    independent_kv=False,
)
CRAFTED_LENGTH = 1024
LIKED_BLOCKS = (5, 77)


def crafted_run(layout: str) -> tuple[dict[str, int], dict[int, int], Tensor]:
    """Every query likes the same two blocks."""
    group = dist.group.WORLD
    sharding = make_sharding(CRAFTED_LENGTH, layout=layout, group=group)
    q = torch.ones(1, CRAFTED_LENGTH, 2, 8)
    k = torch.full((1, CRAFTED_LENGTH, 2, 8), -1.0)
    for block in LIKED_BLOCKS:
        k[:, block * 8 : block * 8 + 8] = 1.0
    v = torch.randn(1, CRAFTED_LENGTH, 2, 8)
    gates = torch.ones(1, CRAFTED_LENGTH, 2, 1)
    counter = CommunicationCounter()
    _, details = native_sparse_attention(
        *(sharding.shard(x) for x in (q, k, v, gates)),
        BlockCompressor(CRAFTED, 8),
        config=CRAFTED,
        layout=layout,
        group=group,
        communication=counter,
        return_details=True,
    )
    chosen = sharding.unshard(details.selected)
    return dict(counter.received), dict(counter.fetched_per_head), chosen


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_crafted_keys_fetch_under_a_fifth_of_a_full_gather(
    layout: str, ranks_of: Callable[[int], Ranks]
) -> None:
    size = 4
    answers = ranks_of(size).run(crafted_run, layout)
    case = variants(LayerCase(layout=layout, length=CRAFTED_LENGTH), config=CRAFTED)
    full = CRAFTED_LENGTH * (size - 1) // size * 2 * (8 + 8) * 4
    for rank, (received, per_head, chosen) in enumerate(answers):
        assert set(LIKED_BLOCKS) <= set(chosen[0, -1, 0].tolist())
        assert per_head == expected_fetch(chosen, case, size, rank, 4)
        assert received["fetch"] < 0.2 * full
        # The first chunk of a contiguous split sees nothing remote.
        assert received["fetch"] > 0 or (layout, rank) == ("contiguous", 0)


def kinds_run(case: LayerCase) -> dict[str, int]:
    return run_layer(case, dist.group.WORLD).received


def test_documents_on_one_rank_each_need_no_halo(ranks_of: Callable[[int], Ranks]) -> None:
    case = LayerCase(layout="contiguous", lengths=(80, 80))
    for received in ranks_of(2).run(kinds_run, case):
        assert "halo" not in received
        assert received["fetch"] == received["fetch_grad"] == 0


def test_branches_left_out_move_nothing(ranks_of: Callable[[int], Ranks]) -> None:
    case = variants(LayerCase(length=160), branches=("window",))
    for received in ranks_of(2).run(kinds_run, case):
        assert set(received) <= {"plan", "halo", "halo_grad"}
        config = case.config
        # Zigzag over two ranks: chunk 1 and chunk 3 each begin beside a remote chunk; chunk 2
        # follows chunk 1 on the same rank.
        tokens = config.window - 1
        width = config.num_kv_heads * (config.head_dim + config.value_dim) * 8
        assert received["halo"] in (tokens * width, 2 * tokens * width)
        assert received["halo_grad"] in (tokens * width, 2 * tokens * width)


def test_shared_keys_and_values_travel_once(ranks_of: Callable[[int], Ranks]) -> None:
    case = LayerCase(layout="contiguous", length=150)  # The cut falls inside a block.
    shared = ranks_of(2).run(kinds_run, variants(case, independent_kv=False))
    independent = ranks_of(2).run(kinds_run, case)
    assert sum(r["halo"] for r in shared) < sum(r["halo"] for r in independent)


def test_one_rank_moves_nothing() -> None:
    received = run_layer(LayerCase()).received
    assert sum(received.values()) == 0


def collective_calls(case: LayerCase) -> tuple[list[str], list[str]]:
    """Names of the collectives of a first and of a second step."""
    calls: list[str] = []
    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "gather", "reduce"))]
    originals = {n: getattr(dist, n) for n in names if callable(getattr(dist, n))}
    from nsa_dist.comm import collectives

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    layer = case.layer(dist.group.WORLD)
    x, _ = case.inputs()
    sharding = make_sharding(x.shape[1], layout=case.layout, group=dist.group.WORLD)
    local = sharding.shard(x)
    steps = []
    gather = collectives._all_gather
    try:
        for name, function in originals.items():
            setattr(dist, name, recorded(name, function))
        collectives._all_gather = recorded("all_gather", gather)
        for _ in range(2):
            calls.clear()
            layer(local)
            steps.append(list(calls))
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
        collectives._all_gather = gather
    return steps[0], steps[1]


def test_a_call_adds_one_collective_to_what_it_moves(ranks_of: Callable[[int], Ranks]) -> None:
    case = LayerCase(length=168)
    for first, second in ranks_of(2).run(collective_calls, case):
        # A halo a branch, the request, a fetch a KV head; the gather of compressed tokens.
        exchanges = 3 + 1 + SMALL.num_kv_heads
        assert sorted(second) == ["all_gather", "all_reduce", *["all_to_all_single"] * exchanges]
        assert first == second and first[0] == "all_reduce"

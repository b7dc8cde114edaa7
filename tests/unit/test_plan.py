"""The plan against a brute-force account of the same split, for every rank at once."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.host_tables import on_cpu
from nsa_dist.plan import Plan, build_plan
from nsa_dist.plan.layout import check_lengths, local_indices, make_layout

LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
SMALL = NSAConfig(
    4,
    2,
    8,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=11,
)
CONFIGS = {
    "independent": SMALL,
    "shared": replace(SMALL, independent_kv=False),
    "long-window": replace(SMALL, window=70),
    "stride-1": replace(SMALL, compress_block=3, compress_stride=1, select_block=5, window=1),
    "window-only": replace(SMALL, branches=("window",)),
    "selected-only": replace(SMALL, branches=("selected",)),
}


def documents(batch: int, length: int, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    if cu_seqlens is None:
        return [(b * length, (b + 1) * length) for b in range(batch)]
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def split(name: str, size: int, batch: int, lengths: list[int]) -> tuple:
    """Plan inputs whose documents suit the layout: (layout, T, cu_seqlens)."""
    layout = make_layout(name, size)
    if batch > 1:
        length = -(-sum(lengths) // layout.multiple) * layout.multiple
        return layout, length, None
    if layout.per_document:
        lengths = [-(-n // layout.multiple) * layout.multiple for n in lengths]
    total = sum(lengths)
    lengths = [*lengths, -total % layout.multiple]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return layout, int(cu_seqlens[-1]), cu_seqlens


def all_plans(config: NSAConfig, name: str, size: int, batch: int, lengths: list[int]) -> tuple:
    layout, length, cu_seqlens = split(name, size, batch, lengths)
    assert check_lengths(layout, batch, length, cu_seqlens) is None
    plans = [build_plan(config, layout, r, size, batch, length, cu_seqlens) for r in range(size)]
    columns = [local_indices(layout, r, 1, length, cu_seqlens) for r in range(size)]
    local = [(torch.arange(batch)[:, None] * length + column).flatten() for column in columns]
    return plans, local, documents(batch, length, cu_seqlens)


def extended_buffers(plans: list[Plan], local: list[torch.Tensor], branch: str) -> list:
    """Stream coordinates in each rank's extended buffer after a simulated exchange."""
    size = len(plans)
    halos = [plan.halos[branch] for plan in plans]
    sent = [local[p][halos[p].send_rows].split(list(halos[p].send_counts)) for p in range(size)]
    buffers = []
    for r in range(size):
        received = torch.cat([sent[p][r] for p in range(size)])
        assert halos[r].recv_counts == tuple(len(sent[p][r]) for p in range(size))
        buffer = torch.full((halos[r].num_rows,), -1)
        buffer[halos[r].own_rows] = local[r]
        assert bool((buffer[halos[r].recv_rows] == -1).all()), "a received row overwrites another"
        buffer[halos[r].recv_rows] = received
        assert bool((buffer >= 0).all()), "a row of the extended buffer is never written"
        buffers.append(buffer)
    return buffers


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_plan_against_brute_force(size: int, layout: str, config: NSAConfig) -> None:
    rng = random.Random(size)
    cases = [(1, [97]), (2, [53]), (1, [1, 0, 3, 130, 7, 0]), (1, [rng.randrange(40)] * 5)]
    for batch, lengths in cases:
        plans, local, docs = all_plans(config, layout, size, batch, lengths)
        owner = {int(x): r for r, columns in enumerate(local) for x in columns}
        assert len(owner) == sum(end - start for start, end in docs)
        check_tokens(plans, local, docs)
        for branch in config.key_branches:
            buffers = extended_buffers(plans, local, branch)
            if branch == "window":
                check_windows(plans, docs, buffers, config)
            else:
                check_blocks(plans, docs, buffers, owner, branch, config)


def check_tokens(plans: list[Plan], local: list[torch.Tensor], docs: list) -> None:
    for plan, columns in zip(plans, local, strict=True):
        starts = torch.tensor([docs[d][0] for d in plan.documents.tolist()], dtype=torch.int64)
        assert torch.equal(starts + plan.positions, columns)
        row = 0
        for start, count, position, *_ in plan.segments.rows:
            assert start == row and count > 0
            expected = torch.arange(position, position + count)
            assert torch.equal(plan.positions[start : start + count], expected)
            assert len(set(plan.documents[start : start + count].tolist())) == 1
            row += count
        assert row == len(columns) == plan.segments.num_queries


def check_windows(plans: list[Plan], docs: list, buffers: list, config: NSAConfig) -> None:
    for plan, buffer in zip(plans, buffers, strict=True):
        needed = 0
        for start, count, position, _, _, base in plan.segments.rows:
            first = max(0, position - config.window + 1)
            doc_start = docs[int(plan.documents[start])][0]
            rows = torch.arange(base + first, base + position + count)
            expected = torch.arange(doc_start + first, doc_start + position + count)
            assert torch.equal(buffer[rows], expected)
            needed += len(rows)
        if config.independent_kv:
            assert len(buffer) <= needed, "a halo holds tokens that no query sees"


def check_blocks(
    plans: list[Plan], docs: list, buffers: list, owner: dict, branch: str, config: NSAConfig
) -> None:
    step = config.compress_stride if branch == "compressed" else config.select_block
    block = config.compress_block if branch == "compressed" else config.select_block
    expected = []
    for start, end in docs:
        count = (
            (end - start - block) // step + 1
            if branch == "compressed"
            else -(-(end - start) // step)
        )
        expected += [
            (i, start + i * step, min(start + i * step + block, end)) for i in range(max(0, count))
        ]
    for rank, (plan, buffer) in enumerate(zip(plans, buffers, strict=True)):
        blocks = plan.grids[branch]
        assert blocks is not None
        assert blocks.total == len(expected)
        assert blocks.owner.tolist() == [owner[start] for _, start, _ in expected]
        assert blocks.lengths.tolist() == [end - start for _, start, end in expected]
        assert blocks.counts[rank] == len(blocks.own_ids)
        for block_id, index, row in zip(
            blocks.own_ids.tolist(),
            blocks.own_index.tolist(),
            blocks.own_rows.tolist(),
            strict=True,
        ):
            i, start, end = expected[block_id]
            assert index == i and owner[start] == rank
            assert torch.equal(buffer[row : row + end - start], torch.arange(start, end))
        check_gather_order(blocks, len(plans))
        bases = {}
        for segment, d in zip(
            plan.segments.rows,
            plan.documents[[s[0] for s in plan.segments.rows]].tolist(),
            strict=True,
        ):
            bases[d] = segment[3] if branch == "compressed" else segment[4]
        for d, base in bases.items():
            before = sum(1 for _, start, _ in expected if start < docs[d][0])
            assert base == before


def check_gather_order(blocks, size: int) -> None:
    padded = torch.full((size * max(blocks.counts),), -1)
    for r in range(size):
        run = (blocks.owner == r).nonzero().squeeze(1)
        padded[r * max(blocks.counts) : r * max(blocks.counts) + len(run)] = run
    assert torch.equal(padded[blocks.gathered_rows], torch.arange(blocks.total))
    assert torch.equal(blocks.by_rank, padded[padded >= 0])


def test_zigzag_on_one_rank_moves_and_copies_nothing() -> None:
    plan = build_plan(SMALL, make_layout("zigzag", 1), 0, 1, 2, 64, None)
    assert len(plan.segments.rows) == 2
    assert all(halo.is_identity for halo in plan.halos.values())


def test_halo_is_clipped_to_the_document() -> None:
    cu_seqlens = torch.tensor([0, 32, 64], dtype=torch.int32)
    for rank in range(2):
        plan = build_plan(SMALL, make_layout("contiguous", 2), rank, 2, 1, 64, cu_seqlens)
        assert all(halo.is_local for halo in plan.halos.values())


def test_moving_a_plan_keeps_shared_halos_shared() -> None:
    config = CONFIGS["shared"]
    plan = build_plan(config, make_layout("zigzag", 2), 0, 2, 1, 64, None)
    moved = plan.to(torch.device("cpu"))
    assert len({id(halo) for halo in moved.halos.values()}) == 1


def test_tables_are_made_on_the_cpu_without_a_call_of_python_for_each_operator() -> None:
    modes = torch._C._len_torch_function_stack
    with on_cpu():
        assert modes() == 0
    with torch.device("meta"):
        with on_cpu():
            assert torch.arange(3).device.type == "cpu"
            before = modes()
            with on_cpu():
                assert modes() == before
        assert torch.arange(3).device.type == "meta"

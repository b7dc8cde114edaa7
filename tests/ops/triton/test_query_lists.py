"""The queries that chose a block: who they are, in which order, and which program walks them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.segments import Segment
from nsa_kernels.triton.selected.lists import QueryLists, query_lists
from tests.ops.backends import DEVICE, INTERPRETED

BLOCK = 8


def segments_of(documents: list[int]) -> tuple[QuerySegments, Tensor]:
    """One segment a document, and the lengths of all blocks."""
    rows: list[Segment] = []
    lengths: list[int] = []
    row = 0
    for length in documents:
        if length:
            rows.append(Segment(row, length, 0, 0, len(lengths), row))
            lengths += [min(BLOCK, length - at) for at in range(0, length, BLOCK)]
        row += length
    return QuerySegments.from_rows(rows, DEVICE), torch.tensor(lengths)


def choices(documents: list[int], groups: int, num: int, seed: int) -> Tensor:
    """Each token's own block and others before it, ascending, padded with -1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in documents:
        for token in range(length):
            own = token // BLOCK
            for _ in range(groups):
                others = torch.randperm(own, generator=generator)[: num - 1].sort().values
                row = [*others.tolist(), own]
                rows.append(row + [-1] * (num - len(row)))
    return torch.tensor(rows, dtype=torch.int32).view(-1, groups, num)


def expected(
    chosen: Tensor, lengths: Tensor, segments: QuerySegments, most: int, per_launch: int
) -> tuple[list[list[tuple[int, int]]], list[int], list[int]]:
    """Of each (group, block) its row and `seen`, the owners of programs, and their order."""
    num_rows, groups, _ = chosen.shape
    blocks, bases = len(lengths), segments.selected_bases.tolist()
    positions = segments.positions.tolist()
    queries: list[list[tuple[int, int]]] = [[] for _ in range(groups * blocks)]
    for row in range(num_rows):
        for g in range(groups):
            own = [j for j in chosen[row, g].tolist() if j >= 0]
            seen = [min(positions[row] + 1 - j * BLOCK, int(lengths[bases[row] + j])) for j in own]
            several = 256 if sum(seen) > 1 else 0
            for j, count in zip(own, seen, strict=True):
                queries[g * blocks + bases[row] + j].append((row, count + several))
    programs = [
        (block, block // blocks, of[at][0])
        for block, of in enumerate(queries)
        for at in range(0, len(of), most)
    ]
    slots = min(groups * blocks, chosen.numel()) + chosen.numel() // most
    programs += [(groups * blocks, groups, num_rows)] * (slots - len(programs))
    order: list[int] = []
    for first in range(0, slots, per_launch):
        these = range(first, min(first + per_launch, slots))
        order += sorted(these, key=lambda i: programs[i][1:])
    return queries, [program[0] for program in programs], order


@pytest.mark.parametrize(
    "documents, groups, num, most, per_launch, chunks",
    [
        pytest.param([37], 2, 3, 4, 1000, 512, id="one"),
        pytest.param([50, 0, 1, 49], 1, 4, 5, 7, 512, id="packed-several_launches"),
        pytest.param([1], 3, 2, 4, 10, 512, id="token"),
        pytest.param([75], 2, 33, 8, 1000, 4, id="wide-chunks_of_several_steps"),
        pytest.param([70], 5, 10, 8, 1000, 5, id="groups-a_chunk"),
        *([] if INTERPRETED else [pytest.param([1500, 2700], 4, 16, 256, 100, 64, id="long")]),
    ],
)
def test_query_lists(
    documents: list[int],
    groups: int,
    num: int,
    most: int,
    per_launch: int,
    chunks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nsa_kernels.triton.selected.lists.CHUNKS", chunks)
    segments, lengths = segments_of(documents)
    chosen = choices(documents, groups, num, seed=0)
    found = query_lists(chosen.to(DEVICE), lengths.to(DEVICE), segments, BLOCK, most, per_launch)
    found = QueryLists(*(x.cpu() for x in found))
    queries, owner, order = expected(chosen, lengths, segments, most, per_launch)
    counts = torch.tensor([len(of) for of in queries])
    assert found.starts.tolist() == [0, *counts.cumsum(0).tolist()]
    assert found.ends.tolist() == ((counts + most - 1) // most).cumsum(0).tolist()
    flat = [query for of in queries for query in of]
    rows, seen = found.rows.tolist(), found.seen.tolist()
    assert list(zip(rows, seen, strict=True))[: len(flat)] == flat
    assert found.owner.tolist() == owner
    assert found.order.tolist() == order

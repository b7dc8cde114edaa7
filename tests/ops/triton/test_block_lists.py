"""The blocks that a tile's tokens chose: in which order, and who chose each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_kernels.triton.selected.lists import EDGES, block_lists
from nsa_kernels.triton.shared.tables import query_tiles
from tests.ops.backends import DEVICE, INTERPRETED
from tests.ops.triton.test_query_lists import BLOCK, choices, segments_of


def expected(
    chosen: Tensor, rows: Tensor, lengths: Tensor, tile: tuple[int, ...], group: int
) -> list[tuple[int, int, int]]:
    """Row, tokens to load and choosers of the edges, zeros where nobody chose it; of the others."""
    first_row, count, position, base = tile
    choosers: dict[int, int] = {}
    for token in range(count):
        for j in chosen[first_row + token, group].tolist():
            if j >= 0:
                choosers[j] = choosers.get(j, 0) | 1 << token
    first_edge = (position + 1) // BLOCK

    def entry(j: int) -> tuple[int, int, int]:
        if j not in choosers:
            return 0, 0, 0
        length = min(int(lengths[base + j]), position + count - j * BLOCK)
        return int(rows[group, base + j]), length, choosers[j]

    inner = sorted(j for j in choosers if j < first_edge)
    return [entry(j) for j in (*range(first_edge, first_edge + EDGES), *inner)]


@pytest.mark.parametrize(
    "documents, groups, num, tokens",
    [
        pytest.param([90], 2, 3, 4, id="one"),
        pytest.param([75, 0, 1, 60], 3, 5, 8, id="packed"),
        pytest.param([130], 1, 1, 1, id="a_token_a_tile"),
        pytest.param([2], 1, 4, 8, id="nothing_before_the_edges"),
        *([] if INTERPRETED else [pytest.param([2100, 1, 3300], 5, 17, 8, id="long")]),
    ],
)
def test_block_lists(documents: list[int], groups: int, num: int, tokens: int) -> None:
    segments, lengths = segments_of(documents)
    # In another order than ascending, which nobody promises.
    chosen = choices(documents, groups, num, seed=0).flip(-1)
    rows = torch.arange(groups * len(lengths)).flip(0).view(groups, -1) * 2**21
    tiles = query_tiles(segments, tokens, "selected_base")
    found = block_lists(
        chosen.to(DEVICE), rows.to(DEVICE), lengths.to(DEVICE), tiles.table, tokens, BLOCK
    )
    lists, counts = found.lists.cpu(), found.counts.cpu()
    for i, tile in enumerate(tiles.host.tolist()):
        for g in range(groups):
            entries = lists[i, g, : EDGES + int(counts[i, g])].tolist()
            unpacked = [(x >> 24, x >> 16 & 255, x & 65535) for x in entries]
            assert unpacked == expected(chosen, rows, lengths, tuple(tile), g)

"""Which program takes which query rows, and what it has to know of them.

Made on the host from the segments, once for each tile size, and cached with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments, Segment
from nsa_kernels.triton.shared.cache import cached, to_device


class QueryTiles(NamedTuple):
    """Runs of at most BT query rows of one segment.

    table: int64 [tiles, 4] on the device: first row, rows, position of the first, row of key 0.
    host: the same on the CPU.
    last: the highest position of a row; -1 without rows.
    """

    table: Tensor
    host: Tensor
    last: int


def query_tiles(segments: QuerySegments, size: int, column: str) -> QueryTiles:
    """The tiles of at most `size` query rows, key rows counted by `column` of the segment."""
    return cached(segments, ("query", size, column), lambda: _query_tiles(segments, size, column))


def positions(segments: QuerySegments) -> Tensor:
    """`QuerySegments.positions`."""
    return cached(segments, "positions", lambda: segments.positions)


def selected_bases(segments: QuerySegments) -> Tensor:
    """`QuerySegments.selected_bases`."""
    return cached(segments, "selected_bases", lambda: segments.selected_bases)


def _query_tiles(segments: QuerySegments, size: int, column: str) -> QueryTiles:
    start, length, position = segments.host[:, :3].unbind(1)
    base = segments.host[:, Segment._fields.index(column)]
    count = (length + size - 1) // size
    segment, number = numbered(count)
    done = number * size
    host = torch.stack(
        (
            start[segment] + done,
            (length[segment] - done).clamp(max=size),
            position[segment] + done,
            base[segment],
        ),
        dim=1,
    )
    last = int((host[:, 1] + host[:, 2]).max()) - 1 if len(host) else -1
    return QueryTiles(to_device(host, segments.table.device), host, last)


def numbered(count: Tensor) -> tuple[Tensor, Tensor]:
    """For `count` [M] items of each owner, one owner after another: owner and number of each."""
    owner = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return owner, torch.arange(len(owner), device="cpu") - first[owner]


@triton.jit
def load_query_tile(tiles, i_tile):
    """First row, rows, position of the first and row of key 0 of tile i_tile of `QueryTiles`."""
    p_tile = tiles + i_tile * 4
    num_tokens = tl.load(p_tile + 1).to(tl.int32)
    position = tl.load(p_tile + 2).to(tl.int32)
    return tl.load(p_tile), num_tokens, position, tl.load(p_tile + 3)

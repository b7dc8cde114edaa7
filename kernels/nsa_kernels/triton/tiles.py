"""Which program does what: tables of query and key tiles, and what the launchers share.

The tables are made on the host from the segments, once for each tile size, and kept with the
segments: all layers of a batch use the same ones.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments, Segment
from nsa_kernels.triton.band import Band

LOG2E = 1.4426950408889634
# Tiles added one after another; more are added in pieces, whose sums are then added.
PIECE = 64
# Query tiles that one program of a key tile's gradient walks over; more are shared out.
QUERY_TILES_A_PROGRAM = 16 * PIECE


class QueryTiles(NamedTuple):
    """Runs of at most BT query rows of one segment.

    table: int64 [tiles, 4] on the device: first row, rows, position of the first, row of key 0.
    rows: the same on the host.
    """

    table: Tensor
    rows: list[tuple[int, int, int, int]]


class KeyTiles(NamedTuple):
    """Runs of at most BN keys with the query tiles that see them, long lists shared out.

    table: int64 [programs, 6] on the device: row of key 0, first key, end of the keys, first query
    tile, end of the query tiles, and the key tile that the program belongs to.
    parts: int32 [key tiles + 1], where each key tile's programs start.
    most: programs of the key tile that has most.
    """

    table: Tensor
    parts: Tensor
    most: int


def query_tiles(segments: QuerySegments, size: int, column: str) -> QueryTiles:
    """The tiles of at most `size` query rows, key rows counted by `column` of the segment."""
    return _kept(segments, ("query", size, column), lambda: _query_tiles(segments, size, column))


def key_tiles(segments: QuerySegments, band: Band, queries: int, keys: int) -> KeyTiles:
    """The tiles of at most `keys` keys against the tiles of at most `queries` queries."""
    name = ("key", band, queries, keys)
    return _kept(segments, name, lambda: _key_tiles(segments, band, queries, keys))


def _kept(segments: QuerySegments, name: Any, make: Any) -> Any:
    cache = segments.__dict__.setdefault("_tiles", {})
    if name not in cache:
        cache[name] = make()
    return cache[name]


def _query_tiles(segments: QuerySegments, size: int, column: str) -> QueryTiles:
    number = Segment._fields.index(column)
    rows = [
        (part.start, part.length, part.position, segment[number])
        for segment in segments.rows
        for part in segment.split(size)
    ]
    table = torch.tensor(rows, dtype=torch.int64).view(len(rows), 4)
    return QueryTiles(table.to(segments.table.device), rows)


def _key_tiles(segments: QuerySegments, band: Band, queries: int, keys: int) -> KeyTiles:
    tiles = query_tiles(segments, queries, band.column).rows
    programs: list[tuple[int, ...]] = []
    parts = [0]
    at = 0
    while at < len(tiles):
        # Neighbouring tiles that count keys from one row see the same keys.
        base, until = tiles[at][3], at
        while until < len(tiles) and tiles[until][3] == base:
            until += 1
        seen = [band.keys(p, p + n - 1) for _, n, p, _ in tiles[at:until]]
        _programs_of_keys(base, at, seen, keys, programs, parts)
        at = until
    device = segments.table.device
    table = torch.tensor(programs, dtype=torch.int64).view(len(programs), 6)
    most = max((b - a for a, b in itertools.pairwise(parts)), default=0)
    return KeyTiles(table.to(device), torch.tensor(parts, dtype=torch.int32, device=device), most)


def _programs_of_keys(
    base: int,
    first_tile: int,
    seen: list[tuple[int, int]],
    size: int,
    programs: list[tuple[int, ...]],
    parts: list[int],
) -> None:
    seeing = [(i, span) for i, span in enumerate(seen) if span[0] < span[1]]
    if not seeing:
        return
    begin, end = min(span[0] for _, span in seeing), max(span[1] for _, span in seeing)
    begins, ends = [span[0] for _, span in seeing], [span[1] for _, span in seeing]
    ascending = begins == sorted(begins) and ends == sorted(ends)
    for key in range(begin // size * size, end, size):
        stop = min(key + size, end)
        first, last = 0, len(seeing)
        if ascending:
            first, last = bisect.bisect_right(ends, key), bisect.bisect_left(begins, stop)
        if first < last:
            low, high = first_tile + seeing[first][0], first_tile + seeing[last - 1][0] + 1
            for tile in range(low, high, QUERY_TILES_A_PROGRAM):
                until = min(tile + QUERY_TILES_A_PROGRAM, high)
                programs.append((base, max(key, begin), stop, tile, until, len(parts) - 1))
            parts.append(len(programs))


def precision(x: Tensor) -> str:
    """How a dot of this dtype is computed: float32 exactly, never in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def power(x, PRECISION: tl.constexpr):
    """2^x, or e^x where a dot is exact: see `logit_scale`."""
    return tl.exp(x) if PRECISION == "ieee" else tl.exp2(x)


def logit_scale(q: Tensor, scale: float) -> float:
    """What logits are multiplied by in kernels, and the log-sum-exp that they keep is counted in.

    Powers of 2 are cheaper; but rounding scale log2(e) loses digits that float32 has to keep.
    """
    return scale if q.dtype == torch.float32 else scale * LOG2E


def padded(width: int) -> int:
    """The power of two, at least 16, that a tile's columns are padded to."""
    return max(16, 1 << (width - 1).bit_length())


class TileShape(NamedTuple):
    """Tokens BT (with R heads each: BM rows) and keys BN of a tile, and the warps that share it."""

    rows: int
    keys: int
    warps: int
    stages: int


def attention_shapes(q: Tensor, v: Tensor) -> tuple[TileShape, TileShape, TileShape]:
    """Of the forward, dq and dk, dv kernels; by widths and dtype only, for the promise of bits."""
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32 or width > 128:
        return TileShape(64, 32, 4, 2), TileShape(64, 32, 4, 1), TileShape(64, 32, 8, 1)
    return TileShape(128, 128, 8, 2), TileShape(128, 64, 8, 3), TileShape(64, 128, 8, 2)


def last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

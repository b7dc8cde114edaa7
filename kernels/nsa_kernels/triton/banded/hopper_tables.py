"""The work of the Gluon kernels' persistent programs in the backward pass, made on the host.

A tile is 64 rows of one KV head: TOKENS = 64/R tokens of one segment. What kernels know of a piece
of work is one row of int32, so that no kernel looks anything up in its loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.segments import QuerySegments, Segment
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.shared.cache import cached, to_device
from nsa_kernels.triton.shared.tables import numbered

# Keys of a program of dk and dv: 64 for each of its two warpgroups.
KEYS = 128
# Query tiles that a program adds up in a row, at least and at most: see `_tiles_in_a_row`.
FEWEST, MOST = 32, 256


class QueryWork(NamedTuple):
    """Programs of dq, each two tiles of a segment, in the order in which they start.

    table: int32 [programs, 8]: first row, tokens, position of the first, row of key 0, the keys
    [first, end) that stand in the buffers for the segment's queries, first tile, 0. The programs
    with most keys come first.
    tiles: of all segments.
    """

    table: Tensor
    num_programs: int
    tiles: int


class KeyWork(NamedTuple):
    """Programs of dk and dv, each a run of query tiles of one segment that see a tile of KEYS keys.

    table: int32 [programs, 10] in the order in which they start: row of the tile's first key, that
    key, first query tile, its first row, its position, end of the segment's positions, tiles, tiles
    that need masks before and up to those that need none, and where the sum goes. launches: how
    many programs are started at once; their sums go to places 0.. of a workspace.
    sums: int64 [programs, 6] in the order of key tiles, as `_add_parts_kernel` reads them: row of
    key 0, first key, end of the keys, 0, 0, key tile.
    parts: int32 [key tiles + 1], where each key tile's programs start in `sums`.
    num_keys: how many rows of keys the tiles have, each in one tile.
    """

    table: Tensor
    launches: tuple[int, ...]
    sums: Tensor
    parts: Tensor
    num_keys: int


def query_work(segments: QuerySegments, band: Band, tokens: int) -> QueryWork:
    """Of tiles of `tokens` tokens."""
    return cached(segments, ("queries", band, tokens), lambda: _query_work(segments, band, tokens))


def key_work(
    segments: QuerySegments, band: Band, tokens: int, groups: int, programs: int, most: int
) -> KeyWork:
    """Of query tiles of `tokens` tokens, for `groups` KV heads and `programs` at a time.

    most: programs that leave sums in a launch, of each KV head.
    """
    name = ("keys", band, tokens, groups, programs, most)
    return cached(segments, name, lambda: _key_work(segments, band, tokens, groups, programs, most))


def _columns(segments: QuerySegments, band: Band) -> tuple[Tensor, ...]:
    """start, length, position and row of key 0 of the segments that hold rows."""
    host = segments.host[segments.host[:, 1] > 0]
    return (*host[:, :3].unbind(1), host[:, Segment._fields.index(band.column)])


def _query_work(segments: QuerySegments, band: Band, tokens: int) -> QueryWork:
    start, length, position, base = _columns(segments, band)
    tiles = (length + tokens - 1) // tokens
    first_tile = tiles.cumsum(0) - tiles
    first_key, end_key = band.keys(position, position + length - 1)
    segment, number = numbered((tiles + 1) // 2)
    done = number * 2 * tokens
    here = position[segment] + done
    rows = (length[segment] - done).clamp(max=2 * tokens)
    low, high = band.keys(here, here + rows - 1)
    table = torch.stack(
        (
            start[segment] + done,
            rows,
            here,
            base[segment],
            first_key[segment],
            end_key[segment],
            first_tile[segment] + 2 * number,
            torch.zeros_like(done),
        ),
        dim=1,
    )
    table = table[(low - high).sort(stable=True).indices].to(torch.int32)
    device = segments.table.device
    return QueryWork(to_device(table, device), len(table), int(tiles.sum()))


def _key_work(
    segments: QuerySegments, band: Band, tokens: int, groups: int, programs: int, most: int
) -> KeyWork:
    start, length, position, base = _columns(segments, band)
    tiles = (length + tokens - 1) // tokens
    first_tile = tiles.cumsum(0) - tiles
    last = position + length - 1
    low, high = band.keys(position, last)
    seeing = (low < high).nonzero().squeeze(1)
    columns = (start, length, position, base, tiles, first_tile, last, low, high)
    start, length, position, base, tiles, first_tile, last, low, high = (x[seeing] for x in columns)
    # Segments that count keys from one row share key tiles.
    bases, owner = base.unique(return_inverse=True)
    lowest = torch.full_like(bases, 1 << 40).scatter_reduce(0, owner, low, "amin")
    highest = torch.zeros_like(bases).scatter_reduce(0, owner, high, "amax")

    # Pairs of a segment and a tile of keys that it sees keys of.
    segment, number = numbered((high + KEYS - 1) // KEYS - low // KEYS)
    key = (low // KEYS)[segment] * KEYS + number * KEYS
    first_key = torch.maximum(key, lowest[owner[segment]])
    end_key = torch.minimum(key + KEYS, highest[owner[segment]])
    here = position[segment]
    some = torch.maximum(key, low[segment])
    first = (some * band.stride + band.offset - here).clamp(min=0) // tokens
    end = tiles[segment]
    # From here on all of a tile's queries see all keys, and more than one.
    enough = (end_key - 1).clamp(min=1) * band.stride + band.offset
    clear = ((enough - here).clamp(min=0) + tokens - 1) // tokens
    until = length[segment] // tokens
    if band.window:
        latest = torch.minimum(key + KEYS, high[segment]) - 2 + band.window
        end = torch.minimum(end, (latest - here) // tokens + 1)
        until = torch.minimum(until, (first_key + band.window - here).clamp(min=0) // tokens)
        if band.window == 1:
            until = torch.zeros_like(until)

    # Runs of query tiles. Without a window they end at the same tiles whatever the keys, so that
    # programs that run together find the rows in the L2 cache.
    run = _tiles_in_a_row(int((end - first).sum()) * groups, programs)
    origin = first if band.window else torch.zeros_like(first)
    pair, number = numbered((end - origin + run - 1) // run - (first - origin) // run)
    begin = ((first - origin) // run)[pair] * run + number * run + origin[pair]
    stop = torch.minimum(begin + run, end[pair])
    begin = torch.maximum(begin, first[pair])
    middle = torch.minimum(torch.maximum(clear[pair], begin), stop)
    late = torch.minimum(torch.maximum(until[pair], middle), stop)
    segment, first_key, end_key, key = segment[pair], first_key[pair], end_key[pair], key[pair]
    row, here = start[segment] + begin * tokens, position[segment] + begin * tokens

    # In the order of key tiles, a key tile's programs in that of their rows.
    apart = int(highest.max()) // KEYS + 1 if len(highest) else 1
    order = (owner[segment] * apart + key // KEYS).sort(stable=True).indices
    name = (owner[segment] * apart + key // KEYS)[order]
    _, key_tile, counts = name.unique_consecutive(return_inverse=True, return_counts=True)
    nothing = torch.zeros_like(key_tile)
    sums = torch.stack(
        (base[segment][order], first_key[order], end_key[order], nothing, nothing, key_tile), dim=1
    )
    parts = torch.zeros(len(counts) + 1, dtype=torch.int32, device="cpu")
    parts[1:] = counts.cumsum(0)

    # As few launches as the workspace allows, of one size; in each the latest rows come first.
    total = len(order)
    launches = -(-total // most) if total else 0
    size = -(-total // launches) if launches else 1
    place = torch.arange(total, device="cpu")
    table = torch.stack(
        (
            (base[segment] + key)[order],
            key[order],
            (first_tile[segment] + begin)[order],
            row[order],
            here[order],
            (last[segment] + 1)[order],
            (stop - begin)[order],
            (middle - begin)[order],
            (late - begin)[order],
            place % size,
        ),
        dim=1,
    )
    rank = (begin // run)[order]
    by_rank = (-rank).sort(stable=True).indices
    table = table[by_rank[(place // size)[by_rank].sort(stable=True).indices]].to(torch.int32)
    device = segments.table.device
    return KeyWork(
        to_device(table, device),
        tuple(min(size, total - i) for i in range(0, total, size)),
        to_device(sums, device),
        to_device(parts, device),
        int((sums[:, 2] - sums[:, 1])[parts[:-1].long()].sum()),
    )


def _tiles_in_a_row(tiles: int, programs: int) -> int:
    """A power of two of query tiles, such that each program that runs at a time has a dozen runs.

    Longer runs leave fewer sums to add, shorter ones share out better.
    """
    wanted = max(1, tiles // (12 * programs))
    return max(FEWEST, min(MOST, 1 << (wanted.bit_length() - 1)))

"""Which query tiles see a tile of keys: what the programs of dk and dv walk over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.shared.arithmetic import PIECE
from nsa_kernels.triton.shared.cache import cached, to_device
from nsa_kernels.triton.shared.tables import numbered, query_tiles


class KeyTiles(NamedTuple):
    """Runs of at most BN keys with the query tiles that see them, at most PIECE for a program.

    table: int64 [programs, 6] on the device: row of key 0, first key, end of the keys, first query
    tile, end of the query tiles, and the key tile that the program belongs to.
    parts: int32 [key tiles + 1], where each key tile's programs start.
    num_keys: how many rows of keys the tiles have, each in one tile.
    """

    table: Tensor
    parts: Tensor
    num_keys: int


def key_tiles(segments: QuerySegments, band: Band, queries: int, keys: int) -> KeyTiles:
    """The tiles of at most `keys` keys against the tiles of at most `queries` queries."""
    name = ("key", band, queries, keys, PIECE)
    return cached(segments, name, lambda: _key_tiles(segments, band, queries, keys))


def _key_tiles(segments: QuerySegments, band: Band, queries: int, keys: int) -> KeyTiles:
    _, length, position, base = query_tiles(segments, queries, band.column).host.unbind(1)
    # Neighbouring tiles that count keys from one row see the same keys.
    group = torch.zeros_like(base)
    group[1:] = (base[1:] != base[:-1]).cumsum(0)
    begin, end = band.keys(position, position + length - 1)
    seeing = (begin < end).nonzero().squeeze(1)
    group, begin, end, base = (x[seeing] for x in (group, begin, end, base))
    _, group, count = group.unique_consecutive(return_inverse=True, return_counts=True)
    first_of_group = count.cumsum(0) - count
    low = torch.zeros_like(count).scatter_reduce(0, group, begin, "amin", include_self=False)
    high = torch.zeros_like(count).scatter_reduce(0, group, end, "amax", include_self=False)

    # Where later tiles of a group see earlier keys, all tiles are taken to see all of its keys.
    same = group[1:] == group[:-1]
    descends = ((begin[1:] < begin[:-1]) | (end[1:] < end[:-1])) & same
    mixed = torch.zeros_like(count, dtype=torch.bool)
    mixed[group[1:][descends]] = True
    begin = torch.where(mixed[group], low[group], begin)
    end = torch.where(mixed[group], high[group], end)

    key_group, number = numbered((high + keys - 1) // keys - low // keys)
    key = (low // keys)[key_group] * keys + number * keys
    stop = torch.minimum(key + keys, high[key_group])
    # One search through all groups: each has a range of numbers of its own.
    apart = int(high.max()) + 1 if len(high) else 1
    first = torch.searchsorted(end + group * apart, key + key_group * apart, right=True)
    until = torch.searchsorted(begin + group * apart, stop + key_group * apart)
    seen = first < until
    key, stop, key_group, first, until = (x[seen] for x in (key, stop, key_group, first, until))
    key_begin = torch.maximum(key, low[key_group])
    first_tile, end_tile = seeing[first], seeing[until - 1] + 1

    count = end_tile - first_tile
    programs = (count + PIECE - 1) // PIECE
    key_tile, number = numbered(programs)
    first_tile, count, shares = first_tile[key_tile], count[key_tile], programs[key_tile]
    table = torch.stack(
        (
            base[first_of_group[key_group]][key_tile],
            key_begin[key_tile],
            stop[key_tile],
            first_tile + count * number // shares,
            first_tile + count * (number + 1) // shares,
            key_tile,
        ),
        dim=1,
    )
    parts = torch.zeros(len(programs) + 1, dtype=torch.int32, device="cpu")
    parts[1:] = programs.cumsum(0)
    device = segments.table.device
    num_keys = int((stop - key_begin).sum())
    return KeyTiles(to_device(table, device), to_device(parts, device), num_keys)

"""The work of the score kernel's persistent programs on Hopper, shared out on the host.

Scores of different blocks do not depend on each other, so a run of query tiles and their key tiles
can be cut anywhere between two key tiles. All programs get the same work, whatever the lengths of
documents and however few rows a chunk has. To begin with a query tile takes as long as a key tile:
its numbers, log-sum-exps and queries are waited for. Where that was not counted, the programs of
early tokens, whose tiles have few keys, took half as long again as the others.

Letters: I query tiles of each KV head, P pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selection.chunks import Chunk
from nsa_kernels.triton.shared.cache import cached, to_device
from nsa_kernels.triton.shared.tables import QueryTiles

# Keys of a tile.
KEYS = 64
# What a query tile costs beside its key tiles, in key tiles.
START = 1


class Pieces(NamedTuple):
    """Some key tiles of a query tile each, one program's after another's.

    table: int32 [P, 8]: first row, rows, position of the first, row of key 0, KV head, the key
    tiles [begin, end), 0. starts: int32 [programs + 1], where the pieces of a program start.
    """

    table: Tensor
    starts: Tensor


class Share(NamedTuple):
    """What pieces depend on beside their tiles: key i ends at position i * stride + offset; a query
    has scores for the first `most_keys`; `groups` KV heads, `programs` of the kernel."""

    offset: int
    stride: int
    most_keys: int
    groups: int
    programs: int


def pieces(segments: QuerySegments, tiles: QueryTiles, chunk: Chunk, share: Share) -> Pieces:
    """Of the chunk's tiles, all KV heads of a tile next to each other."""
    made = cached(
        segments, ("pieces", chunk, share), lambda: _pieces(segments, tiles, chunk, share)
    )
    assert isinstance(made, Pieces)
    return made


def _pieces(segments: QuerySegments, tiles: QueryTiles, chunk: Chunk, share: Share) -> Pieces:
    host = tiles.host[chunk.first_tile : chunk.end_tile]
    last = host[:, 1] + host[:, 2] - 1
    seen = (last - share.offset + share.stride).clamp(min=0) // share.stride
    # A tile that the chunk's end cuts may hold later tokens, which see keys without a score.
    count = (seen.clamp(max=share.most_keys) + KEYS - 1) // KEYS
    count_I = count.repeat_interleave(share.groups)
    end_I = count_I.cumsum(0)
    begin_I = end_I - count_I
    total = int(count_I.sum())
    # Cuts are equally far apart in cost; one that falls into a start is put in front of it.
    cost_I = torch.where(count_I > 0, count_I + START, 0)
    end_cost_I = cost_I.cumsum(0)
    at = torch.arange(share.programs + 1, device="cpu") * int(cost_I.sum()) // share.programs
    item = torch.searchsorted(end_cost_I, at[:-1], right=True).clamp(max=len(count_I) - 1)
    inside = at[:-1] - (end_cost_I - cost_I)[item] - START
    cuts = torch.cat((begin_I[item] + inside.clamp(min=0), at.new_full((1,), total)))
    begin_P = torch.cat((begin_I, cuts)).unique()
    begin_P = begin_P[begin_P < total]
    end_P = torch.cat((begin_P[1:], begin_P.new_full((1,), total)))[: len(begin_P)]
    item_P = torch.searchsorted(end_I, begin_P, right=True)
    table = torch.cat(
        (
            host[item_P // share.groups],
            torch.stack(
                (
                    item_P % share.groups,
                    begin_P - begin_I[item_P],
                    end_P - begin_I[item_P],
                    torch.zeros_like(item_P),
                ),
                dim=1,
            ),
        ),
        dim=1,
    )
    starts = torch.searchsorted(begin_P, cuts)
    device = segments.table.device
    return Pieces(
        to_device(table.to(torch.int32), device), to_device(starts.to(torch.int32), device)
    )

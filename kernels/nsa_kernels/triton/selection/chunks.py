"""Runs of query rows whose scores fit the workspace.

Letters: M segments that have rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.shared.cache import cached
from nsa_kernels.triton.shared.tables import query_tiles


class Chunk(NamedTuple):
    """Query rows [begin, end), which tiles [first_tile, end_tile) hold; their highest position."""

    begin: int
    end: int
    first_tile: int
    end_tile: int
    last: int


def chunks(segments: QuerySegments, size: int, tokens: int, column: str) -> list[Chunk]:
    """The local rows in runs of at most `size`, over the query tiles of at most `tokens` rows."""
    name = ("chunks", size, tokens, column)
    return cached(segments, name, lambda: _chunks(segments, size, tokens, column))


def _chunks(segments: QuerySegments, size: int, tokens: int, column: str) -> list[Chunk]:
    start_M, length_M, position_M = segments.host[segments.host[:, 1] > 0][:, :3].unbind(1)
    # One of each for a chunk, like those below without a letter.
    begin = torch.arange(0, segments.num_queries, size, device="cpu")
    end = (begin + size).clamp(max=segments.num_queries)
    # Positions ascend in a segment: the highest of a chunk ends it, or ends a segment in it.
    at_end = torch.searchsorted(start_M + length_M, end - 1, right=True)
    last = (position_M - start_M)[at_end] + end - 1
    chunk_M = (start_M + length_M - 1) // size
    last = last.scatter_reduce(0, chunk_M, position_M + length_M - 1, "amax")
    first_rows = query_tiles(segments, tokens, column).host[:, 0].contiguous()
    first_tile = torch.searchsorted(first_rows, begin, right=True) - 1
    end_tile = torch.searchsorted(first_rows, end)
    columns = (begin, end, first_tile, end_tile, last)
    return [Chunk(*row) for row in torch.stack(columns, dim=1).tolist()]

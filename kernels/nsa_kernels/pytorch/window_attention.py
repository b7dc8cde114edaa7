"""The window branch: attention to the last w tokens (arXiv 2502.11089, section 3.3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_kernels.pytorch._common import tile_rows
from nsa_kernels.pytorch._tiled_attention import Tile, TiledAttention
from nsa_kernels.segments import QuerySegments

# Wide enough for few tiles, and for a small window not much wider than it.
MIN_QUERIES = 64


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    *,
    window: int,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `Backend.window_attention`."""
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    size = max(window, MIN_QUERIES)
    while size > tile_rows(q.shape[1] * (size + window)):
        size //= 2

    def tiles() -> Iterator[Tile]:
        for segment in segments.rows:
            first = segment.position
            oldest_of_all = max(0, first - window + 1)
            span = (
                segment.window_base + oldest_of_all,
                segment.window_base + first + segment.length,
            )
            for part in segment.split(size):
                end = part.position + part.length
                oldest = max(0, part.position - window + 1)
                query_m1 = torch.arange(part.position, end, device=q.device).unsqueeze(1)
                # Columns before `shared` are too old for the last query, those after the first
                # query's own are too new for it; columns between are seen by all.
                shared = max(oldest, end - window)
                old_mK = torch.arange(oldest, shared, device=q.device) <= query_m1 - window
                new_mK = torch.arange(part.position + 1, end, device=q.device) > query_m1
                base = part.window_base
                hidden = ((0, old_mK), (part.position + 1 - oldest, new_mK))
                stop = part.start + part.length
                yield Tile(part.start, stop, base + oldest, base + end, hidden, span)

    # A key is in few tiles: no tree of sums.
    return TiledAttention.apply(q, k, v, tiles, scale, gate, math.inf)

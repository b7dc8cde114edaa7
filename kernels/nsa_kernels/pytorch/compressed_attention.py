"""The compressed branch: causal attention to the compressed tokens (Eq. 7, arXiv 2502.11089)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_kernels.pytorch._common import tile_rows
from nsa_kernels.pytorch._tiled_attention import Tile, TiledAttention
from nsa_kernels.segments import QuerySegments, Segment


def num_visible(position: int, block: int, stride: int) -> int:
    """Compression blocks whose last token i*d + l - 1 is at or before `position`."""
    return max(0, (position - block + 1) // stride + 1)


def hidden_blocks(
    segment: Segment, first: int, last: int, block: int, stride: int, device: torch.device
) -> Tensor:
    """bool [m, C]: which of the compression blocks [first, last) each query does not see."""
    position_m1 = torch.arange(
        segment.position, segment.position + segment.length, device=device
    ).unsqueeze(1)
    ends_C = torch.arange(first, last, device=device) * stride + (block - 1)
    return ends_C > position_m1


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `Backend.compressed_attention`."""
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    num_heads = q.shape[1]

    def tiles() -> Iterator[Tile]:
        for segment in segments.rows:
            # The queries before the end of the first block see nothing.
            blind = min(max(0, block - 1 - segment.position), segment.length)
            seeing = segment._replace(
                start=segment.start + blind,
                length=segment.length - blind,
                position=segment.position + blind,
            )
            most = num_visible(seeing.position + seeing.length - 1, block, stride)
            span = (seeing.compressed_base, seeing.compressed_base + most)
            for part in seeing.split(tile_rows(num_heads * most)):
                first = num_visible(part.position, block, stride)
                last = num_visible(part.position + part.length - 1, block, stride)
                hidden_mC = hidden_blocks(part, first, last, block, stride, q.device)
                base = part.compressed_base
                stop = part.start + part.length
                yield Tile(part.start, stop, base, base + last, ((first, hidden_mC),), span)

    return TiledAttention.apply(q, k, v, tiles, scale, gate)

"""The choice of blocks from the compressed attention's probabilities (Eq. 9 to 11, 2502.11089).

A tile of queries scores all blocks it could choose, ranks them and keeps the indices; scores are
never kept. Every column is computed by the same additions in the same order, so that equal
probabilities give equal scores wherever they stand, and ties fall as the definition says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.pytorch._common import (
    Rows,
    accumulation_dtype,
    exact,
    group_queries,
    heads_first,
    tile_rows,
)
from nsa_kernels.pytorch.compressed_attention import hidden_blocks, num_visible
from nsa_kernels.segments import QuerySegments, Segment


def _group_probabilities(
    part: Segment, query: Tensor, keys: Tensor, block: int, stride: int, scale: float
) -> Tensor:
    """[G, m, C]: probabilities of the visible keys [G, C, Dk], summed over the heads of a group."""
    m = part.length
    # Multiplied after the product, which is then exact for inputs that make it so.
    logits = (torch.bmm(query, keys.mT) * scale).unflatten(1, (-1, m))  # [G, R, m, C]
    hidden = hidden_blocks(part, 0, keys.shape[1], block, stride, query.device)
    # Not exp(logit - lse): rounding of a large lse would weigh the heads of a group differently.
    probs = logits.masked_fill(hidden, -math.inf).softmax(dim=-1)
    total = probs[:, 0]
    for r in range(1, probs.shape[1]):
        total = total + probs[:, r]
    return total


def _block_scores(probs: Tensor, num_blocks: int, per_block: int, overlap: int) -> Tensor:
    """[G, m, C] -> [G, m, B]: sum of p[per_block*j + a - b] for a < per_block, b < overlap."""
    width = per_block * num_blocks
    padded = F.pad(probs, (overlap - 1, width - probs.shape[-1]))
    spread = padded[..., overlap - 1 :]
    for b in range(1, overlap):
        spread = spread + padded[..., overlap - 1 - b : overlap - 1 - b + width]
    scores = spread[..., 0::per_block]
    for a in range(1, per_block):
        scores = scores + spread[..., a::per_block]
    return scores


def _best(scores: Tensor, num_selected: int) -> Tensor:
    """[G, m, B] -> int64 [G, m, n]: columns of the n highest, ties to the lower, ascending."""
    least = scores.topk(num_selected, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, tied = scores > least, scores == least
    places = num_selected - above.sum(dim=-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= places))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], num_selected)


@torch.no_grad()
@exact
def select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Tensor:
    """See `Backend.select_blocks`. A tile has all keys of its queries and needs no lse."""
    del lse
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    device, dtype = q.device, accumulation_dtype(q)
    num_queries, num_heads, _ = q.shape
    num_groups = k.shape[1]
    keys = heads_first(k, dtype)
    selected = Rows(q.new_zeros((0, num_groups, num_selected), dtype=torch.int32), -1)
    for segment in segments.rows:
        most = max(1, num_visible(segment.position + segment.length - 1, block, stride))
        for part in segment.split(tile_rows(num_heads * most)):
            rows = slice(part.start, part.start + part.length)
            newest = part.position + part.length - 1
            num_blocks = newest // select_block + 1
            own = torch.arange(part.position, newest + 1, device=device)[:, None] // select_block
            if num_blocks <= num_selected:  # every eligible block is chosen
                best = torch.arange(num_blocks, device=device)
                best = best.expand(num_groups, part.length, num_blocks)
            else:
                base, visible = part.compressed_base, num_visible(newest, block, stride)
                probs = _group_probabilities(
                    part,
                    group_queries(q[rows], num_groups, dtype),
                    keys[:, base : base + visible],
                    block,
                    stride,
                    scale,
                )
                per_block, overlap = select_block // stride, block // stride
                scores = _block_scores(probs, num_blocks, per_block, overlap)
                # NaN: the query sees no key, or one that is not finite.
                scores = scores.float().nan_to_num(nan=0.0)
                column = torch.arange(num_blocks, device=device)
                forced = (column < num_init_blocks) | (column > own - num_local_blocks)
                scores = scores.masked_fill(forced, math.inf).masked_fill(column > own, -math.inf)
                best = _best(scores, num_selected)
            best = best.masked_fill(best > own, -1).transpose(0, 1)
            selected.add(part.start, F.pad(best, (0, num_selected - best.shape[-1]), value=-1))
    return selected.joined(num_queries)

"""The choice of blocks from the compressed attention's probabilities (Eq. 9 to 11, 2502.11089).

A tile of queries scores all blocks it could choose, ranks them and keeps the indices; scores are
never kept. Every column is computed by the same additions in the same order, so that equal
probabilities give equal scores wherever they stand, and ties fall as the definition says.

Letters: H query heads, G KV heads, R = H/G, D width, C compressed tokens, B selection blocks, n
chosen blocks, m queries of a tile, Q = R*m.
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
    part: Segment, query_GQD: Tensor, keys_GCD: Tensor, block: int, stride: int, scale: float
) -> Tensor:
    """[G, m, C]: probabilities of the visible keys, summed over the heads of a group."""
    m = part.length
    # Multiplied after the product, which is then exact for inputs that make it so.
    logits_GRmC = (torch.bmm(query_GQD, keys_GCD.mT) * scale).unflatten(1, (-1, m))
    hidden_mC = hidden_blocks(part, 0, keys_GCD.shape[1], block, stride, query_GQD.device)
    # Not exp(logit - lse): rounding of a large lse would weigh the heads of a group differently.
    probs_GRmC = logits_GRmC.masked_fill(hidden_mC, -math.inf).softmax(dim=-1)
    total_GmC = probs_GRmC[:, 0]
    for r in range(1, probs_GRmC.shape[1]):
        total_GmC = total_GmC + probs_GRmC[:, r]
    return total_GmC


def _block_scores(probs_GmC: Tensor, num_blocks: int, per_block: int, overlap: int) -> Tensor:
    """[G, m, B]: sum of p[per_block*j + a - b] for a < per_block, b < overlap."""
    width = per_block * num_blocks
    padded = F.pad(probs_GmC, (overlap - 1, width - probs_GmC.shape[-1]))
    spread = padded[..., overlap - 1 :]
    for b in range(1, overlap):
        spread = spread + padded[..., overlap - 1 - b : overlap - 1 - b + width]
    scores_GmB = spread[..., 0::per_block]
    for a in range(1, per_block):
        scores_GmB = scores_GmB + spread[..., a::per_block]
    return scores_GmB


def _is_best(scores_GmB: Tensor, num_selected: int) -> Tensor:
    """bool [G, m, B]: which are the n highest, ties to the lower."""
    min_Gm1 = scores_GmB.topk(num_selected, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above_GmB, tied_GmB = scores_GmB > min_Gm1, scores_GmB == min_Gm1
    places_Gm1 = num_selected - above_GmB.sum(dim=-1, keepdim=True)
    return above_GmB | (tied_GmB & (tied_GmB.cumsum(dim=-1, dtype=torch.int32) <= places_Gm1))


def _best(scores_GmB: Tensor, num_selected: int) -> Tensor:
    """int64 [G, m, n]: columns of the n highest, ties to the lower, ascending."""
    chosen_GmB = _is_best(scores_GmB, num_selected)
    return chosen_GmB.nonzero()[:, -1].view(*scores_GmB.shape[:-1], num_selected)


def _best_on_device(scores_GmB: Tensor, num_selected: int) -> Tensor:
    """As `_best`, which is faster on a CPU, and waits for a GPU to count what is chosen."""
    num_blocks = scores_GmB.shape[-1]
    column_B = torch.arange(num_blocks, device=scores_GmB.device)
    column_GmB = column_B.where(_is_best(scores_GmB, num_selected), num_blocks)
    return column_GmB.topk(num_selected, dim=-1, largest=False).values


def best_blocks(
    probs_GmC: Tensor,
    own_m1: Tensor,
    num_blocks: int,
    *,
    per_block: int,
    overlap: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    on_device: bool = False,
) -> Tensor:
    """int64 [G, m, n] of more blocks than n; those after a query's own for what it lacks.

    probs_GmC: probabilities of compressed keys, summed over the heads of a group; own_m1: the block
    of each query; per_block: compressed keys that begin in a block; overlap: of a key, in strides;
    on_device: whether the host must not wait for the device.
    """
    scores_GmB = _block_scores(probs_GmC, num_blocks, per_block, overlap)
    # NaN: the query sees no key, or one that is not finite.
    scores_GmB = scores_GmB.float().nan_to_num(nan=0.0)
    column_B = torch.arange(num_blocks, device=own_m1.device)
    forced_mB = (column_B < num_init_blocks) | (column_B > own_m1 - num_local_blocks)
    scores_GmB = scores_GmB.masked_fill(forced_mB, math.inf).masked_fill(
        column_B > own_m1, -math.inf
    )
    return (_best_on_device if on_device else _best)(scores_GmB, num_selected)


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
    selected = Rows(q.new_zeros((0, num_groups, num_selected), dtype=torch.int32), -1)
    for segment in segments.rows:
        newest_of_all = segment.position + segment.length - 1
        most = num_visible(newest_of_all, block, stride)
        keys_GCD = k.new_empty(0)
        if newest_of_all // select_block + 1 > num_selected:  # Some query has a choice.
            base = segment.compressed_base
            keys_GCD = heads_first(k[base : base + most], dtype)
        for part in segment.split(tile_rows(num_heads * max(1, most))):
            rows = slice(part.start, part.start + part.length)
            newest = part.position + part.length - 1
            num_blocks = newest // select_block + 1
            own_m1 = torch.arange(part.position, newest + 1, device=device)[:, None] // select_block
            if num_blocks <= num_selected:  # every eligible block is chosen
                best = torch.arange(num_blocks, device=device)
                best = best.expand(num_groups, part.length, num_blocks)
            else:
                visible = num_visible(newest, block, stride)
                probs_GmC = _group_probabilities(
                    part,
                    group_queries(q[rows], num_groups, dtype),
                    keys_GCD[:, :visible],
                    block,
                    stride,
                    scale,
                )
                best = best_blocks(
                    probs_GmC,
                    own_m1,
                    num_blocks,
                    per_block=select_block // stride,
                    overlap=block // stride,
                    num_selected=num_selected,
                    num_init_blocks=num_init_blocks,
                    num_local_blocks=num_local_blocks,
                )
            best = best.masked_fill(best > own_m1, -1).transpose(0, 1)  # [m, G, n]
            selected.add(part.start, F.pad(best, (0, num_selected - best.shape[-1]), value=-1))
    return selected.joined(num_queries)

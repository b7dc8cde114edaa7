"""Attention of runs of queries to runs of keys, which the compressed and window branches are.

Both walk over tiles: consecutive queries of one document against the contiguous rows that any of
them sees. Which query sees which row is a mask on the columns at the edges of a tile; everything
between is seen by all its queries. A tile holds all keys of its queries, so the softmax is direct.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.pytorch._common import (
    SUMMANDS_IN_A_ROW,
    TreeSum,
    accumulation_dtype,
    exact,
    finite,
    group_queries,
    heads_first,
    poison_keys,
    scaled_product,
    ungroup_queries,
)


class Tile(NamedTuple):
    """m queries [start, stop) against keys [key_start, key_stop); every query sees at least one.

    hidden: (first column, bool [m, columns]), True where the query does not see the key; columns
    count from key_start. Columns in none of them are seen by every query.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    hidden: tuple[tuple[int, Tensor], ...]

    def mask_(self, x: Tensor, value: float) -> Tensor:
        """Fills what is hidden in x [G, R*m, keys], in place."""
        grid = x.unflatten(1, (-1, self.stop - self.start))
        for column, hidden in self.hidden:
            grid[..., column : column + hidden.shape[1]].masked_fill_(hidden, value)
        return x


class TiledAttention(torch.autograd.Function):
    """o = softmax(scale q k^T) v over what the tiles show, with its log-sum-exp.

    Backward computes the probabilities P of a tile again: dP = do v^T, dS = P (dP - sum_k P dP),
    dq = scale dS k, dk = scale dS^T q, dv = P^T do. `tiles` makes the tiles anew at each call;
    `in_a_row` bounds how many of them are added to the same key before pairs of sums are.
    """

    @staticmethod
    @exact
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Callable[[], Iterator[Tile]],
        scale: float,
        in_a_row: float = SUMMANDS_IN_A_ROW,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(q)
        keys, values = poison_keys(heads_first(k, dtype), heads_first(v, dtype))
        num_groups = keys.shape[0]
        o = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = q.new_full(q.shape[:2], -math.inf, dtype=dtype)
        for tile in tiles():
            rows, columns = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            query = group_queries(q[rows], num_groups, dtype)
            logits = tile.mask_(scaled_product(query, keys[:, columns].mT, scale), -math.inf)
            probs = logits.softmax(dim=-1)
            # The largest probability is exp(max - lse), so no second pass of exp is needed.
            tile_lse = logits.amax(dim=-1) - probs.amax(dim=-1).log()
            m = tile.stop - tile.start
            out = torch.bmm(probs, values[:, columns])
            o[rows].unflatten(1, (num_groups, -1)).copy_(ungroup_queries(out, m))
            lse[rows].unflatten(1, (num_groups, -1)).copy_(ungroup_queries(tile_lse, m))
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale, ctx.in_a_row = tiles, scale, in_a_row
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @exact
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dtype, scale = accumulation_dtype(q), ctx.scale
        keys, values = poison_keys(heads_first(k, dtype), heads_first(v, dtype))
        clean_keys = finite(keys)
        num_groups = keys.shape[0]
        grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = TreeSum(keys, ctx.in_a_row), TreeSum(values, ctx.in_a_row)
        for tile in ctx.tiles():
            rows, columns = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            query = group_queries(q[rows], num_groups, dtype)
            grad_out = group_queries(grad_o[rows], num_groups, dtype)
            logits = tile.mask_(scaled_product(query, keys[:, columns].mT, scale), -math.inf)
            probs = tile.mask_(logits.softmax(dim=-1), 0.0)
            del logits
            grad_v.next()[:, columns].baddbmm_(probs.mT, grad_out)
            grad_probs = torch.bmm(grad_out, values[:, columns].mT)
            grad_logits = tile.mask_(grad_probs, 0.0).mul_(probs)
            delta = grad_logits.sum(dim=-1, keepdim=True)
            grad_logits.addcmul_(probs, delta, value=-1)
            grad_k.next()[:, columns].baddbmm_(grad_logits.mT, query, alpha=scale)
            grad_query = scaled_product(grad_logits, clean_keys[:, columns], scale)
            m = tile.stop - tile.start
            grad_q[rows].unflatten(1, (num_groups, -1)).copy_(ungroup_queries(grad_query, m))
        grad_keys = grad_k.result().transpose(0, 1).to(k.dtype)
        grad_values = grad_v.result().transpose(0, 1).to(v.dtype)
        return grad_q, grad_keys, grad_values, None, None, None

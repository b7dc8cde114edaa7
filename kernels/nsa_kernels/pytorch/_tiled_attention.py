"""Attention of runs of queries to runs of keys, which the compressed and window branches are.

Both walk over tiles: consecutive queries of one document against the contiguous rows that any of
them sees. Which query sees which row is a mask on the columns at the edges of a tile; everything
between is seen by all its queries. A tile holds all keys of its queries, so the softmax is direct.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.autograd import first_order
from nsa_kernels.pytorch._common import (
    SUMMANDS_IN_A_ROW,
    FiniteRows,
    Rows,
    TreeSum,
    accumulation_dtype,
    exact,
    group_queries,
    heads_first,
    product_over_rows,
    scaled_product,
    softmax_backward_,
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

    def logits(self, query: Tensor, context: FiniteRows, scale: float) -> Tensor:
        """[G, R*m, keys] of query [G, R*m, Dk]; -inf where hidden, NaN where a bad row is seen."""
        columns = slice(self.key_start, self.key_stop)
        logits = scaled_product(query, context.keys[:, columns].mT, scale)
        if context.bad is not None:
            logits = logits.masked_fill(context.bad[:, None, columns], math.nan)
        num_keys = self.key_stop - self.key_start
        everywhere = [
            F.pad(hidden, (column, num_keys - column - hidden.shape[1]))
            for column, hidden in self.hidden
        ]
        hidden = functools.reduce(torch.logical_or, everywhere)  # [m, keys]
        grid = logits.unflatten(1, (-1, hidden.shape[0]))
        return grid.masked_fill(hidden, -math.inf).flatten(1, 2)


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
        context = FiniteRows.of(heads_first(k, dtype), heads_first(v, dtype))
        num_groups = k.shape[1]
        o = Rows(q.new_zeros(0, q.shape[1], v.shape[-1]), 0.0)
        lse = Rows(q.new_zeros(0, q.shape[1], dtype=dtype), -math.inf)
        for tile in tiles():
            rows, columns = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            query = group_queries(q[rows], num_groups, dtype)
            logits = tile.logits(query, context, scale)
            probs = logits.softmax(dim=-1)
            # The largest probability is exp(max - lse), so no second pass of exp is needed.
            tile_lse = logits.amax(dim=-1) - probs.amax(dim=-1).log()
            m = tile.stop - tile.start
            out = torch.bmm(probs, context.values[:, columns])
            o.add(tile.start, ungroup_queries(out, m).flatten(1, 2))
            lse.add(tile.start, ungroup_queries(tile_lse, m).flatten(1, 2))
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale, ctx.in_a_row = tiles, scale, in_a_row
        outputs = o.joined(q.shape[0]), lse.joined(q.shape[0])
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dtype, scale = accumulation_dtype(q), ctx.scale
        context = FiniteRows.of(heads_first(k, dtype), heads_first(v, dtype))
        num_groups = k.shape[1]
        grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
        grad_k = TreeSum(context.keys, ctx.in_a_row)
        grad_v = TreeSum(context.values, ctx.in_a_row)
        for tile in ctx.tiles():
            rows, columns = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            query = group_queries(q[rows], num_groups, dtype)
            grad_out = group_queries(grad_o[rows], num_groups, dtype)
            probs = tile.mask_(tile.logits(query, context, scale).softmax(dim=-1), 0.0)
            grad_v.next()[:, columns].add_(product_over_rows(probs, grad_out))
            grad_probs = tile.mask_(torch.bmm(grad_out, context.values[:, columns].mT), 0.0)
            grad_logits = tile.mask_(softmax_backward_(grad_probs, probs), 0.0)
            grad_k.next()[:, columns].add_(product_over_rows(grad_logits, query))
            grad_query = scaled_product(grad_logits, context.keys[:, columns], scale)
            m = tile.stop - tile.start
            grad_q[rows].unflatten(1, (num_groups, -1)).copy_(ungroup_queries(grad_query, m))
        grad_keys = grad_k.result().mul_(scale).transpose(0, 1).to(k.dtype)
        grad_values = grad_v.result().transpose(0, 1).to(v.dtype)
        return grad_q, grad_keys, grad_values, None, None, None

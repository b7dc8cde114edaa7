"""Attention of runs of queries to runs of keys, which the compressed and window branches are.

Both walk over tiles: consecutive queries of one document against the contiguous rows that any of
them sees. Which query sees which row is a mask on the columns at the edges of a tile; everything
between is seen by all its queries. A tile holds all keys of its queries, so the softmax is direct.

Letters: N local rows, H query heads, G KV heads, R = H/G, D widths, E key rows, m queries of a
tile, Q = R*m rows of its matrix, K its keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.autograd import first_order, with_summand
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
    count from key_start. Columns in none of them are seen by every query. span: the rows that the
    tiles of this one's segment read.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    hidden: tuple[tuple[int, Tensor], ...]
    span: tuple[int, int]

    def mask_(self, x_GQK: Tensor, value: float) -> Tensor:
        """Fills what is hidden in x, in place."""
        grid_GRmK = x_GQK.unflatten(1, (-1, self.stop - self.start))
        for column, hidden in self.hidden:
            grid_GRmK[..., column : column + hidden.shape[1]].masked_fill_(hidden, value)
        return x_GQK

    def columns(self, first: int) -> slice:
        """Its keys in rows that begin with row `first`."""
        return slice(self.key_start - first, self.key_stop - first)

    def logits(
        self, query_GQD: Tensor, context: FiniteRows, scale: float, first: int = 0
    ) -> Tensor:
        """[G, Q, K]: -inf where hidden, NaN where a bad row is seen.

        first: the row that the context begins with.
        """
        columns = self.columns(first)
        logits_GQK = scaled_product(query_GQD, context.keys[:, columns].mT, scale)
        if context.bad is not None:
            logits_GQK = logits_GQK.masked_fill(context.bad[:, None, columns], math.nan)
        num_keys = self.key_stop - self.key_start
        everywhere = [
            F.pad(hidden, (column, num_keys - column - hidden.shape[1]))
            for column, hidden in self.hidden
        ]
        hidden = functools.reduce(torch.logical_or, everywhere)  # [m, K]
        grid_GRmK = logits_GQK.unflatten(1, (-1, hidden.shape[0]))
        return grid_GRmK.masked_fill(hidden, -math.inf).flatten(1, 2)


class TiledAttention(torch.autograd.Function):
    """o = softmax(scale q k^T) v over what the tiles show, with its log-sum-exp.

    Backward computes the probabilities P of a tile again: dP = do v^T, dS = P (dP - delta) with
    delta = sum_k P dP, dq = scale dS k, dk = scale dS^T q, dv = P^T do. With a gate g, do is the
    gradient of the gated sum, P and dS are multiplied by g, and delta is the gradient of g. `tiles`
    makes the tiles anew at each call; `in_a_row` bounds how many of them are added to the same key
    before pairs of sums are.
    """

    @staticmethod
    @exact
    def forward(
        ctx: Any,
        q_NHD: Tensor,
        k_EGD: Tensor,
        v_EGD: Tensor,
        tiles: Callable[[], Iterator[Tile]],
        scale: float,
        gate_NH: Tensor | None,
        in_a_row: float = SUMMANDS_IN_A_ROW,
    ) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(q_NHD)
        num_groups = k_EGD.shape[1]
        # Of many rows, such as those of a cache, few queries may read few: no others are copied.
        span, context = None, None
        o = Rows(q_NHD.new_zeros(0, q_NHD.shape[1], v_EGD.shape[-1]), 0.0)
        lse = Rows(q_NHD.new_zeros(0, q_NHD.shape[1], dtype=dtype), -math.inf)
        for tile in tiles():
            if context is None or tile.span != span:
                span, read = tile.span, slice(*tile.span)
                keys, values = heads_first(k_EGD[read], dtype), heads_first(v_EGD[read], dtype)
                context = FiniteRows.of(keys, values)
            rows, columns = slice(tile.start, tile.stop), tile.columns(tile.span[0])
            query_GQD = group_queries(q_NHD[rows], num_groups, dtype)
            logits_GQK = tile.logits(query_GQD, context, scale, tile.span[0])
            probs_GQK = logits_GQK.softmax(dim=-1)
            # The largest probability is exp(max - lse), so no second pass of exp is needed.
            lse_GQ = logits_GQK.amax(dim=-1) - probs_GQK.amax(dim=-1).log()
            m = tile.stop - tile.start
            out_GQD = torch.bmm(probs_GQK, context.values[:, columns])
            o.add(tile.start, ungroup_queries(out_GQD, m).flatten(1, 2))
            lse.add(tile.start, ungroup_queries(lse_GQ, m).flatten(1, 2))
        ctx.save_for_backward(q_NHD, k_EGD, v_EGD, gate_NH)
        ctx.tiles, ctx.scale, ctx.in_a_row = tiles, scale, in_a_row
        return with_summand(ctx, o.joined(q_NHD.shape[0]), lse.joined(q_NHD.shape[0]), gate_NH)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_EGD, v_EGD, gate_NH = ctx.saved_tensors
        grad_o_NHD = grads[0 if gate_NH is None else -1]
        dtype, scale = accumulation_dtype(q_NHD), ctx.scale
        context = FiniteRows.of(heads_first(k_EGD, dtype), heads_first(v_EGD, dtype))
        num_groups = k_EGD.shape[1]
        grad_q_NHD = torch.zeros_like(q_NHD, memory_format=torch.contiguous_format)
        grad_gate_NH = None if gate_NH is None else torch.zeros_like(gate_NH)
        grad_k = TreeSum(context.keys, ctx.in_a_row)
        grad_v = TreeSum(context.values, ctx.in_a_row)
        for tile in ctx.tiles():
            rows, columns = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            query_GQD = group_queries(q_NHD[rows], num_groups, dtype)
            grad_out_GQD = group_queries(grad_o_NHD[rows], num_groups, dtype)
            probs_GQK = tile.mask_(tile.logits(query_GQD, context, scale).softmax(dim=-1), 0.0)
            grad_probs_GQK = tile.mask_(torch.bmm(grad_out_GQD, context.values[:, columns].mT), 0.0)
            grad_logits_GQK, delta_GQ1 = softmax_backward_(grad_probs_GQK, probs_GQK)
            grad_logits_GQK = tile.mask_(grad_logits_GQK, 0.0)
            m = tile.stop - tile.start
            if gate_NH is not None and grad_gate_NH is not None:
                gate_GQ1 = group_queries(gate_NH[rows].unsqueeze(-1), num_groups, dtype)
                probs_GQK.mul_(gate_GQ1)
                grad_logits_GQK.mul_(gate_GQ1)
                grad_gate_NH[rows] = ungroup_queries(delta_GQ1, m).flatten(1)
            grad_v.next()[:, columns].add_(product_over_rows(probs_GQK, grad_out_GQD))
            grad_k.next()[:, columns].add_(product_over_rows(grad_logits_GQK, query_GQD))
            grad_query_GQD = scaled_product(grad_logits_GQK, context.keys[:, columns], scale)
            grad_q_NHD[rows].unflatten(1, (num_groups, -1)).copy_(
                ungroup_queries(grad_query_GQD, m)
            )
        grad_k_EGD = grad_k.result().mul_(scale).transpose(0, 1).to(k_EGD.dtype)
        grad_v_EGD = grad_v.result().transpose(0, 1).to(v_EGD.dtype)
        return grad_q_NHD, grad_k_EGD, grad_v_EGD, None, None, grad_gate_NH, None

"""The selection branch: attention to the tokens of the chosen blocks (Eq. 11, arXiv 2502.11089).

For one KV head at a time, the blocks that are here become a pool [blocks, l', D]. Forward gathers
the n blocks of each query of a tile, so that a query's sums have one order, whatever its neighbours
chose. Backward goes block by block through the queries that chose it, which moves far less memory
and needs only be the same in every run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.pytorch._common import (
    SUMMANDS_IN_A_ROW,
    TILE_ELEMENTS,
    accumulation_dtype,
    add_rows_,
    exact,
    finite,
    poison_keys,
    scaled_product,
)
from nsa_kernels.segments import QuerySegments


class _Pool:
    """The blocks of one KV head that are here, and one more of zeros for the -1 of a choice.

    keys [blocks + 1, l', Dk], values [blocks + 1, l', Dv], rows behind a block's end 0; slots int64
    [N, n]: which of them the queries chose; seen int64 [N, n]: how many of their tokens are causal.
    """

    def __init__(
        self,
        own: tuple[Tensor, Tensor],
        fetched: tuple[Tensor, Tensor],
        selected: Tensor,
        block_rows: Tensor,
        block_lengths: Tensor,
        segments: QuerySegments,
        select_block: int,
        dtype: torch.dtype,
    ) -> None:
        device = block_rows.device
        num_rows = own[0].shape[0] + fetched[0].shape[0]
        here = (block_rows >= 0).nonzero()[:, 0]
        self.size = here.shape[0]
        offset = torch.arange(select_block, device=device)
        rows = torch.full((self.size + 1, select_block), num_rows, device=device)
        inside = offset < block_lengths[here].unsqueeze(1)
        rows[:-1] = (block_rows[here].unsqueeze(1) + offset).where(inside, rows[:-1])
        self.rows = rows  # [blocks + 1, l']; num_rows is a row of zeros
        pairs = zip(own, fetched, strict=True)
        sources = [torch.cat([a, b, a.new_zeros(1, a.shape[-1])]) for a, b in pairs]
        keys, values = (source[rows].to(dtype) for source in sources)
        self.keys, self.values = poison_keys(keys, values)

        slot_of = torch.full((block_rows.shape[0] + 1,), self.size, device=device)
        slot_of[here] = torch.arange(self.size, device=device)
        chosen = selected >= 0
        ids = selected.long() + segments.selected_bases.unsqueeze(1)
        self.slots = slot_of[ids.where(chosen, block_rows.shape[0])]
        missing = chosen & (self.slots == self.size)
        assert not missing.any(), f"block {int(ids[missing][0])} was chosen and is not here"
        ends = segments.positions.unsqueeze(1) + 1 - selected.long() * select_block
        self.seen = ends.clamp(0, select_block).where(chosen, 0)

    def scatter(self, grads: Tensor) -> Tensor:
        """Gradients of the pool [blocks, l', D] -> of the rows [E + F, D]."""
        num_rows = int(self.rows[-1, 0])
        out = grads.new_zeros(num_rows + 1, grads.shape[-1])
        out[self.rows[:-1]] = grads  # blocks share no row but the last
        return out[:-1]


class _SelectedAttention(torch.autograd.Function):
    """o = softmax(scale q k^T) v over the tokens <= t of the chosen blocks, and its log-sum-exp.

    Saves the largest logit a and the largest probability b of each query, so that backward finds
    P = b exp(scale q k^T - a) without another pass over a query's blocks. Then, as b is common to
    a row, with do' = b do: dP' = do' v^T, dS = exp(..) (dP' - do'.o), dv = exp(..)^T do'.
    """

    @staticmethod
    @exact
    def forward(
        ctx: Any,
        q: Tensor,
        k_own: Tensor,
        v_own: Tensor,
        k_fetched: Tensor,
        v_fetched: Tensor,
        selected: Tensor,
        block_rows: Tensor,
        block_lengths: Tensor,
        segments: QuerySegments,
        select_block: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(q)
        num_queries, num_heads, key_width = q.shape
        num_groups = k_own.shape[1]
        group = num_heads // num_groups
        most = selected.shape[-1] * select_block
        widest = max(key_width, v_own.shape[-1], group)
        size = max(1, 2 * TILE_ELEMENTS // (most * widest))
        ctx.pool_arguments = (block_lengths, segments, select_block, dtype)
        o = q.new_zeros(num_queries, num_heads, v_own.shape[-1])
        top = q.new_zeros(num_queries, num_heads, dtype=dtype)
        share = torch.ones_like(top)
        for g in range(num_groups):
            pool = _Pool(
                (k_own[:, g], v_own[:, g]),
                (k_fetched[:, g], v_fetched[:, g]),
                selected[:, g],
                block_rows[g],
                *ctx.pool_arguments,
            )
            heads = slice(g * group, (g + 1) * group)
            for segment in segments.rows:
                for part in segment.split(size):
                    rows = slice(part.start, part.start + part.length)
                    eligible = (part.position + part.length - 1) // select_block + 1
                    n = min(selected.shape[-1], eligible)  # behind them stand -1
                    slots, seen = pool.slots[rows, :n], pool.seen[rows, :n]
                    query = q[rows, heads].to(dtype)  # [m, R, Dk]
                    keys = pool.keys.index_select(0, slots.flatten())
                    keys = keys.view(part.length, n * select_block, -1)
                    logits = scaled_product(query, keys.mT, scale)
                    del keys
                    hidden = torch.arange(select_block, device=q.device) >= seen.unsqueeze(-1)
                    logits.masked_fill_(hidden.flatten(1).unsqueeze(1), -math.inf)
                    probs = logits.softmax(dim=-1)
                    values = pool.values.index_select(0, slots.flatten())
                    out = torch.bmm(probs, values.view(part.length, n * select_block, -1))
                    del values
                    o[rows, heads] = out.to(q.dtype)
                    top[rows, heads] = logits.amax(dim=-1)
                    share[rows, heads] = probs.amax(dim=-1)
            blind = (pool.seen == 0).all(dim=-1).view(-1, 1)
            o[:, heads].masked_fill_(blind.unsqueeze(-1), 0.0)
            top[:, heads].masked_fill_(blind, -math.inf)
            share[:, heads].masked_fill_(blind, 1.0)
        ctx.save_for_backward(
            q, k_own, v_own, k_fetched, v_fetched, selected, block_rows, o, top, share
        )
        ctx.scale = scale
        lse = top - share.log()
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @exact
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k_own, v_own, k_fetched, v_fetched, selected, block_rows, o, top, share = (
            ctx.saved_tensors
        )
        dtype = accumulation_dtype(q)
        num_own, num_groups, _ = k_own.shape
        group = q.shape[1] // num_groups
        grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
        grads = [
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (k_own, v_own, k_fetched, v_fetched)
        ]
        for g in range(num_groups):
            heads = slice(g * group, (g + 1) * group)
            pool = _Pool(
                (k_own[:, g], v_own[:, g]),
                (k_fetched[:, g], v_fetched[:, g]),
                selected[:, g],
                block_rows[g],
                *ctx.pool_arguments,
            )
            grad_out = grad_o[:, heads].to(dtype) * share[:, heads].unsqueeze(-1)
            delta = (grad_out * o[:, heads].to(dtype)).sum(dim=-1)
            grad_query, grad_keys, grad_values = _backward_of_head(
                q[:, heads].to(dtype).contiguous(),
                grad_out,
                delta,
                top[:, heads],
                pool,
                ctx.scale,
            )
            grad_q[:, heads] = grad_query.to(q.dtype)
            for x, pool_grads in enumerate((grad_keys, grad_values)):
                rows = pool.scatter(pool_grads)
                grads[x][:, g] = rows[:num_own].to(grads[x].dtype)
                grads[x + 2][:, g] = rows[num_own:].to(grads[x + 2].dtype)
        return grad_q, *grads, None, None, None, None, None, None


def _backward_of_head(
    q: Tensor, grad_out: Tensor, delta: Tensor, top: Tensor, pool: _Pool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [N, R, Dk] and of the pool's keys and values [blocks, l', D].

    grad_out [N, R, Dv] and delta [N, R] carry the largest probability as a factor already.
    """
    _, group, width = q.shape
    select_block = pool.keys.shape[1]
    clean_keys = finite(pool.keys)
    grad_q = torch.zeros_like(q)
    grad_keys, grad_values = torch.zeros_like(pool.keys[:-1]), torch.zeros_like(pool.values[:-1])
    order = pool.slots.flatten().argsort(stable=True)
    queries = order // pool.slots.shape[1]
    seen = pool.seen.flatten()[order]
    # The softmax over a single key is constant, and its gradient 0 to the bit.
    several = pool.seen.where(pool.seen.sum(dim=-1, keepdim=True) > 1, 0).flatten()[order]
    counts = pool.slots.flatten().bincount(minlength=pool.size + 1).tolist()
    offset = torch.arange(select_block, device=q.device)
    size = max(1, TILE_ELEMENTS // (group * select_block))
    end = 0
    for slot, count in enumerate(counts[: pool.size]):
        start, end = end, end + count
        pieces: list[tuple[Tensor, Tensor]] = []
        for first in range(start, end, size):
            chosen = slice(first, min(first + size, end))
            rows = queries[chosen]
            hidden = (offset >= seen[chosen].unsqueeze(1)).unsqueeze(1)  # [m, 1, l']
            constant = (offset >= several[chosen].unsqueeze(1)).unsqueeze(1)
            query = q.index_select(0, rows).flatten(0, 1)  # [m*R, Dk]
            out = grad_out.index_select(0, rows).flatten(0, 1)
            weights = (query @ pool.keys[slot].mT).mul_(scale).view(-1, group, select_block)
            weights.sub_(top.index_select(0, rows).unsqueeze(-1))
            weights.masked_fill_(hidden, -math.inf).exp_()
            grad_logits = (out @ pool.values[slot].mT).view(-1, group, select_block)
            grad_logits.sub_(delta.index_select(0, rows).unsqueeze(-1))
            grad_logits.masked_fill_(constant, 0.0).mul_(weights)
            weights, grad_logits = weights.flatten(0, 1), grad_logits.flatten(0, 1)
            pieces.append((grad_logits.mT @ query, weights.mT @ out))
            grad_rows = grad_logits @ clean_keys[slot]
            add_rows_(grad_q.flatten(1), rows, grad_rows.view(-1, group * width))
        if pieces:
            grad_keys[slot] = _tree_sum([piece[0] for piece in pieces])
            grad_values[slot] = _tree_sum([piece[1] for piece in pieces])
    return grad_q.mul_(scale), grad_keys.mul_(scale), grad_values


def _tree_sum(pieces: list[Tensor]) -> Tensor:
    while len(pieces) > 1:
        pieces = [
            torch.stack(pieces[i : i + SUMMANDS_IN_A_ROW]).sum(dim=0)
            for i in range(0, len(pieces), SUMMANDS_IN_A_ROW)
        ]
    return pieces[0]


def selected_attention(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: QuerySegments,
    *,
    select_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `Backend.selected_attention`."""
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    return _SelectedAttention.apply(
        q,
        k_own,
        v_own,
        k_fetched,
        v_fetched,
        selected,
        block_rows,
        block_lengths,
        segments,
        select_block,
        scale,
    )

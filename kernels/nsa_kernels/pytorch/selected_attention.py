"""The selected branch: attention to the tokens of the chosen blocks (Eq. 12, arXiv 2502.11089).

For one KV head at a time, the blocks that are here become a pool [blocks, l', D]. A tile of
queries gathers the n blocks of each, so that a query's sums have one order, whatever its neighbours
chose. Backward, which must only be the same in every run, sorts many queries' choices by block, so
that each product is one of a block with the queries that chose it, and no key is copied for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.autograd import first_order
from nsa_kernels.pytorch._common import (
    FiniteRows,
    Rows,
    TreeSum,
    accumulation_dtype,
    exact,
    product_over_rows,
    scaled_product,
    tile_rows,
)
from nsa_kernels.segments import QuerySegments, Segment


class _Pool:
    """The blocks of one KV head that are here, and one more of zeros for the -1 of a choice.

    context: keys [blocks + 1, l', Dk] and values [blocks + 1, l', Dv], 0 behind a block's end;
    slots int64 [N, n]: which of them the queries chose; seen int64 [N, n]: how many of their tokens
    are causal.
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
        self.select_block = select_block
        self.offset = torch.arange(select_block, device=device)
        inside = self.offset < block_lengths[here].unsqueeze(1)
        rows = (block_rows[here].unsqueeze(1) + self.offset).where(inside, num_rows)
        self.num_rows = num_rows
        self.rows = F.pad(rows, (0, 0, 0, 1), value=num_rows)  # [blocks + 1, l']; a row of zeros
        pairs = zip(own, fetched, strict=True)
        sources = [torch.cat([a, b, a.new_zeros(1, a.shape[-1])]) for a, b in pairs]
        self.context = FiniteRows.of(*(source[self.rows].to(dtype) for source in sources))

        is_here = F.pad(block_rows >= 0, (0, 1))
        slot_of = (is_here.cumsum(dim=0) - 1).where(is_here, self.size)
        chosen = selected >= 0
        ids = selected.long() + segments.selected_bases.unsqueeze(1)
        self.slots = slot_of[ids.where(chosen, block_rows.shape[0])]
        missing = chosen & (self.slots == self.size)
        assert not missing.any(), f"block {int(ids[missing][0])} was chosen and is not here"
        ends = segments.positions.unsqueeze(1) + 1 - selected.long() * select_block
        self.seen = ends.clamp(0, select_block).where(chosen, 0)

    def num_chosen(self, segment: Segment) -> int:
        """How many places of `slots` its queries can have filled; behind them stand -1."""
        eligible = (segment.position + segment.length - 1) // self.select_block + 1
        return min(self.slots.shape[1], eligible)

    def gather(self, x: Tensor, slots: Tensor) -> Tensor:
        """x [blocks + 1, l', D], slots [m, n] -> [m, n*l', D]."""
        return x.index_select(0, slots.flatten()).view(slots.shape[0], -1, x.shape[-1])

    def attend(self, query: Tensor, part: Segment, scale: float) -> tuple[Tensor, Tensor]:
        """o [m, R, Dv] and lse [m, R] of query [m, R, Dk], the rows of `part`."""
        rows, n = slice(part.start, part.start + part.length), self.num_chosen(part)
        slots = self.slots[rows, :n]
        keys, values, bad = self.context
        logits = scaled_product(query, self.gather(keys, slots).mT, scale)
        if bad is not None:
            logits = logits.masked_fill(bad[slots].flatten(1).unsqueeze(1), math.nan)
        seen = self.seen[rows, :n]
        hidden = (self.offset >= seen.unsqueeze(-1)).flatten(1).unsqueeze(1)
        logits = logits.masked_fill(hidden, -math.inf)
        probs = logits.softmax(dim=-1)
        # NaN where a query sees nothing, and only there and where it sees NaN.
        blind = (seen == 0).all(dim=-1)[:, None]
        out = torch.bmm(probs, self.gather(values, slots)).masked_fill(blind.unsqueeze(-1), 0.0)
        # The largest probability is exp(max - lse).
        lse = logits.amax(dim=-1) - probs.amax(dim=-1).log()
        return out, lse.masked_fill(blind, -math.inf)

    def scatter(self, grads: Tensor) -> Tensor:
        """Gradients of the pool [blocks, l', D] -> of the rows [E + F, D]."""
        out = grads.new_zeros(self.num_rows + 1, grads.shape[-1])
        out[self.rows[:-1]] = grads  # blocks share no row but the last
        return out[:-1]


class _SelectedAttention(torch.autograd.Function):
    """o = softmax(scale q k^T) v over the tokens <= t of the chosen blocks, and its log-sum-exp."""

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
        tensors = (q, k_own, v_own, k_fetched, v_fetched, selected, block_rows)
        ctx.save_for_backward(*tensors)
        ctx.pool_arguments = (block_lengths, segments, select_block, dtype)
        ctx.scale = scale
        group = q.shape[1] // k_own.shape[1]
        of_heads = []
        for g in range(k_own.shape[1]):
            heads = slice(g * group, (g + 1) * group)
            pool = _pool_of_head(ctx, tensors, g)
            o = Rows(q.new_zeros(0, group, v_own.shape[-1]), 0.0)
            lse = Rows(q.new_zeros(0, group, dtype=dtype), -math.inf)
            for segment in segments.rows:
                for part in segment.split(_tile_size(pool, group)):
                    rows = slice(part.start, part.start + part.length)
                    query = q[rows, heads].to(dtype).contiguous()
                    out, part_lse = pool.attend(query, part, scale)
                    o.add(part.start, out)
                    lse.add(part.start, part_lse)
            of_heads.append((o.joined(q.shape[0]), lse.joined(q.shape[0])))
        outputs = [torch.cat(parts, dim=1) for parts in zip(*of_heads, strict=True)]
        ctx.mark_non_differentiable(outputs[1])
        return outputs[0], outputs[1]

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # Once: recomputation refuses a second read.
        q, *sources = saved[:5]
        dtype = accumulation_dtype(q)
        num_own, num_groups, _ = sources[0].shape
        group = q.shape[1] // num_groups
        grad_q, *grads = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, *sources)
        )
        for g in range(num_groups):
            heads = slice(g * group, (g + 1) * group)
            pool = _pool_of_head(ctx, saved, g)
            grad_query, *pool_grads = _backward_of_head(
                q[:, heads].to(dtype),
                grad_o[:, heads].to(dtype),
                pool,
                ctx.pool_arguments[1],
                ctx.scale,
            )
            grad_q[:, heads] = grad_query.to(q.dtype)
            for x, pool_grad in enumerate(pool_grads):
                rows = pool.scatter(pool_grad)
                grads[x][:, g] = rows[:num_own].to(grads[x].dtype)
                grads[x + 2][:, g] = rows[num_own:].to(grads[x + 2].dtype)
        return grad_q, *grads, None, None, None, None, None, None


def _pool_of_head(ctx: Any, tensors: tuple[Tensor, ...], g: int) -> _Pool:
    _, k_own, v_own, k_fetched, v_fetched, selected, block_rows = tensors
    return _Pool(
        (k_own[:, g], v_own[:, g]),
        (k_fetched[:, g], v_fetched[:, g]),
        selected[:, g],
        block_rows[g],
        *ctx.pool_arguments,
    )


def _tile_size(pool: _Pool, group: int) -> int:
    """Queries whose gathered keys make a tile."""
    keys, values = pool.context.keys, pool.context.values
    width = max(keys.shape[-1], values.shape[-1], group)
    return tile_rows(pool.slots.shape[1] * pool.select_block * width)


class _Pairs:
    """The (query, chosen block) pairs of a run of m queries, in the order of blocks.

    query int64 [m*n]: which of the m; slot int64 [m*n]; blocks: a block's slot and its pairs, for
    each block that was chosen.
    """

    def __init__(self, pool: _Pool, segment: Segment) -> None:
        rows = slice(segment.start, segment.start + segment.length)
        self.places = pool.num_chosen(segment)
        self.slot, order = pool.slots[rows, : self.places].flatten().sort(stable=True)
        self.query = order // self.places
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(order.shape[0], device=order.device)
        seen = pool.seen[rows, : self.places].flatten()[order]
        self._partly = (seen < pool.select_block).nonzero()[:, 0]
        self._hidden = (pool.offset >= seen[self._partly].unsqueeze(1)).unsqueeze(1)
        self.blocks: list[tuple[int, slice]] = []
        end = 0
        for slot, count in enumerate(self.slot.bincount().tolist()):
            start, end = end, end + count
            if count:
                self.blocks.append((slot, slice(start, end)))

    def mask_(self, x: Tensor, value: float) -> Tensor:
        """Fills x [m*n, R, l'] where a token is not causal, in place."""
        partly = x.index_select(0, self._partly).masked_fill_(self._hidden, value)
        return x.index_copy_(0, self._partly, partly)

    def by_query(self, x: Tensor) -> Tensor:
        """x [m*n, ...] of pairs -> [m, n, ...]."""
        return x.index_select(0, self._place).unflatten(0, (-1, self.places))

    def of_query(self, x: Tensor) -> Tensor:
        """x [m, ...] of queries -> [m*n, ...] of pairs."""
        return x.index_select(0, self.query)


def _backward_of_head(
    q: Tensor, grad_out: Tensor, pool: _Pool, segments: QuerySegments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [N, R, Dk] and of the pool's keys and values [blocks, l', D].

    For a run of queries P is computed again, dP = do v^T, dS = P (dP - sum_k P dP), dq = scale
    dS k, dk = scale dS^T q, dv = P^T do: products over the pairs of one block, sums over the pairs
    of one query.
    """
    group, block = q.shape[1], pool.select_block
    keys, values, bad = pool.context
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    key_sum, value_sum = TreeSum(keys), TreeSum(values)
    size = tile_rows(pool.slots.shape[1] * block * group, 2)
    for run in (part for segment in segments.rows for part in segment.split(size)):
        rows = slice(run.start, run.start + run.length)
        pairs = _Pairs(pool, run)
        query = pairs.of_query(q[rows])  # [m*n, R, Dk]
        out = pairs.of_query(grad_out[rows])
        probs = q.new_empty(*query.shape[:2], block)
        grad_logits = torch.empty_like(probs)
        for slot, of in pairs.blocks:
            torch.mm(query[of].flatten(0, 1), keys[slot].mT, out=probs[of].flatten(0, 1))
            torch.mm(out[of].flatten(0, 1), values[slot].mT, out=grad_logits[of].flatten(0, 1))
        probs.mul_(scale)
        if bad is not None:
            probs.masked_fill_(bad[pairs.slot].unsqueeze(1), math.nan)
        top = pairs.by_query(pairs.mask_(probs, -math.inf).amax(dim=-1)).amax(dim=1)  # [m, R]
        probs.sub_(pairs.of_query(top).unsqueeze(-1)).exp_()
        total = pairs.by_query(probs.sum(dim=-1)).sum(dim=1)
        # Also where a query sees nothing, or NaN, and with it all its pairs are NaN.
        pairs.mask_(probs.div_(pairs.of_query(total).unsqueeze(-1)), 0.0)
        pairs.mask_(grad_logits, 0.0)
        delta = pairs.by_query((probs * grad_logits).sum(dim=-1)).sum(dim=1)
        grad_logits.sub_(pairs.of_query(delta).unsqueeze(-1)).mul_(probs)
        pairs.mask_(grad_logits, 0.0)
        grad_query = torch.empty_like(query)
        grad_keys, grad_values = key_sum.next(), value_sum.next()
        for slot, of in pairs.blocks:
            block_grad, block_probs, block_query, block_out = (
                x[of].flatten(0, 1) for x in (grad_logits, probs, query, out)
            )
            torch.mm(block_grad, keys[slot], out=grad_query[of].flatten(0, 1))
            grad_keys[slot].add_(product_over_rows(block_grad[None], block_query[None])[0])
            grad_values[slot].add_(product_over_rows(block_probs[None], block_out[None])[0])
        grad_q[rows] = pairs.by_query(grad_query).sum(dim=1).mul_(scale)
    return grad_q, key_sum.result()[:-1].mul_(scale), value_sum.result()[:-1]


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

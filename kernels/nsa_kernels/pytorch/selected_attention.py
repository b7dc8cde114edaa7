"""The selected branch: attention to the tokens of the chosen blocks (Eq. 12, arXiv 2502.11089).

For one KV head at a time, the blocks that some query chose become a pool [A, s, D]. A tile of
queries gathers the n blocks of each, so that a query's sums have one order, whatever its neighbours
chose. Backward, which must only be the same in every run,
sorts many queries' choices by block, so that each product is one of a block with the queries that
chose it, and no key is copied for them.

Letters: N local rows, H query heads, G KV heads, R = H/G, D widths, E and F own and fetched rows, B
selection blocks, A blocks of a pool, s their tokens (l'), n chosen blocks, m queries of a tile, K
its keys (n*s for each query), p = m*n pairs of a query and a block that it chose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.autograd import first_order, with_summand
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
    """The blocks of one KV head that were chosen, and one more of zeros for the -1 of a choice.

    context: keys [A, s, Dk] and values [A, s, Dv], 0 behind a block's end; slots_Nn int64: which of
    them the queries chose; seen_Nn int64: how many of their tokens are causal; rows_As int64: where
    they stand in the own rows and then the fetched ones.
    """

    def __init__(
        self,
        own: tuple[Tensor, Tensor],
        fetched: tuple[Tensor, Tensor],
        selected_Nn: Tensor,
        block_rows_B: Tensor,
        block_lengths_B: Tensor,
        segments: QuerySegments,
        select_block: int,
        dtype: torch.dtype,
    ) -> None:
        device = block_rows_B.device
        num_rows = own[0].shape[0] + fetched[0].shape[0]
        nowhere = block_rows_B.shape[0]
        chosen_Nn = selected_Nn >= 0
        ids_Nn = (selected_Nn.long() + segments.selected_bases.unsqueeze(1)).where(
            chosen_Nn, nowhere
        )
        # Nothing is changed in place: what selective checkpointing keeps must not be.
        is_used = torch.zeros(nowhere + 1, dtype=torch.bool, device=device)
        is_used = F.pad(is_used.index_fill(0, ids_Nn.flatten(), True)[:-1], (0, 1))
        used = is_used.nonzero()[:, 0]
        starts = block_rows_B[used]
        assert not (starts < 0).any(), (
            f"block {int(used[starts < 0][0])} was chosen and is not here"
        )
        self.size = used.shape[0]
        self.select_block = select_block
        self.offset_s = torch.arange(select_block, device=device)
        inside = self.offset_s < block_lengths_B[used].unsqueeze(1)
        rows = (starts.unsqueeze(1) + self.offset_s).where(inside, num_rows)
        self.num_rows = num_rows
        self.rows_As = F.pad(rows, (0, 0, 0, 1), value=num_rows)  # the last: zeros
        self._no_rows = (self.rows_As == num_rows).flatten().nonzero()[:, 0]
        pairs = zip(own, fetched, strict=True)
        self.context = FiniteRows.of(*(self._rows_of(*pair).to(dtype) for pair in pairs))
        slot_of = (is_used.cumsum(dim=0) - 1).where(is_used, self.size)
        self.slots_Nn = slot_of[ids_Nn]
        ends_Nn = segments.positions.unsqueeze(1) + 1 - selected_Nn.long() * select_block
        self.seen_Nn = ends_Nn.clamp(0, select_block).where(chosen_Nn, 0)

    def _rows_of(self, own: Tensor, fetched: Tensor) -> Tensor:
        """[A, s, D] of rows [E, D] and [F, D]; zeros behind a block's end."""
        source = torch.cat([own, fetched]) if len(fetched) else own
        if not len(source):
            return source.new_zeros(*self.rows_As.shape, source.shape[-1])
        rows = self.rows_As.clamp(max=len(source) - 1).flatten()
        blocks = source.index_select(0, rows).index_fill(0, self._no_rows, 0.0)
        return blocks.view(*self.rows_As.shape, -1)

    def num_chosen(self, segment: Segment) -> int:
        """How many places of `slots_Nn` its queries can have filled; behind them stand -1."""
        eligible = (segment.position + segment.length - 1) // self.select_block + 1
        return min(self.slots_Nn.shape[1], eligible)

    def gather(self, x_AsD: Tensor, slots_mn: Tensor) -> Tensor:
        """-> [m, n*s, D]."""
        return x_AsD.index_select(0, slots_mn.flatten()).view(
            slots_mn.shape[0], -1, x_AsD.shape[-1]
        )

    def attend(self, query_mRD: Tensor, part: Segment, scale: float) -> tuple[Tensor, Tensor]:
        """o [m, R, Dv] and lse [m, R] of query [m, R, Dk], the rows of `part`."""
        rows, n = slice(part.start, part.start + part.length), self.num_chosen(part)
        slots_mn = self.slots_Nn[rows, :n]
        keys_AsD, values_AsD, bad_As = self.context
        logits_mRK = scaled_product(query_mRD, self.gather(keys_AsD, slots_mn).mT, scale)
        if bad_As is not None:
            logits_mRK = logits_mRK.masked_fill(bad_As[slots_mn].flatten(1).unsqueeze(1), math.nan)
        seen_mn = self.seen_Nn[rows, :n]
        hidden_m1K = (self.offset_s >= seen_mn.unsqueeze(-1)).flatten(1).unsqueeze(1)
        logits_mRK = logits_mRK.masked_fill(hidden_m1K, -math.inf)
        probs_mRK = logits_mRK.softmax(dim=-1)
        # NaN where a query sees nothing, and only there and where it sees NaN.
        blind_m1 = (seen_mn == 0).all(dim=-1)[:, None]
        out_mRD = torch.bmm(probs_mRK, self.gather(values_AsD, slots_mn)).masked_fill(
            blind_m1.unsqueeze(-1), 0.0
        )
        # The largest probability is exp(max - lse).
        lse_mR = logits_mRK.amax(dim=-1) - probs_mRK.amax(dim=-1).log()
        return out_mRD, lse_mR.masked_fill(blind_m1, -math.inf)

    def scatter(self, grads: Tensor) -> Tensor:
        """Gradients of the pool [A - 1, s, D], without its zeros -> of the rows [E + F, D]."""
        out = grads.new_zeros(self.num_rows + 1, grads.shape[-1])
        out[self.rows_As[:-1]] = grads  # blocks share no row but the last
        return out[:-1]


class _SelectedAttention(torch.autograd.Function):
    """o = softmax(scale q k^T) v over the tokens <= t of the chosen blocks, and its log-sum-exp.

    With a gate g the gradient that comes in is that of the gated sum, see `_backward_of_head`.
    """

    @staticmethod
    @exact
    def forward(
        ctx: Any,
        q_NHD: Tensor,
        k_own_EGD: Tensor,
        v_own_EGD: Tensor,
        k_fetched_FGD: Tensor,
        v_fetched_FGD: Tensor,
        selected_NGn: Tensor,
        block_rows_GB: Tensor,
        block_lengths_B: Tensor,
        segments: QuerySegments,
        select_block: int,
        scale: float,
        gate_NH: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(q_NHD)
        tensors = (
            q_NHD,
            k_own_EGD,
            v_own_EGD,
            k_fetched_FGD,
            v_fetched_FGD,
            selected_NGn,
            block_rows_GB,
        )
        ctx.save_for_backward(*tensors, gate_NH)
        ctx.pool_arguments = (block_lengths_B, segments, select_block, dtype)
        ctx.scale = scale
        group = q_NHD.shape[1] // k_own_EGD.shape[1]
        of_heads = []
        for g in range(k_own_EGD.shape[1]):
            heads = slice(g * group, (g + 1) * group)
            pool = _pool_of_head(ctx, tensors, g)
            o = Rows(q_NHD.new_zeros(0, group, v_own_EGD.shape[-1]), 0.0)
            lse = Rows(q_NHD.new_zeros(0, group, dtype=dtype), -math.inf)
            for segment in segments.rows:
                for part in segment.split(_tile_size(pool, group)):
                    rows = slice(part.start, part.start + part.length)
                    query_mRD = q_NHD[rows, heads].to(dtype).contiguous()
                    out_mRD, lse_mR = pool.attend(query_mRD, part, scale)
                    o.add(part.start, out_mRD)
                    lse.add(part.start, lse_mR)
            of_heads.append((o.joined(q_NHD.shape[0]), lse.joined(q_NHD.shape[0])))
        o_NHD, lse_NH = (torch.cat(parts, dim=1) for parts in zip(*of_heads, strict=True))
        return with_summand(ctx, o_NHD, lse_NH, gate_NH)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, gate_NH = ctx.saved_tensors  # Once: recomputation refuses a second read.
        grad_o_NHD = grads_out[0 if gate_NH is None else -1]
        grad_gate_NH = None if gate_NH is None else torch.zeros_like(gate_NH)
        q_NHD, *sources = saved[:5]
        dtype = accumulation_dtype(q_NHD)
        num_own, num_groups, _ = sources[0].shape
        group = q_NHD.shape[1] // num_groups
        grad_q_NHD, *grads = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_NHD, *sources)
        )
        for g in range(num_groups):
            heads = slice(g * group, (g + 1) * group)
            pool = _pool_of_head(ctx, tuple(saved), g)
            gate_NR = None if gate_NH is None else gate_NH[:, heads].to(dtype)
            grad_q_NRD, delta_NR, *pool_grads = _backward_of_head(
                q_NHD[:, heads].to(dtype),
                grad_o_NHD[:, heads].to(dtype),
                gate_NR,
                pool,
                ctx.pool_arguments[1],
                ctx.scale,
            )
            grad_q_NHD[:, heads] = grad_q_NRD.to(q_NHD.dtype)
            if grad_gate_NH is not None:
                grad_gate_NH[:, heads] = delta_NR.to(grad_gate_NH.dtype)
            for x, pool_grad in enumerate(pool_grads):
                rows = pool.scatter(pool_grad)
                grads[x][:, g] = rows[:num_own].to(grads[x].dtype)
                grads[x + 2][:, g] = rows[num_own:].to(grads[x + 2].dtype)
        return grad_q_NHD, *grads, *[None] * 6, grad_gate_NH


def _pool_of_head(ctx: Any, tensors: tuple[Tensor, ...], g: int) -> _Pool:
    _, k_own_EGD, v_own_EGD, k_fetched_FGD, v_fetched_FGD, selected_NGn, block_rows_GB = tensors
    return _Pool(
        (k_own_EGD[:, g], v_own_EGD[:, g]),
        (k_fetched_FGD[:, g], v_fetched_FGD[:, g]),
        selected_NGn[:, g],
        block_rows_GB[g],
        *ctx.pool_arguments,
    )


def _tile_size(pool: _Pool, group: int) -> int:
    """Queries whose gathered keys make a tile."""
    keys, values = pool.context.keys, pool.context.values
    width = max(keys.shape[-1], values.shape[-1], group)
    return tile_rows(pool.slots_Nn.shape[1] * pool.select_block * width)


class _Pairs:
    """The (query, chosen block) pairs of a run of m queries, in the order of blocks.

    query_p int64: which of the m; slot_p int64: its block in the pool; blocks: a block's slot and
    its pairs, for each block that was chosen.
    """

    def __init__(self, pool: _Pool, segment: Segment) -> None:
        rows = slice(segment.start, segment.start + segment.length)
        self.places = pool.num_chosen(segment)
        self.slot_p, order_p = pool.slots_Nn[rows, : self.places].flatten().sort(stable=True)
        self.query_p = order_p // self.places
        self._place_p = torch.empty_like(order_p)
        self._place_p[order_p] = torch.arange(order_p.shape[0], device=order_p.device)
        seen_p = pool.seen_Nn[rows, : self.places].flatten()[order_p]
        self._partly = (seen_p < pool.select_block).nonzero()[:, 0]
        self._hidden = (pool.offset_s >= seen_p[self._partly].unsqueeze(1)).unsqueeze(1)
        self.blocks: list[tuple[int, slice]] = []
        end = 0
        for slot, count in enumerate(self.slot_p.bincount().tolist()):
            start, end = end, end + count
            if count:
                self.blocks.append((slot, slice(start, end)))

    def mask_(self, x_pRs: Tensor, value: float) -> Tensor:
        """Fills x where a token is not causal, in place."""
        partly = x_pRs.index_select(0, self._partly).masked_fill_(self._hidden, value)
        return x_pRs.index_copy_(0, self._partly, partly)

    def by_query(self, x: Tensor) -> Tensor:
        """x [p, ...] of pairs -> [m, n, ...]."""
        return x.index_select(0, self._place_p).unflatten(0, (-1, self.places))

    def of_query(self, x: Tensor) -> Tensor:
        """x [m, ...] of queries -> [p, ...] of pairs."""
        return x.index_select(0, self.query_p)


def _backward_of_head(
    q_NRD: Tensor,
    grad_out_NRD: Tensor,
    gate_NR: Tensor | None,
    pool: _Pool,
    segments: QuerySegments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q [N, R, Dk], delta [N, R], gradients of the pool's keys, values [A - 1, s, D].

    For a run of queries P is computed again, dP = do v^T, delta = sum_k P dP, dS = P (dP - delta),
    dq = scale dS k, dk = scale dS^T q, dv = P^T do: products over the pairs of one block, sums over
    the pairs of one query. A gate multiplies P and dS, and delta is its gradient.
    """
    group, block = q_NRD.shape[1], pool.select_block
    keys_AsD, values_AsD, bad_As = pool.context
    grad_q_NRD = torch.zeros_like(q_NRD, memory_format=torch.contiguous_format)
    delta_NR = q_NRD.new_zeros(q_NRD.shape[:2])
    key_sum, value_sum = TreeSum(keys_AsD), TreeSum(values_AsD)
    size = tile_rows(pool.slots_Nn.shape[1] * block * group, 2)
    for run in (part for segment in segments.rows for part in segment.split(size)):
        rows = slice(run.start, run.start + run.length)
        pairs = _Pairs(pool, run)
        query_pRD = pairs.of_query(q_NRD[rows])
        out_pRD = pairs.of_query(grad_out_NRD[rows])
        probs_pRs = q_NRD.new_empty(*query_pRD.shape[:2], block)
        grad_logits_pRs = torch.empty_like(probs_pRs)
        for slot, of in pairs.blocks:
            torch.mm(
                query_pRD[of].flatten(0, 1), keys_AsD[slot].mT, out=probs_pRs[of].flatten(0, 1)
            )
            torch.mm(
                out_pRD[of].flatten(0, 1),
                values_AsD[slot].mT,
                out=grad_logits_pRs[of].flatten(0, 1),
            )
        probs_pRs.mul_(scale)
        if bad_As is not None:
            probs_pRs.masked_fill_(bad_As[pairs.slot_p].unsqueeze(1), math.nan)
        top_mR = pairs.by_query(pairs.mask_(probs_pRs, -math.inf).amax(dim=-1)).amax(dim=1)
        probs_pRs.sub_(pairs.of_query(top_mR).unsqueeze(-1)).exp_()
        total_mR = pairs.by_query(probs_pRs.sum(dim=-1)).sum(dim=1)
        # Also where a query sees nothing, or NaN, and with it all its pairs are NaN.
        pairs.mask_(probs_pRs.div_(pairs.of_query(total_mR).unsqueeze(-1)), 0.0)
        pairs.mask_(grad_logits_pRs, 0.0)
        delta_mR = pairs.by_query((probs_pRs * grad_logits_pRs).sum(dim=-1)).sum(dim=1)
        grad_logits_pRs.sub_(pairs.of_query(delta_mR).unsqueeze(-1)).mul_(probs_pRs)
        pairs.mask_(grad_logits_pRs, 0.0)
        delta_NR[rows] = delta_mR
        if gate_NR is not None:
            gate_pR1 = pairs.of_query(gate_NR[rows]).unsqueeze(-1)
            probs_pRs.mul_(gate_pR1)
            grad_logits_pRs.mul_(gate_pR1)
        grad_query_pRD = torch.empty_like(query_pRD)
        grad_keys_AsD, grad_values_AsD = key_sum.next(), value_sum.next()
        for slot, of in pairs.blocks:
            # [pairs of the block * R, s] twice, [.., Dk], [.., Dv]
            block_grad, block_probs, block_query, block_out = (
                x[of].flatten(0, 1) for x in (grad_logits_pRs, probs_pRs, query_pRD, out_pRD)
            )
            torch.mm(block_grad, keys_AsD[slot], out=grad_query_pRD[of].flatten(0, 1))
            grad_keys_AsD[slot].add_(product_over_rows(block_grad[None], block_query[None])[0])
            grad_values_AsD[slot].add_(product_over_rows(block_probs[None], block_out[None])[0])
        grad_q_NRD[rows] = pairs.by_query(grad_query_pRD).sum(dim=1).mul_(scale)
    return grad_q_NRD, delta_NR, key_sum.result()[:-1].mul_(scale), value_sum.result()[:-1]


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
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
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
        gate,
    )

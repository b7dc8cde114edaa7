"""Fetch of the remote selection blocks that local queries chose, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.collectives import add_returned_rows, all_to_all_rows
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan import BlockOwnership, Plan
from nsa_kernels.autograd import first_order


@dataclass(frozen=True, eq=False)
class Transfer:
    """What one all-to-all of blocks moves: those of one KV head (of all heads, with one rank).

    Attributes:
        first_head: the (first) KV head.
        send_rows: int64 [sum(send_counts)], rows of the extended K, V buffer, by receiving rank.
        send_counts, recv_counts: tokens for and from each rank.
    """

    first_head: int
    send_rows: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FetchPlan:
    """The fetch of all KV heads.

    Heads want different blocks, so each has a transfer of its own, and only one head's blocks need
    to be in memory at a time. One rank has nothing to fetch and takes all heads at once.

    Attributes:
        transfers: in the order of heads.
        heads_per_transfer: KV heads of each.
        block_rows: int64 [G, B], row at which each block starts, counted through the extended
            buffer's rows and on through the fetched ones; -1 for blocks that are not here.
    """

    transfers: tuple[Transfer, ...]
    heads_per_transfer: int
    block_rows: Tensor


def request_blocks(
    selected: Tensor, plan: Plan, group: ContextGroup, counter: CommunicationCounter
) -> FetchPlan:
    """Tell each rank which of its blocks this rank's queries chose, and learn the others' wishes.

    The message is one byte a block and KV head, so its size is known without asking.

    Args:
        selected: int32 [N, G, n], -1 padded.
    """
    blocks = plan.selected
    assert blocks is not None
    num_heads = selected.shape[1]
    halo_rows = plan.halos["selected"].num_rows
    block_rows = selected.new_full((num_heads, blocks.total), -1, dtype=torch.int64)
    block_rows = block_rows.index_copy(1, blocks.own_ids, blocks.own_rows.expand(num_heads, -1))
    if group.size == 1:
        nothing = blocks.own_rows.new_zeros(0)
        return FetchPlan((Transfer(0, nothing, (0,), (0,)),), num_heads, block_rows)

    wanted = _wanted_blocks(selected, plan, blocks, group.rank)
    asked = _exchange_wishes(wanted, plan, blocks, group, counter)

    own_lengths = blocks.lengths[blocks.own_ids]
    lengths_by_rank = blocks.lengths[blocks.by_rank]
    wanted_tokens = wanted * lengths_by_rank
    recv = wanted_tokens.new_zeros(num_heads, group.size)
    recv = recv.index_add(1, blocks.owner[blocks.by_rank], wanted_tokens)
    send = (asked * own_lengths).sum(-1)
    # The only point at which the host waits for what was computed.
    sizes = torch.stack((send, recv)).cpu()
    send_counts, recv_counts = sizes.tolist()

    start = wanted_tokens.cumsum(-1) - wanted_tokens + halo_rows
    start = torch.where(wanted, start, block_rows[:, blocks.by_rank])
    block_rows = block_rows.index_copy(1, blocks.by_rank, start)

    _, _, block = asked.nonzero(as_tuple=True)
    tokens = own_lengths[block]
    total = int(sizes[0].sum())
    first = blocks.own_rows[block] - (tokens.cumsum(0) - tokens)
    rows = torch.repeat_interleave(first, tokens, output_size=total)
    rows = rows + torch.arange(total, device=rows.device)
    per_head = rows.split([sum(counts) for counts in send_counts])
    transfers = tuple(
        Transfer(g, per_head[g], tuple(send_counts[g]), tuple(recv_counts[g]))
        for g in range(num_heads)
    )
    return FetchPlan(transfers, 1, block_rows)


def _wanted_blocks(selected: Tensor, plan: Plan, blocks: BlockOwnership, rank: int) -> Tensor:
    """Remote blocks that some local query chose: bool [G, B], columns ordered by owner."""
    num_heads = selected.shape[1]
    nowhere = blocks.total
    ids = torch.where(selected >= 0, selected + plan.selected_base[:, None, None], nowhere)
    wanted = torch.zeros(num_heads, nowhere + 1, dtype=torch.bool, device=selected.device)
    wanted = wanted.scatter(1, ids.transpose(0, 1).flatten(1), True)
    return (wanted[:, :nowhere] & (blocks.owner != rank))[:, blocks.by_rank]


def _exchange_wishes(
    wanted: Tensor,
    plan: Plan,
    blocks: BlockOwnership,
    group: ContextGroup,
    counter: CommunicationCounter,
) -> Tensor:
    """Send each owner its part of ``wanted``.

    Returns:
        asked bool [G, P, own blocks]: which own blocks each rank wants.
    """
    num_heads = wanted.shape[0]
    parts = wanted.view(torch.uint8).split(blocks.counts, dim=1)
    message = torch.cat([part.flatten() for part in parts])
    send_counts = [num_heads * count for count in blocks.counts]
    own = blocks.counts[group.rank]
    recv_counts = [num_heads * own] * group.size
    answer = all_to_all_rows(message, send_counts, recv_counts, group, counter, "request", plan)
    return answer.view(group.size, num_heads, own).transpose(0, 1).bool()


class FetchBlocks(torch.autograd.Function):
    """Move chosen blocks to the ranks that chose them.

    On each rank, for the g KV heads of a transfer (g = 1 with several ranks), with E rows of the
    extended buffer and F fetched tokens:

        k [E, g, Dk], v [E, g, Dv]                    own tokens and halo
        k_fetched [F, g, Dk], v_fetched [F, g, Dv]    remote blocks, by owner, then block

        forward     fetched = all_to_all(kv[send_rows])
        backward    dkv = dkv_own + sum over ranks, in rank order, of what returns through the
                    reverse all-to-all of dfetched

    k and v are returned as well, so that their own gradient and what returns from other ranks meet
    here and are added in float32 (float64), rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        transfer: Transfer,
        group: ContextGroup,
        counter: CommunicationCounter,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.transfer, ctx.group, ctx.counter = transfer, group, counter
        ctx.about = plan
        rows = torch.cat((k[transfer.send_rows], v[transfer.send_rows]), dim=-1)
        before = counter.received["fetch"]
        fetched = all_to_all_rows(
            rows,
            transfer.send_counts,
            transfer.recv_counts,
            group,
            counter,
            "fetch",
            plan,
        )
        counter.fetched_per_head[transfer.first_head] += counter.received["fetch"] - before
        k_fetched, v_fetched = fetched.split((k.shape[-1], v.shape[-1]), dim=-1)
        return k.view_as(k), v.view_as(v), k_fetched, v_fetched

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_k: Tensor, grad_v: Tensor, grad_k_fetched: Tensor, grad_v_fetched: Tensor
    ) -> tuple[Tensor | None, ...]:
        transfer: Transfer = ctx.transfer
        if ctx.group.size == 1:
            return grad_k, grad_v, None, None, None, None
        returned = all_to_all_rows(
            torch.cat((grad_k_fetched, grad_v_fetched), dim=-1),
            transfer.recv_counts,
            transfer.send_counts,
            ctx.group,
            ctx.counter,
            "fetch_grad",
            ctx.about,
        )
        parts = returned.split((grad_k.shape[-1], grad_v.shape[-1]), dim=-1)
        own_k, own_v = (
            add_returned_rows(own, part, transfer.send_rows, transfer.send_counts).to(own.dtype)
            for own, part in zip((grad_k, grad_v), parts, strict=True)
        )
        return own_k, own_v, None, None, None, None

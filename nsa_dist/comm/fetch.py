"""Fetch of exactly the remote blocks that local queries selected.

Letters: N local queries, G KV heads, D widths, n selected blocks per query, B selection blocks of
all documents, E rows of a buffer with its halo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import add_returned, begin_all_to_all
from nsa_dist.comm.work import Exchange, Work
from nsa_dist.plan import BlockOwnership, Plan
from nsa_kernels.autograd import first_order


@dataclass(frozen=True, eq=False)
class Transfer:
    """One all-to-all of selected blocks, for one KV head (on one rank, for all heads).

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
    """The transfers of all KV heads.

    Heads select different blocks, so each head has its own transfer, and only one head's blocks
    need to be in memory at a time. A single rank fetches nothing and takes all heads at once.

    Attributes:
        transfers: in the order of heads.
        heads_per_transfer: KV heads of each transfer.
        block_rows: int64 [G, B], start row of each block, counted through the extended buffer and
            then the fetched rows; -1 for blocks that are not on this rank.
    """

    transfers: tuple[Transfer, ...]
    heads_per_transfer: int
    block_rows: Tensor


def begin_request(selected_NGn: Tensor, plan: Plan, channel: Channel) -> Work[FetchPlan]:
    """Begin to exchange requests: which blocks of each rank this rank's queries selected.

    The message has one byte per block and KV head, so all ranks know its size. Only when it is
    finished does the host wait for the device during a forward.

    Args:
        selected_NGn: int32, padded with -1.
    """
    group, blocks = channel.group, plan.grids["selected"]
    num_heads = selected_NGn.shape[1]
    own_rows_GB = blocks.own_rows.expand(num_heads, -1)
    if group.size == 1:  # All blocks are own, in the order of their ids.
        transfer = Transfer(0, blocks.own_rows[:0], (0,), (0,))
        return Work.done(FetchPlan((transfer,), num_heads, own_rows_GB))
    block_rows_GB = selected_NGn.new_full((num_heads, blocks.total), -1, dtype=torch.int64)
    block_rows_GB = block_rows_GB.index_copy(1, blocks.own_ids, own_rows_GB)
    wanted_GB = _wanted_blocks(selected_NGn, blocks, group.rank)
    halo_rows = plan.halos["selected"].num_rows
    return _begin_requests(wanted_GB, blocks, channel).then(
        lambda asked: _plan_fetch(asked, wanted_GB, block_rows_GB, blocks, group.size, halo_rows)
    )


def _plan_fetch(
    asked: Tensor,
    wanted_GB: Tensor,
    block_rows_GB: Tensor,
    blocks: BlockOwnership,
    size: int,
    halo_rows: int,
) -> FetchPlan:
    """The transfers, from requests of other ranks [G, P, own blocks] and of this one."""
    num_heads = len(wanted_GB)
    own_lengths = blocks.lengths[blocks.own_ids]
    lengths_by_rank = blocks.lengths[blocks.by_rank]
    wanted_tokens = wanted_GB * lengths_by_rank
    recv = wanted_tokens.new_zeros(num_heads, size)
    recv = recv.index_add(1, blocks.owner[blocks.by_rank], wanted_tokens)
    send = (asked * own_lengths).sum(-1)
    sizes = torch.stack((send, recv)).cpu()
    send_counts, recv_counts = sizes.tolist()

    start = wanted_tokens.cumsum(-1) - wanted_tokens + halo_rows
    start = torch.where(wanted_GB, start, block_rows_GB[:, blocks.by_rank])
    block_rows_GB = block_rows_GB.index_copy(1, blocks.by_rank, start)

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
    return FetchPlan(transfers, 1, block_rows_GB)


def _wanted_blocks(selected_NGn: Tensor, blocks: BlockOwnership, rank: int) -> Tensor:
    """Remote blocks that some local query selected: bool [G, B], columns ordered by owner."""
    num_heads = selected_NGn.shape[1]
    nowhere = blocks.total
    ids = torch.where(selected_NGn >= 0, selected_NGn + blocks.bases[:, None, None], nowhere)
    wanted = torch.zeros(num_heads, nowhere + 1, dtype=torch.bool, device=selected_NGn.device)
    wanted = wanted.scatter(1, ids.transpose(0, 1).flatten(1), True)
    return (wanted[:, :nowhere] & (blocks.owner != rank))[:, blocks.by_rank]


def _begin_requests(wanted_GB: Tensor, blocks: BlockOwnership, channel: Channel) -> Work[Tensor]:
    """Begin to send each owner its part of ``wanted_GB``.

    Returns:
        A ``Work`` with bool [G, P, own blocks]: which own blocks each rank requests.
    """
    num_heads, size = wanted_GB.shape[0], channel.group.size
    parts = wanted_GB.view(torch.uint8).split(blocks.counts, dim=1)
    message = torch.cat([part.flatten() for part in parts])
    send_counts = [num_heads * count for count in blocks.counts]
    own = blocks.counts[channel.group.rank]
    answer = begin_all_to_all(message, send_counts, [num_heads * own] * size, channel, "request")
    return answer.then(lambda rows: rows.view(size, num_heads, own).transpose(0, 1).bool())


def begin_fetch(
    k_EGD: Tensor, v_EGD: Tensor, transfer: Transfer, channel: Channel
) -> Work[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Begin to send selected blocks to the ranks that selected them.

    On each rank, for the g KV heads of a transfer (g = 1 with several ranks), with E rows of the
    extended buffer and F fetched tokens:

        k [E, g, Dk], v [E, g, Dv]                    own tokens and halo
        k_fetched [F, g, Dk], v_fetched [F, g, Dv]    remote blocks, by owner, then block

        forward     fetched = all_to_all(kv[send_rows])
        backward    dkv = dkv_own + sum over ranks, in rank order, of what returns through the
                    reverse all-to-all of dfetched

    Returns:
        A ``Work`` with k, v, k_fetched, v_fetched. k and v are returned too, so that the backward
        of ``_Send`` can add their own gradients and those from other ranks in float32 (float64)
        and round once. In backward ``_Receive`` begins the return of gradients, ``_Send`` finishes
        it.
    """
    if channel.group.size == 1:
        k_none, v_none = (x.new_empty(0, *x.shape[1:]) for x in (k_EGD, v_EGD))
        return Work.done((k_EGD, v_EGD, k_none, v_none))
    exchange = _Exchange(transfer, channel, (k_EGD.shape[-1], v_EGD.shape[-1]))
    k, v, sent = _Send.apply(k_EGD, v_EGD, exchange)
    return Work(lambda: (k, v, *_Receive.apply(sent, exchange)))


class _Exchange(Exchange):
    """State of one fetch: the transfer, and the widths of K and V, which share a message."""

    def __init__(self, transfer: Transfer, channel: Channel, widths: tuple[int, int]) -> None:
        super().__init__()
        self.transfer, self.channel, self.widths = transfer, channel, widths


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        transfer, counter = exchange.transfer, exchange.channel.counter
        rows = torch.cat((k[transfer.send_rows], v[transfer.send_rows]), dim=-1)
        before = counter.received["fetch"]
        exchange.incoming = begin_all_to_all(
            rows, transfer.send_counts, transfer.recv_counts, exchange.channel, "fetch"
        )
        counter.fetched_per_head[transfer.first_head] += counter.received["fetch"] - before
        # The empty tensor connects the two halves in the graph.
        return k.view_as(k), v.view_as(v), k.new_empty(0)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_k: Tensor, grad_v: Tensor, _sent: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        exchange: _Exchange = ctx.exchange
        rows, counts = exchange.transfer.send_rows, exchange.transfer.send_counts
        return *add_returned((grad_k, grad_v), exchange.take_back(), rows, counts), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _sent: Tensor, exchange: _Exchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        k_fetched, v_fetched = exchange.receive().split(exchange.widths, dim=-1)
        return k_fetched, v_fetched

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None]:
        exchange: _Exchange = ctx.exchange
        transfer = exchange.transfer
        grad = torch.cat((grad_k, grad_v), dim=-1)
        exchange.returning = begin_all_to_all(
            grad, transfer.recv_counts, transfer.send_counts, exchange.channel, "fetch_grad"
        )
        return grad.new_empty(0), None

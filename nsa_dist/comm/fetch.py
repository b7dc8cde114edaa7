"""Fetch of the remote blocks that local queries selected: exactly those, or all they may select.

With two levels of links (``nsa_dist.comm.two_levels``) a fetch brings blocks of other nodes once a
node, and the node's ranks share them.

Letters: N local queries, G KV heads, D widths, n selected blocks per query, B selection blocks of
all documents, E rows of a buffer with its halo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import add_returned, begin_all_to_all, values_on_host
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.fork import Fork
from nsa_dist.comm.two_levels import (
    Places,
    Requests,
    Share,
    begin_node_requests,
    begin_return,
    begin_share,
    count_shares,
    places_of,
    share_starts,
)
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
        fork: where the plan was made. The first transfer begins there, before what the current
            stream got since the request; None for the others.
        share: what ranks of a node pass to each other then; None on one level of links.
    """

    first_head: int
    send_rows: Tensor
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    fork: Fork | None = None
    share: Share | None = None

    @property
    def received(self) -> int:
        """F, the tokens that this rank gets."""
        shared = 0 if self.share is None else sum(self.share.recv_counts)
        return sum(self.recv_counts) + shared


@dataclass(frozen=True, eq=False)
class FetchPlan:
    """The transfers of all KV heads.

    Heads select different blocks, so each head has its own transfer, and only the heads in flight
    have theirs in memory. A single rank fetches nothing and takes all heads at once, without parts.

    Attributes:
        transfers: in the order of heads, each of ``heads_per_transfer``.
        block_rows: int64 [G, B], start row of each block, counted through the extended buffer and
            then the fetched rows; -1 for blocks that are not on this rank.
    """

    transfers: tuple[Transfer, ...]
    block_rows: Tensor


def heads_per_transfer(num_heads: int, plan: Plan) -> int:
    """KV heads of each transfer. With parts one rank takes them as several do, one by one."""
    return num_heads if plan.size == 1 and plan.parts is None else 1


def begin_request(selected_NGn: Tensor, plan: Plan, channel: Channel) -> Work[FetchPlan]:
    """Begin to exchange requests: which blocks of each rank this rank's queries selected.

    The message has one byte per block and KV head, so all ranks know its size. When it is finished,
    the host waits for the sizes of the transfers: for the selection, the message and a few small
    operators, not for what the current stream gets between ``begin`` and ``finish``.

    Args:
        selected_NGn: int32, padded with -1.
    """
    group, blocks = channel.group, plan.grids["selected"]
    num_heads = selected_NGn.shape[1]
    if group.size == 1:
        return Work.done(_fetch_nothing(num_heads, plan))
    fork = Fork(selected_NGn.device)
    with fork.run(selected_NGn):
        wanted_GB = _wanted_blocks(selected_NGn, blocks, group.rank)
        if channel.nodes is None:
            asking = _begin_requests(wanted_GB, blocks, channel)
        else:
            asking_nodes = begin_node_requests(wanted_GB, blocks, channel)

    def finish() -> FetchPlan:
        with fork.run():
            if channel.nodes is None:
                asked_GPB = asking.finish()
                counts = _count(asked_GPB, wanted_GB, blocks)
                # The only wait of the host for the device in a forward.
                values = values_on_host(counts, channel, "request")
                fetch = _plan_fetch(asked_GPB, wanted_GB, plan, values, fork)
            else:
                fetch = _plan_node_fetch(asking_nodes.finish(), plan, channel, fork)
        shares = [transfer.share.send_rows for transfer in fetch.transfers if transfer.share]
        of_transfers = (transfer.send_rows for transfer in fetch.transfers)
        fork.join(fetch.block_rows, *of_transfers, *shares)
        return fetch

    return Work(finish)


def fetch_all_visible(num_heads: int, plan: Plan) -> FetchPlan:
    """The transfers of all remote blocks that local queries may choose.

    Their sizes follow from the plan: nothing is requested, and the host waits for nothing.
    """
    blocks, visible = plan.grids["selected"], plan.visible
    if visible is None:
        return _fetch_nothing(num_heads, plan)
    before = sum(blocks.counts[: plan.rank])
    asked_PB = visible.by_reader[:, before : before + blocks.counts[plan.rank]]
    wanted_B = visible.by_reader[plan.rank]
    counts = (visible.send_tokens, visible.recv_tokens, visible.send_blocks)
    of_heads = [[list(values)] * num_heads for values in counts]
    asked_GPB = asked_PB.expand(num_heads, -1, -1)
    return _plan_fetch(asked_GPB, wanted_B.expand(num_heads, -1), plan, of_heads, None)


def _fetch_nothing(num_heads: int, plan: Plan) -> FetchPlan:
    """Of a single rank: all blocks are own, in the order of their ids."""
    rows = plan.grids["selected"].own_rows
    heads = range(0, num_heads, heads_per_transfer(num_heads, plan))
    transfers = tuple(Transfer(head, rows[:0], (0,), (0,)) for head in heads)
    return FetchPlan(transfers, rows.expand(num_heads, -1))


def _count(asked_GPB: Tensor, wanted_GB: Tensor, blocks: BlockOwnership) -> Tensor:
    """Tokens to send and to receive, and blocks to send, by head and rank: int64 [3, G, P]."""
    num_heads, size, _ = asked_GPB.shape
    wanted_tokens = wanted_GB * blocks.lengths[blocks.by_rank]
    recv = wanted_tokens.new_zeros(num_heads, size)
    recv = recv.index_add(1, blocks.owner[blocks.by_rank], wanted_tokens)
    send = (asked_GPB * blocks.lengths[blocks.own_ids]).sum(-1)
    return torch.stack((send, recv, asked_GPB.sum(-1)))


def _plan_fetch(
    asked: Tensor,
    wanted_GB: Tensor,
    plan: Plan,
    counts: Sequence[Sequence[Sequence[int]]],
    fork: Fork | None,
) -> FetchPlan:
    """The transfers, from requests of other ranks [G, P, own blocks] and of this one.

    Args:
        counts: the values of ``_count``.
        fork: where it runs, apart from the current stream.
    """
    blocks, halo_rows = plan.grids["selected"], plan.halos["selected"].num_rows
    num_heads = asked.shape[0]
    send_counts, recv_counts, asked_blocks = counts
    own_lengths = blocks.lengths[blocks.own_ids]
    wanted_tokens = wanted_GB * blocks.lengths[blocks.by_rank]
    own_rows_GB = blocks.own_rows.expand(num_heads, -1)
    block_rows_GB = own_rows_GB.new_full((num_heads, blocks.total), -1)
    block_rows_GB = block_rows_GB.index_copy(1, blocks.own_ids, own_rows_GB)
    start = wanted_tokens.cumsum(-1) - wanted_tokens + halo_rows
    start = torch.where(wanted_GB, start, block_rows_GB[:, blocks.by_rank])
    block_rows_GB = block_rows_GB.index_copy(1, blocks.by_rank, start)

    starts_GB = blocks.own_rows.expand(num_heads, -1)
    rows = _rows_to_send(asked, starts_GB, own_lengths, asked_blocks, send_counts)
    per_head = rows.split([sum(counts) for counts in send_counts])
    transfers = tuple(
        Transfer(
            g,
            per_head[g],
            tuple(send_counts[g]),
            tuple(recv_counts[g]),
            fork if g == 0 else None,
        )
        for g in range(num_heads)
    )
    return FetchPlan(transfers, block_rows_GB)


def _rows_to_send(
    asked_GPM: Tensor,
    starts_GM: Tensor,
    lengths_M: Tensor,
    blocks: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
) -> Tensor:
    """Rows of the blocks that are asked for: int64, by head, then rank, then block.

    Args:
        starts_GM: the first row of each block.
        lengths_M: its tokens.
        blocks, tokens: how many are asked for, by head and rank.
    """
    # The places of the True in ``asked``, in order; nonzero would make the host wait again.
    number = torch.arange(1, sum(map(sum, blocks)) + 1, device=asked_GPM.device)
    place = torch.searchsorted(asked_GPM.flatten().cumsum(0), number)
    _, size, each = asked_GPM.shape
    if each:
        place = place // (size * each) * each + place % each
    length = lengths_M.expand_as(starts_GM).flatten()[place]
    total = sum(map(sum, tokens))
    first = starts_GM.flatten()[place] - (length.cumsum(0) - length)
    rows = torch.repeat_interleave(first, length, output_size=total)
    return rows + torch.arange(total, device=rows.device)


def _plan_node_fetch(requests: Requests, plan: Plan, channel: Channel, fork: Fork) -> FetchPlan:
    """The transfers where links have two levels."""
    blocks, places = plan.grids["selected"], places_of(plan.grids["selected"], channel)
    lengths_B = blocks.lengths[blocks.by_rank]
    counts = _count(requests.asked_GPB, requests.fetched_GB, blocks)
    counts = torch.cat((counts, count_shares(requests, lengths_B, places)))
    # The only wait of the host for the device in a forward.
    values = values_on_host(counts, channel, "request")
    fetch = _plan_fetch(requests.asked_GPB, requests.fetched_GB, plan, values[:3], fork)
    return _with_shares(fetch, requests, lengths_B, plan, places, values[3:])


def _with_shares(
    fetch: FetchPlan,
    requests: Requests,
    lengths_B: Tensor,
    plan: Plan,
    places: Places,
    counts: Sequence[Sequence[Sequence[int]]],
) -> FetchPlan:
    """The transfers with what ranks of a node share, which comes behind the fetched rows.

    Args:
        counts: the values of ``count_shares``.
    """
    blocks, halo_rows = plan.grids["selected"], plan.halos["selected"].num_rows
    send, recv, shared_blocks = counts
    passed, fetched = requests.passed_GPM, requests.fetched_GB
    starts_GB = fetch.block_rows[:, blocks.by_rank] - halo_rows
    starts_GM, lengths_M = places.carried(starts_GB), places.carried(lengths_B)
    rows = _rows_to_send(passed, starts_GM, lengths_M, shared_blocks, send)
    per_head = rows.split([sum(of_ranks) for of_ranks in send])
    transfers = tuple(
        replace(transfer, share=Share(per_head[g], tuple(send[g]), tuple(recv[g])))
        for g, transfer in enumerate(fetch.transfers)
    )
    before_G1 = (fetched * lengths_B).sum(-1, keepdim=True) + halo_rows
    rows_GB = share_starts(requests, lengths_B, places) + before_G1
    rows_GB = torch.where(requests.shared_GB, rows_GB, fetch.block_rows[:, blocks.by_rank])
    return FetchPlan(transfers, fetch.block_rows.index_copy(1, blocks.by_rank, rows_GB))


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


class HeadFetch:
    """The fetch of the selected remote blocks of one KV head, step by step.

    On each rank, for the g KV heads of a transfer (g = 1 with several ranks), with E rows of the
    extended buffer and F fetched tokens:

        k [E, g, Dk], v [E, g, Dv]                    own tokens and halo
        k_fetched [F, g, Dk], v_fetched [F, g, Dv]    remote blocks, by owner, then block

        forward     fetched = all_to_all(kv[send_rows])
        backward    dkv = dkv_own + sum over ranks, in rank order, of what returns through the
                    reverse all-to-all of dfetched

    Each step may be a node of the graph, and autograd runs the newest node first. So the steps'
    order in forward sets that of backward:

    | step | in forward | node that it makes, and what that does in backward |
    |---|---|---|
    | ``HeadFetch(k, v)`` | | ``_Home`` waits for the gradients of fetched blocks and adds them |
    | ``begin`` | sends | none |
    | ``finish`` | waits | ``_Receive`` begins to return gradients |
    | ``drop`` | frees the fetched blocks | ``_Arrived`` waits for the blocks, fetched again |
    | ``again`` | | ``_Again`` begins to fetch the blocks again |

    Args:
        k, v: own rows. The attributes of the same name are to be used in their place, so that their
            gradients and those from other ranks are added in float32 (float64) and rounded once.
        again: whether ``drop`` and ``again`` do anything. They do not on a GPU where the caller's
            hooks on saved tensors keep the fetched blocks, such as in memory of the host: a copy on
            a stream of its own would read memory that was freed.
    """

    def __init__(self, k: Tensor, v: Tensor, channel: Channel, *, again: bool = False) -> None:
        self._again = again and channel.group.size > 1 and not _hooks_read_later(k)
        self._exchange: _Exchange | None = None
        self._received: Tensor | None = None
        self.k, self.v = k, v
        if channel.group.size > 1:
            self._exchange = _Exchange(channel, (k.shape[-1], v.shape[-1]))
            self.k, self.v, self._sent = _Home.apply(k, v, self._exchange)

    def begin(self, transfer: Transfer) -> None:
        """Begin to send what other ranks selected."""
        exchange = self._exchange
        if exchange is None:
            return
        exchange.transfer = transfer
        counter = exchange.channel.counter
        before = _fetched_bytes(counter)
        k, v, fork = self.k.detach(), self.v.detach(), transfer.fork
        if fork is None:
            exchange.incoming = exchange.begin(k, v, exchange.new_buffer(k))
        else:
            with fork.run(k, v):
                arriving = exchange.begin(k, v, exchange.new_buffer(k))
            # What is shared is handed over by itself: joined, it would wait for the fork's later
            # messages too.
            joined = Work(lambda: _joined(arriving, fork))
            exchange.incoming = joined if transfer.share is None else arriving
        counter.fetched_per_head[transfer.first_head] += _fetched_bytes(counter) - before

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for k_fetched and v_fetched."""
        exchange = self._exchange
        if exchange is None:
            return self.k.new_empty(0, *self.k.shape[1:]), self.v.new_empty(0, *self.v.shape[1:])
        received = exchange.receive()
        if self._again:
            self._received = received
        return _Receive.apply(self._sent, received, exchange)

    def drop(self, out: Tensor) -> Tensor:
        """``out``, after the fetched blocks are freed that it was computed from.

        Its backward finds them in place again, after ``again`` has fetched them.
        """
        if not self._again or not out.requires_grad:
            return out
        assert self._exchange is not None and self._received is not None
        out = _Arrived.apply(out, self._exchange)
        self._received.untyped_storage().resize_(0)
        return out

    def again(self, out: Tensor) -> Tensor:
        """``out``, the result of ``drop``, whose backward begins to fetch the blocks again."""
        if not self._again or not out.requires_grad:
            return out
        assert self._exchange is not None and self._received is not None
        kept = (self.k.detach(), self.v.detach(), self._received[:0])
        self._received = None
        return _Again.apply(out, *kept, self._exchange)


def _hooks_read_later(x: Tensor) -> bool:
    """Whether hooks on saved tensors may read x after its operator: all but those of activation
    checkpointing, which keep nothing."""
    if x.device.type != "cuda":
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ != torch.utils.checkpoint.__name__


def _fetched_bytes(counter: CommunicationCounter) -> int:
    return sum(counter.received.get(kind, 0) for kind in ("fetch", "share"))


def _joined(arriving: Work[Tensor], fork: Fork) -> Tensor:
    """What arrived in the memory of a fork, for the current stream."""
    with fork.run():
        received = arriving.finish()
    fork.join(received)
    return received


class _Exchange(Exchange):
    """State of one fetch: the transfer, and the widths of K and V, which share a message.

    Attributes:
        transfer: set by ``HeadFetch.begin``.
        arriving_again: the second fetch, in backward; ``_Again`` begins it, ``_Arrived`` waits.
    """

    def __init__(self, channel: Channel, widths: tuple[int, int]) -> None:
        super().__init__()
        self.channel, self.widths = channel, widths
        self.transfer: Transfer | None = None
        self.arriving_again: Work[Tensor] | None = None

    def shape(self, like: Tensor) -> tuple[int, ...]:
        """[F, g, Dk + Dv] of the fetched rows; ``like`` has the g heads in its second dimension."""
        return (self.agreed_transfer.received, like.shape[1], sum(self.widths))

    @property
    def agreed_transfer(self) -> Transfer:
        """The transfer, once it is known."""
        assert self.transfer is not None
        return self.transfer

    def new_buffer(self, like: Tensor) -> Tensor:
        """Memory for the fetched rows. Never empty, so that a freed one can be told from it."""
        rows, *rest = self.shape(like)
        return like.new_empty(max(rows, 1), *rest)[:rows]

    def begin(self, k: Tensor, v: Tensor, buffer: Tensor) -> Work[Tensor]:
        """Begin to send own rows, and to receive in ``buffer``."""
        share = self.agreed_transfer.share
        if share is None:
            return self._begin(k, v, buffer)
        # On a stream of its own the second message follows the first; the host waits for neither.
        with Fork(k.device).run(k, v, buffer):
            fetching = self._begin(k, v, buffer[: sum(self.agreed_transfer.recv_counts)])
            return begin_share(fetching, buffer, share, self.channel)

    def _begin(self, k: Tensor, v: Tensor, into: Tensor) -> Work[Tensor]:
        transfer = self.agreed_transfer
        rows = torch.cat((k[transfer.send_rows], v[transfer.send_rows]), dim=-1)
        return begin_all_to_all(
            rows,
            transfer.send_counts,
            transfer.recv_counts,
            self.channel,
            "fetch",
            into=into,
        )


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        # The empty tensor connects the halves in the graph.
        return k.view_as(k), v.view_as(v), k.new_empty(0)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_k: Tensor, grad_v: Tensor, _sent: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        exchange: _Exchange = ctx.exchange
        transfer = exchange.agreed_transfer
        rows, counts = transfer.send_rows, transfer.send_counts
        return *add_returned((grad_k, grad_v), exchange.take_back(), rows, counts), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _sent: Tensor, received: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        k_fetched, v_fetched = received.split(exchange.widths, dim=-1)
        return k_fetched, v_fetched

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None]:
        exchange: _Exchange = ctx.exchange
        transfer = exchange.agreed_transfer
        grad = torch.cat((grad_k, grad_v), dim=-1)
        back, forth, channel = transfer.recv_counts, transfer.send_counts, exchange.channel
        if transfer.share is None:
            exchange.returning = begin_all_to_all(grad, back, forth, channel, "fetch_grad")
        else:
            exchange.returning = begin_return(grad, transfer.share, back, forth, channel)
        return grad.new_empty(0), None, None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return out.view_as(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        work, ctx.exchange.arriving_again = ctx.exchange.arriving_again, None
        if work is not None:
            work.finish()
        return grad, None


class _Again(torch.autograd.Function):
    """The identity, whose backward fills the freed memory of the fetched blocks.

    That memory is also what the attention saved for its backward. It is found through a view
    without elements, which activation checkpointing and hooks on saved tensors handle like any
    other saved tensor: a recomputation puts its own in its place.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, k: Tensor, v: Tensor, place: Tensor, exchange: _Exchange
    ) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(k, v, place)
        return out.view_as(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        exchange: _Exchange = ctx.exchange
        k, v, place = ctx.saved_tensors
        storage = place.untyped_storage()
        # It is full in the second of two backwards with retain_graph.
        if storage.nbytes() == 0:
            shape = exchange.shape(k)
            elements = max(shape[0], 1) * shape[1] * shape[2]
            storage.resize_(elements * place.element_size())
            # A tensor of its own: what autograd saved must not count as changed.
            buffer = place.new_empty(0).set_(storage, 0, shape)
            exchange.arriving_again = exchange.begin(k, v, buffer)
        return grad, None, None, None, None

"""All-gather of what each rank computed from its own blocks: in NSA, compressed keys and values.

Letters: C blocks of a grid, G KV heads, D widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import accumulation_dtype, begin_all_gather, begin_all_to_all
from nsa_dist.comm.work import Exchange, Work
from nsa_dist.plan import BlockOwnership
from nsa_kernels.autograd import first_order


def begin_gather(
    k_CGD: Tensor, v_CGD: Tensor, blocks: BlockOwnership, channel: Channel
) -> Work[tuple[Tensor, Tensor]]:
    """Begin to gather a row of keys and values for each block of a grid, in stream order.

    On each rank, which owns C_r of the C blocks:

        k [C_r, G, Dk], v [C_r, G, Dv]        own blocks
        k_full [C, G, Dk], v_full [C, G, Dv]  blocks of all documents, in stream order

        forward     all-gather of runs padded to the largest C_r, then a reordering
        backward    all-to-all of dfull to the owner of each row, which sums the P partial
                    gradients in float32 (float64), in rank order. It sends as many bytes as a
                    reduce-scatter, whose order of additions would not be fixed.

    Returns:
        A ``Work`` with k_full, v_full. In backward ``_Receive`` begins the return of gradients,
        ``_Send`` finishes it.
    """
    if channel.group.size == 1:
        return Work.done((k_CGD, v_CGD))
    exchange = _Exchange(blocks, channel, (k_CGD.shape[-1], v_CGD.shape[-1]))
    sent = _Send.apply(k_CGD, v_CGD, exchange)
    return Work(lambda: _Receive.apply(sent, exchange))


class _Exchange(Exchange):
    """State of one gather: the blocks, and the widths of K and V, which share a message."""

    def __init__(self, blocks: BlockOwnership, channel: Channel, widths: tuple[int, int]) -> None:
        super().__init__()
        self.blocks, self.channel, self.widths = blocks, channel, widths


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        own = torch.cat((k, v), dim=-1)
        padded = own.new_zeros((max(exchange.blocks.counts), *own.shape[1:]))
        padded[: len(own)] = own
        exchange.incoming = begin_all_gather(padded, exchange.channel, "gather")
        # The empty tensor connects the two halves in the graph.
        return k.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, _sent: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange: _Exchange = ctx.exchange
        partial = exchange.take_back().unflatten(0, (exchange.channel.group.size, -1))
        own = partial[0].to(accumulation_dtype(partial.dtype), copy=True)
        for piece in partial[1:]:
            own += piece
        k_part, v_part = own.to(partial.dtype).split(exchange.widths, dim=-1)
        return k_part, v_part, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _sent: Tensor, exchange: _Exchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        full = exchange.receive()[exchange.blocks.gathered_rows]
        k_full, v_full = full.split(exchange.widths, dim=-1)
        return k_full, v_full

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None]:
        exchange: _Exchange = ctx.exchange
        blocks, channel = exchange.blocks, exchange.channel
        grad = torch.cat((grad_k, grad_v), dim=-1)
        own = blocks.counts[channel.group.rank]
        exchange.returning = begin_all_to_all(
            grad[blocks.by_rank],
            blocks.counts,
            [own] * channel.group.size,
            channel,
            "gather_grad",
        )
        return grad.new_empty(0), None

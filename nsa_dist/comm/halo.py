"""Halo exchange: the tokens just outside of a rank's chunks.

Letters: N local tokens, G KV heads, D widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import add_returned, begin_all_to_all
from nsa_dist.comm.work import Exchange, Work
from nsa_dist.plan import Halo
from nsa_kernels.autograd import first_order


def begin_halo(
    k_NGD: Tensor, v_NGD: Tensor, halo: Halo, channel: Channel
) -> Work[tuple[Tensor, Tensor]]:
    """Begin to extend local keys and values by tokens of other ranks.

    On each rank, with N local rows and E rows of the extended buffer:

        k [N, G, Dk], v [N, G, Dv]            local tokens
        k_ext [E, G, Dk], v_ext [E, G, Dv]    runs of consecutive tokens, halo included

        forward     ext[own_rows] = local;  ext[recv_rows] = all_to_all(local[send_rows])
        backward    dlocal = dext[own_rows] + sum over ranks, in rank order, of what returns
                    through the reverse all-to-all of dext[recv_rows]

    K and V share one message. If no rank needs a halo (as with one rank), nothing is sent; if the
    buffer also equals the local tensor, nothing is copied.

    Returns:
        A ``Work`` with k_ext, v_ext. In backward the roles change: ``_Receive`` begins the return
        of gradients, ``_Send`` finishes it.
    """
    if halo.is_identity:
        return Work.done((k_NGD, v_NGD))
    exchange = _Exchange(halo, channel)
    k, v, sent = _Send.apply(k_NGD, v_NGD, exchange)
    return Work(lambda: _Receive.apply(k, v, sent, exchange))


class _Exchange(Exchange):
    """State of one halo exchange: the halo, and until it is finished the local K and V."""

    def __init__(self, halo: Halo, channel: Channel) -> None:
        super().__init__()
        self.halo, self.channel = halo, channel
        self.local: Tensor | None = None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        halo = exchange.halo
        exchange.local = local = torch.cat((k, v), dim=-1)
        if not halo.is_local:
            exchange.incoming = begin_all_to_all(
                local[halo.send_rows], halo.send_counts, halo.recv_counts, exchange.channel, "halo"
            )
        # The empty tensor connects the two halves in the graph.
        return k.view_as(k), v.view_as(v), k.new_empty(0)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_k: Tensor, grad_v: Tensor, _sent: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        exchange: _Exchange = ctx.exchange
        halo = exchange.halo
        if halo.is_local:
            return grad_k, grad_v, None
        returned = exchange.take_back()
        return *add_returned((grad_k, grad_v), returned, halo.send_rows, halo.send_counts), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, _sent: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        halo, local = exchange.halo, exchange.local
        assert local is not None
        extended = local.new_empty((halo.num_rows, *local.shape[1:]))
        extended[halo.own_rows] = local
        if not halo.is_local:
            extended[halo.recv_rows] = exchange.receive()
        exchange.local = None
        k_ext, v_ext = extended.split((k.shape[-1], v.shape[-1]), dim=-1)
        return k_ext, v_ext

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        exchange: _Exchange = ctx.exchange
        halo = exchange.halo
        grad = torch.cat((grad_k, grad_v), dim=-1)
        own = grad[halo.own_rows]
        if not halo.is_local:
            exchange.returning = begin_all_to_all(
                grad[halo.recv_rows],
                halo.recv_counts,
                halo.send_counts,
                exchange.channel,
                "halo_grad",
            )
        own_k, own_v = own.split((grad_k.shape[-1], grad_v.shape[-1]), dim=-1)
        return own_k, own_v, grad.new_empty(0), None

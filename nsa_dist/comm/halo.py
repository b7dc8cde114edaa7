"""Exchange of the tokens that stand just outside a rank's chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.collectives import add_returned_rows, all_to_all_rows
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan import Halo, Plan
from nsa_kernels.autograd import first_order


class HaloExchange(torch.autograd.Function):
    """Extend local keys and values by the tokens that other ranks hold for them.

    On each rank, with N local rows and E rows of the extended buffer:

        k [N, G, Dk], v [N, G, Dv]            local tokens
        k_ext [E, G, Dk], v_ext [E, G, Dv]    runs of consecutive tokens, halo included

        forward     ext[own_rows] = local;  ext[recv_rows] = all_to_all(local[send_rows])
        backward    dlocal = dext[own_rows] + sum over ranks, in rank order, of what returns
                    through the reverse all-to-all of dext[recv_rows]

    K and V travel in one message. Where no rank needs a halo (one rank among the cases) nothing is
    sent, on any rank, and where besides the buffer is the local tensor nothing is copied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        halo: Halo,
        group: ContextGroup,
        counter: CommunicationCounter,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        ctx.halo, ctx.group, ctx.counter, ctx.about = halo, group, counter, plan
        if halo.is_identity:
            return k.view_as(k), v.view_as(v)
        local = torch.cat((k, v), dim=-1)
        extended = local.new_empty((halo.num_rows, *local.shape[1:]))
        extended[halo.own_rows] = local
        if not halo.is_local:
            rows, sent, received = local[halo.send_rows], halo.send_counts, halo.recv_counts
            extended[halo.recv_rows] = all_to_all_rows(
                rows, sent, received, group, counter, "halo", plan
            )
        k_ext, v_ext = extended.split((k.shape[-1], v.shape[-1]), dim=-1)
        return k_ext, v_ext

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        halo: Halo = ctx.halo
        if halo.is_identity:
            return grad_k, grad_v, None, None, None, None
        grad = torch.cat((grad_k, grad_v), dim=-1)
        own = grad[halo.own_rows]
        if not halo.is_local:
            returned = all_to_all_rows(
                grad[halo.recv_rows],
                halo.recv_counts,
                halo.send_counts,
                ctx.group,
                ctx.counter,
                "halo_grad",
                ctx.about,
            )
            own = add_returned_rows(own, returned, halo.send_rows, halo.send_counts)
        k_part, v_part = own.to(grad.dtype).split((grad_k.shape[-1], grad_v.shape[-1]), dim=-1)
        return k_part, v_part, None, None, None, None

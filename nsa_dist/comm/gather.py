"""All-gather of compressed tokens, the only tensor that every rank receives whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.collectives import accumulation_dtype, all_gather_rows, all_to_all_rows
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan import BlockOwnership, Plan
from nsa_kernels.autograd import first_order


class GatherCompressed(torch.autograd.Function):
    """Gather the compressed keys and values of all ranks, in document order.

    On each rank, which made C_r of the C compressed tokens:

        k [C_r, G, Dk], v [C_r, G, Dv]        own blocks
        k_full [C, G, Dk], v_full [C, G, Dv]  every document's blocks, in stream order

        forward     all-gather of runs padded to the largest C_r, then a reordering
        backward    all-to-all of dfull, each token's to its maker; the P partial gradients are
                    added there in float32 (float64) in rank order. The bytes are a
                    reduce-scatter's; its order of additions would not be fixed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        blocks: BlockOwnership,
        group: ContextGroup,
        counter: CommunicationCounter,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.group, ctx.counter, ctx.about = blocks, group, counter, plan
        if group.size == 1:
            return k.view_as(k), v.view_as(v)
        own = torch.cat((k, v), dim=-1)
        padded = own.new_zeros((max(blocks.counts), *own.shape[1:]))
        padded[: len(own)] = own
        full = all_gather_rows(padded, group, counter, "gather", plan)
        full = full[blocks.gathered_rows]
        k_full, v_full = full.split((k.shape[-1], v.shape[-1]), dim=-1)
        return k_full, v_full

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        blocks, group = ctx.blocks, ctx.group
        if group.size == 1:
            return grad_k, grad_v, None, None, None, None
        grad = torch.cat((grad_k, grad_v), dim=-1)
        count = blocks.counts[group.rank]
        partial = all_to_all_rows(
            grad[blocks.by_rank],
            blocks.counts,
            [count] * group.size,
            group,
            ctx.counter,
            "gather_grad",
            ctx.about,
        ).view(group.size, count, *grad.shape[1:])
        own = partial[0].to(accumulation_dtype(grad.dtype), copy=True)
        for piece in partial[1:]:
            own += piece
        k_part, v_part = own.to(grad.dtype).split((grad_k.shape[-1], grad_v.shape[-1]), dim=-1)
        return k_part, v_part, None, None, None, None

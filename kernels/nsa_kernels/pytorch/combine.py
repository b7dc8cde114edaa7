"""The gated sum of the branches (Eq. 5, arXiv 2502.11089).

Letters: N local rows, H query heads, D width, b branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.autograd import first_order, grads_of_summands, heads_of_summands
from nsa_kernels.pytorch._common import accumulation_dtype, exact


class _Combine(torch.autograd.Function):
    """o = sum_b g_b o_b; do_b = g_b do, dg_b = sum over channels of do o_b.

    Branches with summands, of `heads` heads each, get do there and nothing else.
    """

    @staticmethod
    @exact
    def forward(
        ctx: Any, heads: Sequence[Sequence[int]], gates_NHb: Tensor, *tensors: Tensor
    ) -> Tensor:
        outputs = tensors[: len(heads)]
        dtype = accumulation_dtype(outputs[0])
        weights = gates_NHb.to(dtype).unsqueeze(-2).unbind(-1)  # [N, H, 1] each
        total_NHD = outputs[0].to(dtype) * weights[0]
        for output_NHD, weight_NH1 in zip(outputs[1:], weights[1:], strict=True):
            total_NHD = total_NHD.addcmul(output_NHD.to(dtype), weight_NH1)
        plain = [x for x, of in zip(outputs, heads, strict=True) if not of]
        ctx.heads = heads
        ctx.save_for_backward(*([gates_NHb, *plain] if plain else []))
        return total_NHD.to(outputs[0].dtype)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
        grad_outputs: list[Tensor | None] = [None] * len(ctx.heads)
        grad_gates_NHb = None
        if ctx.saved_tensors:
            gates_NHb, *outputs = ctx.saved_tensors
            dtype = accumulation_dtype(outputs[0])
            wide_NHD = grad_NHD.to(dtype)
            weights = gates_NHb.to(dtype).unsqueeze(-2).unbind(-1)
            grad_gates_NHb = torch.zeros_like(gates_NHb)
            plain = [b for b, of in enumerate(ctx.heads) if not of]
            for b, output_NHD in zip(plain, outputs, strict=True):
                grad_gates_NHb[..., b] = (wide_NHD * output_NHD.to(dtype)).sum(dim=-1)
                grad_outputs[b] = (wide_NHD * weights[b]).to(output_NHD.dtype)
        return None, grad_gates_NHb, *grad_outputs, *grads_of_summands(grad_NHD, ctx.heads)


def combine(
    outputs: Sequence[Tensor], gates: Tensor, summands: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See `Backend.combine`."""
    assert gates.shape == (*outputs[0].shape[:2], len(outputs)), (gates.shape, len(outputs))
    heads = heads_of_summands(outputs, summands)
    return _Combine.apply(heads, gates, *outputs, *(x for of in summands for x in of))

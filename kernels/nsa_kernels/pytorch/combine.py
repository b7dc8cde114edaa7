"""The gated sum of the branches (Eq. 5, arXiv 2502.11089).

Letters: N local rows, H query heads, D width, b branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.autograd import first_order
from nsa_kernels.pytorch._common import accumulation_dtype, exact


class _Combine(torch.autograd.Function):
    """o = sum_b g_b o_b; do_b = g_b do, dg_b = sum over channels of do o_b."""

    @staticmethod
    @exact
    def forward(ctx: Any, gates_NHb: Tensor, *outputs: Tensor) -> Tensor:
        dtype = accumulation_dtype(outputs[0])
        weights = gates_NHb.to(dtype).unsqueeze(-2).unbind(-1)  # [N, H, 1] each
        total_NHD = outputs[0].to(dtype) * weights[0]
        for output_NHD, weight_NH1 in zip(outputs[1:], weights[1:], strict=True):
            total_NHD = total_NHD.addcmul(output_NHD.to(dtype), weight_NH1)
        ctx.save_for_backward(gates_NHb, *outputs)
        return total_NHD.to(outputs[0].dtype)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor, ...]:
        gates_NHb, *outputs = ctx.saved_tensors
        dtype = accumulation_dtype(outputs[0])
        wide_NHD = grad_NHD.to(dtype)
        weights = gates_NHb.to(dtype).unsqueeze(-2).unbind(-1)
        grad_gates_NHb = torch.stack(
            [(wide_NHD * o_NHD.to(dtype)).sum(dim=-1) for o_NHD in outputs], dim=-1
        )
        grad_outputs = [
            (wide_NHD * weight_NH1).to(output_NHD.dtype)
            for output_NHD, weight_NH1 in zip(outputs, weights, strict=True)
        ]
        return grad_gates_NHb.to(gates_NHb.dtype), *grad_outputs


def combine(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """See `Backend.combine`."""
    assert gates.shape == (*outputs[0].shape[:2], len(outputs)), (gates.shape, len(outputs))
    return _Combine.apply(gates, *outputs)

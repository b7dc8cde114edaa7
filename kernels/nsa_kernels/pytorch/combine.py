"""The gated sum of the branches (Eq. 5, arXiv 2502.11089)."""

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
    def forward(ctx: Any, gates: Tensor, *outputs: Tensor) -> Tensor:
        dtype = accumulation_dtype(outputs[0])
        weights = gates.to(dtype).unsqueeze(-2).unbind(-1)  # [N, H, 1] each
        total = outputs[0].to(dtype) * weights[0]
        for output, weight in zip(outputs[1:], weights[1:], strict=True):
            total = total.addcmul(output.to(dtype), weight)
        ctx.save_for_backward(gates, *outputs)
        return total.to(outputs[0].dtype)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gates, *outputs = ctx.saved_tensors
        dtype = accumulation_dtype(outputs[0])
        wide = grad.to(dtype)
        weights = gates.to(dtype).unsqueeze(-2).unbind(-1)
        grad_gates = torch.stack([(wide * o.to(dtype)).sum(dim=-1) for o in outputs], dim=-1)
        grad_outputs = [
            (wide * weight).to(output.dtype)
            for output, weight in zip(outputs, weights, strict=True)
        ]
        return grad_gates.to(gates.dtype), *grad_outputs


def combine(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """See `Backend.combine`."""
    assert gates.shape == (*outputs[0].shape[:2], len(outputs)), (gates.shape, len(outputs))
    return _Combine.apply(gates, *outputs)

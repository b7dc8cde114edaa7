"""Sums of cross-entropies from hidden states: the logits of all tokens never exist at one time.

Dimension letters: N tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_kernels.autograd import first_order

ROWS = 4096
"""Tokens whose logits exist at one time in training: [4096, V], in float32 too."""
IGNORED = -100
"""The label of a token without a target."""


def sum_in_pieces(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the targets' cross-entropies; each piece's logits are made again in backward.

    Args:
        x: [N, h], a token's state each.
        weight: [V, h], whose products with it are logits.
        labels: int64 [N].

    Returns:
        float64 scalar, nats.
    """
    loss = x.new_zeros((), dtype=torch.float64)
    for x_rows, label_rows in zip(x.split(ROWS), labels.split(ROWS), strict=True):
        of_rows = checkpoint(_sum, x_rows, weight, label_rows, use_reentrant=False)
        loss = loss + of_rows.to(torch.float64)
    return loss


def _sum(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def liger_problem(device: str) -> str | None:
    """What ``model.loss`` must be where Liger's kernel cannot run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "'pieces' where liger-kernel is not installed (pip install nsa-dist[liger])"
    return None if device == "cuda" else "'pieces' on the CPU ('liger' needs a GPU)"


def sum_by_liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As ``sum_in_pieces``, by Liger's fused kernel, in training; without gradients in pieces.

    Forward makes the gradients too, from the logits that it has, so that backward makes no logits
    again. It has about as many of them at a time as ``x`` has elements. The gradient of the weight
    adds up in float32. The host waits for the number of targets.
    """
    if not torch.is_grad_enabled():
        return sum_in_pieces(x, weight, labels)
    loss: Tensor = _ByLiger.apply(x, weight, labels)
    return loss.to(torch.float64)


class _ByLiger(torch.autograd.Function):
    """Liger's own function would have the host wait for the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        loss, *_, grad_x, grad_weight, _ = fused_linear_cross_entropy_forward(
            x.contiguous(),
            weight,
            labels,
            ignore_index=IGNORED,
            reduction="sum",
            accum_dtype=torch.float32,
            compute_gradients=True,
            weight_requires_grad=True,
        )
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # Scaled before it is rounded: the loss is divided by all targets.
        of_weight = (grad_weight * grad).to(ctx.dtype)
        return (grad_x * grad).to(grad_x.dtype), of_weight, None

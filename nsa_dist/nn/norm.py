"""RMSNorm with weights for each of several sets of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SetNorm(nn.Module):
    """RMSNorm over the channels of each head, with one weight per set of heads.

    The keys of each branch need their own weight, because after the norm only the weight sets the
    temperature of the branch's softmax.

    Args:
        num_sets: sets S.
        dim: channels D.
        offset: added to the weight, as in norms whose weight starts at 0.

    Parameters:
        weight [S, D], initially 1 - offset.
    """

    def __init__(
        self, num_sets: int, dim: int, eps: float, *, offset: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(num_sets, dim, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to 1 - offset."""
        self.weight.fill_(1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each head of [..., S, G, D], in float32 or wider."""
        normed = nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)
        weight: Tensor = self.weight
        if self.offset != 0:
            # In 16 bits the sum would lose most of a small weight's digits.
            weight = self.offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (normed * weight[:, None]).to(x.dtype)

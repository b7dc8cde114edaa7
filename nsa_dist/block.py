"""Transformer blocks around the attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nsa_dist.attention.functional import NSADetails
from nsa_dist.checks import as_int
from nsa_dist.config import NSAConfig
from nsa_dist.layer import NativeSparseAttention, check_sizes
from nsa_dist.nn.mlp import SwiGLU


class PreNormBlock(nn.Module):
    """Norm, attention, norm, SwiGLU, with residuals; ``attention_type`` is the attention layer."""

    attention_type: ClassVar[Callable[..., nn.Module]]

    def __init__(
        self,
        hidden_size: int,
        config: NSAConfig,
        *,
        mlp_hidden: int,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        hidden_size, norm_eps = check_sizes(hidden_size, norm_eps, dtype)
        mlp_hidden = as_int("mlp_hidden", mlp_hidden, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.RMSNorm(hidden_size, eps=norm_eps, **factory)
        self.attention: Any = type(self).attention_type(
            hidden_size, config, norm_eps=norm_eps, **factory, **attention
        )
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=norm_eps, **factory)
        self.mlp = SwiGLU(hidden_size, mlp_hidden, **factory)

    def reset_parameters(self) -> None:
        """Initialise all weights again from torch's generator, in a fixed order."""
        self.attention_norm.reset_parameters()
        self.attention.reset_parameters()
        self.mlp_norm.reset_parameters()
        for linear in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj):
            linear.reset_parameters()


class NSABlock(PreNormBlock):
    """A transformer block: norm, attention, norm, SwiGLU, with residuals.

    Args:
        hidden_size, config: as for ``NativeSparseAttention``, which gets all other keyword
            arguments too.
        mlp_hidden: hidden width of the SwiGLU.
        norm_eps: epsilon of every RMSNorm.
    """

    attention_type = NativeSparseAttention

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, NSADetails]:
        """[B, L, hidden_size] to the same shape; arguments as for ``NativeSparseAttention``."""
        result = self.attention(
            self.attention_norm(x),
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            return_details=return_details,
        )
        attended, details = result if return_details else (result, None)
        x = x + attended
        x = x + self.mlp(self.mlp_norm(x))
        return x if details is None else (x, details)

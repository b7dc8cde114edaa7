"""The feed-forward part of a transformer block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, hidden_size: int, mlp_hidden: int, **factory: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_hidden, bias=False, **factory)
        self.up_proj = nn.Linear(hidden_size, mlp_hidden, bias=False, **factory)
        self.down_proj = nn.Linear(mlp_hidden, hidden_size, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

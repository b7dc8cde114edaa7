"""The backend in plain PyTorch, for machines without a supported GPU.

Forward and backward are written out for each function and go through the queries in tiles, so that
no tensor of size queries x keys is kept. The shape of a tile, and with it the order of every sum a
query takes part in, follows from positions alone, never from data.
"""

from __future__ import annotations

import torch

from nsa_kernels.pytorch.block_selection import select_blocks
from nsa_kernels.pytorch.combine import combine
from nsa_kernels.pytorch.compressed_attention import compressed_attention
from nsa_kernels.pytorch.compression import compress, gather_blocks
from nsa_kernels.pytorch.few_queries import attend_few
from nsa_kernels.pytorch.selected_attention import selected_attention
from nsa_kernels.pytorch.window_attention import window_attention

__all__ = [
    "attend_few",
    "combine",
    "compress",
    "compressed_attention",
    "gated_branches",
    "gather_blocks",
    "name",
    "refuses",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

name = "pytorch"
gated_branches = ("compressed", "selected", "window")


def refuses(dtype: torch.dtype | None, options: dict[str, int]) -> str | None:
    """See `Backend.refuses`: nothing that a config may hold."""
    return None

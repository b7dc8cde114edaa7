"""Which keys a query sees in the compressed and window branches, on the host and in kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Band(NamedTuple):
    """Query t sees keys j with j*stride + offset <= t and, with a window > 0, j > t - window.

    column: of a segment, what gives the row of key 0.
    """

    offset: int
    stride: int
    window: int
    column: str

    def keys(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [begin, end) that some query at positions first..last sees, for each pair."""
        begin = first - self.window + 1 if self.window else torch.zeros_like(first)
        return begin.clamp(min=0), (last - self.offset + self.stride).clamp(min=0) // self.stride

    def most_keys(self, last: int) -> int:
        """Keys up to the last one that the query at position `last` sees."""
        return max(0, last - self.offset + self.stride) // self.stride


@triton.jit
def num_seen(t, OFFSET: tl.constexpr, STRIDE: tl.constexpr):
    """Keys at the start of the document that end at or before position t."""
    return tl.maximum(t - OFFSET + STRIDE, 0) // STRIDE


@triton.jit
def sees(t, j, OFFSET: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at position t sees key j."""
    seen = j * STRIDE + OFFSET <= t
    if WINDOW > 0:
        seen = seen & (j > t - WINDOW)
    return seen


@triton.jit
def load_rows(p, o_row, o_col, m_row, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of WIDTH channels in a tile of PADDED columns; zeros where masked."""
    mask = m_row[:, None]
    if WIDTH != PADDED:
        mask = mask & (o_col < WIDTH)[None, :]
    return tl.load(p + o_row[:, None] + o_col[None, :], mask=mask, other=0.0)

"""How tensors reach a kernel: a pointer with its strides is one argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class HeadRows(NamedTuple):
    """A tensor [rows, heads, D] whose channels are contiguous.

    p: the tensor, in a kernel its pointer; stride_row, stride_head: in elements.
    """

    p: Any
    stride_row: Any
    stride_head: Any


class KeyValues(NamedTuple):
    """Keys and values of one KV head, in a kernel: pointers to row 0 and the strides of rows."""

    p_k: Any
    p_v: Any
    stride_k: Any
    stride_v: Any


def head_rows(x: Tensor) -> HeadRows:
    """x [rows, heads, D] as a kernel takes it."""
    stride_row, stride_head, _ = x.stride()
    return HeadRows(x, stride_row, stride_head)


def last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def load_rows(p, o_row, o_col, m_row, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of WIDTH channels in a tile of PADDED columns; zeros where masked."""
    mask = m_row[:, None]
    if WIDTH != PADDED:
        mask = mask & (o_col < WIDTH)[None, :]
    return tl.load(p + o_row[:, None] + o_col[None, :], mask=mask, other=0.0)


@triton.jit
def load_head_rows(x, row, head, m_row, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The rows x[row, head] in a tile of PADDED columns; zeros where masked."""
    o_row = row * x.stride_row + head * x.stride_head
    return load_rows(x.p, o_row, tl.arange(0, PADDED), m_row, WIDTH, PADDED)

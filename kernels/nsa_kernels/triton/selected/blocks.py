"""Where a chosen block stands, and how kernels load and store one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.shared.arguments import last_dim_contiguous


@triton.jit
def first_of(own, fetched, row, num_own, stride_own, stride_fetched):
    """Pointer to a row counted through the own and then the fetched rows, and their stride.

    The stride is int32, as a block spans less than 2^31 elements: see `with_int32_blocks`.
    """
    p_own = own + row * stride_own
    p = fetched + (row - num_own) * stride_fetched
    own_stride = tl.cast(stride_own, tl.int32)
    stride = tl.cast(stride_fetched, tl.int32)
    if row < num_own:
        p = p_own
        stride = own_stride
    return p, stride


@triton.jit
def load_columns(p, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The tile at pointers [rows, PADDED], zeros in the columns from WIDTH."""
    if WIDTH != PADDED:
        b = tl.load(p, mask=(tl.arange(0, PADDED) < WIDTH)[None, :], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def load_tile(p, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Dense rows of WIDTH columns from p in a tile [ROWS, PADDED]."""
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    return load_columns(p + o_n[:, None] * WIDTH + o_d[None, :], WIDTH, PADDED)


@triton.jit
def store_tile(p, b, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write the first WIDTH columns of b [ROWS, PADDED] as dense rows from p."""
    o_d = tl.arange(0, PADDED)
    p += tl.arange(0, ROWS)[:, None] * WIDTH + o_d[None, :]
    if WIDTH != PADDED:
        tl.store(p, b, mask=(o_d < WIDTH)[None, :])
    else:
        tl.store(p, b)


@triton.jit
def block_of(
    entry, k_own, v_own, k_fetched, v_fetched, num_own, stride_kt, stride_vt, stride_fkt,
    stride_fvt,
):  # fmt: skip
    """Of an entry of a block list: pointers to its keys and values and their row strides."""
    row = entry >> 24
    p_k, stride_k = first_of(k_own, k_fetched, row, num_own, stride_kt, stride_fkt)
    p_v, stride_v = first_of(v_own, v_fetched, row, num_own, stride_vt, stride_fvt)
    return p_k, p_v, stride_k, stride_v


@triton.jit
def load_block(
    p, stride, first, limit, BN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows first..first+BN-1 of a block in a tile of PADDED columns; with MASKED zeros from limit.

    Rows behind the limit, which nobody may see, may be anything, also no memory of ours.
    """
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, PADDED)
    p_rows = p + first * stride + o_n[:, None] * stride + o_d[None, :]
    if MASKED:
        mask = (first + o_n < limit)[:, None] & (o_d < WIDTH)[None, :]
        b = tl.load(p_rows, mask=mask, other=0.0)
    else:
        b = load_columns(p_rows, WIDTH, PADDED)
    return b


def with_int32_blocks(x: Tensor, select_block: int) -> Tensor:
    """x [rows, G, D] with a contiguous last dimension and blocks that span less than 2^31."""
    x = last_dim_contiguous(x)
    return x if x.stride(0) * select_block < 1 << 31 else x.contiguous()

"""Where a chosen block stands, and how kernels load and store one."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.shared.arguments import HeadRows, KeyValues, head_rows, last_dim_contiguous
from nsa_kernels.triton.shared.arithmetic import precision
from nsa_kernels.triton.shared.shapes import padded


class Constants(NamedTuple):
    """What a kernel is compiled for.

    G KV heads with R query heads each; BLOCK tokens of a block. A tile has BT tokens (in dk and dv
    queries), whose heads are at most BM rows, and BN keys. DK, DV: widths; PDK, PDV: padded.
    PRECISION: of dots. APART: see `WalkTile`.
    """

    G: int
    R: int
    BLOCK: int
    BT: int
    BM: int
    BN: int
    DK: int
    DV: int
    PDK: int
    PDV: int
    PRECISION: str
    APART: bool


def constants(
    q: Tensor,
    v: Tensor,
    select_block: int,
    *,
    tokens: int,
    rows: int,
    keys: int,
    apart: bool = False,
) -> Constants:
    """For q [N, H, Dk], v [E, G, Dv] in such tiles."""
    (_, heads, dk), (_, groups, dv) = q.shape, v.shape
    return Constants(
        groups,
        heads // groups,
        select_block,
        tokens,
        rows,
        keys,
        dk,
        dv,
        padded(dk),
        padded(dv),
        precision(q),
        apart,
    )


class Sources(NamedTuple):
    """Keys and values, own and fetched, as a kernel takes them."""

    k_own: HeadRows
    v_own: HeadRows
    k_fetched: HeadRows
    v_fetched: HeadRows


class Blocks(NamedTuple):
    """rows: int64 [G, B], where each block starts, counted through own and then fetched rows.

    lengths: int64 [B], the tokens of each.
    """

    rows: Any
    lengths: Any


def with_int32_blocks(x: Tensor, select_block: int) -> Tensor:
    """x [rows, G, D] with a contiguous last dimension and blocks that span less than 2^31."""
    x = last_dim_contiguous(x)
    return x if x.stride(0) * select_block < 1 << 31 else x.contiguous()


def sources_of(tensors: list[Tensor]) -> Sources:
    """k_own, v_own, k_fetched and v_fetched with the strides of `with_int32_blocks`."""
    return Sources(*map(head_rows, tensors))


@triton.jit
def of_head(x, i_g):
    """The rows of KV head i_g."""
    return HeadRows(x.p + i_g * x.stride_head, x.stride_row, x.stride_head)


@triton.jit
def sources_of_head(sources, i_g):
    """The same rows, with pointers at KV head i_g."""
    return Sources(
        of_head(sources.k_own, i_g),
        of_head(sources.v_own, i_g),
        of_head(sources.k_fetched, i_g),
        of_head(sources.v_fetched, i_g),
    )


@triton.jit
def first_of(own, fetched, row, num_own):
    """Pointer to a row counted through the own and then the fetched rows, and their stride.

    The stride is int32, as a block spans less than 2^31 elements: see `with_int32_blocks`.
    """
    p_own = own.p + row * own.stride_row
    p = fetched.p + (row - num_own) * fetched.stride_row
    own_stride = tl.cast(own.stride_row, tl.int32)
    stride = tl.cast(fetched.stride_row, tl.int32)
    if row < num_own:
        p = p_own
        stride = own_stride
    return p, stride


@triton.jit
def block_at(row, sources, num_own):
    """Keys and values of the block that starts at `row`, with pointers to its first."""
    p_k, stride_k = first_of(sources.k_own, sources.k_fetched, row, num_own)
    p_v, stride_v = first_of(sources.v_own, sources.v_fetched, row, num_own)
    return KeyValues(p_k, p_v, stride_k, stride_v)


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
def _load_block(
    p, stride, first, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block from `first` on in a tile of PADDED columns; if MASKED, 0 from limit on.

    Rows from the limit on are never read: they may hold anything, or lie outside the buffer.
    """
    o_n = tl.arange(0, ROWS)
    o_d = tl.arange(0, PADDED)
    p_rows = p + first * stride + o_n[:, None] * stride + o_d[None, :]
    if MASKED:
        mask = (first + o_n < limit)[:, None] & (o_d < WIDTH)[None, :]
        b = tl.load(p_rows, mask=mask, other=0.0)
    else:
        b = load_columns(p_rows, WIDTH, PADDED)
    return b


@triton.jit
def load_block(block, first, limit, MASKED: tl.constexpr, C: tl.constexpr):
    """BN keys of a block from `first` on, and their values: [BN, PDK] and [BN, PDV]."""
    b_k = _load_block(block.p_k, block.stride_k, first, limit, C.BN, C.DK, C.PDK, MASKED)
    b_v = _load_block(block.p_v, block.stride_v, first, limit, C.BN, C.DV, C.PDV, MASKED)
    return b_k, b_v

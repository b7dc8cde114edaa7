"""Where a chosen block stands, and how kernels load and store one.

On Hopper whole blocks are loaded by TMA: the kernel names a tile by its row and column, and one
thread has the hardware copy it, so that no thread spends registers and instructions on addresses,
and more loads are under way. TMA zeroes what lies outside a tensor, not what lies behind the end of
a document, so blocks of which a part is masked go through pointers. Both ways put the same numbers
into shared memory; the bits of results do not tell which was taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_kernels.triton.shared.arguments import HeadRows, KeyValues, head_rows, last_dim_contiguous
from nsa_kernels.triton.shared.arithmetic import precision
from nsa_kernels.triton.shared.launch import descriptor
from nsa_kernels.triton.shared.shapes import WalkTile, padded


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


class Tiles(NamedTuple):
    """Descriptors of keys and values for TMA, [rows, columns], KV heads beside each other.

    All None where blocks are loaded through pointers, the last two where nothing was fetched.
    """

    k_own: Any
    v_own: Any
    k_fetched: Any
    v_fetched: Any


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


def with_rows(tensors: list[Tensor]) -> list[Tensor]:
    """k_own, v_own, k_fetched and v_fetched, or the two that have rows.

    A descriptor of nothing cannot be made. What kernels get in its place they do not read.
    """
    own, fetched = tensors[:2], tensors[2:]
    if not own[0].shape[0]:
        return fetched
    return tensors if fetched[0].shape[0] else own


def own_and_fetched(made: list[Any]) -> list[Any]:
    """What was made of each tensor of `with_rows`, for all four: of two twice."""
    return (made * 2)[:4]


def sources_of(tensors: list[Tensor]) -> Sources:
    """k_own, v_own, k_fetched and v_fetched with the strides of `with_int32_blocks`."""
    return Sources(*map(head_rows, tensors))


def tiles_of(tensors: list[Tensor], tile: WalkTile) -> Tiles:
    """Of k_own, v_own, k_fetched and v_fetched, a tile being the keys of `tile` of one head.

    All None where pointers are to be taken: where `tile` says so, and where TMA cannot. It takes
    addresses and strides of whole 16 bytes and int32 offsets, and gives a padded tile the columns
    of the next head.
    """
    keys, own, fetched = tile.keys, tensors[:2], tensors[2:]
    rows = len(own[0]) + len(fetched[0])
    if not tile.tma or not rows or not all(map(_fits_tma, tensors)):
        return Tiles(None, None, None, None)
    if not own[0].shape[0]:
        own = fetched  # All blocks are fetched; a descriptor of nothing cannot be made.
    k_own, v_own = (_descriptor(x, keys) for x in own)
    if not fetched[0].shape[0]:
        return Tiles(k_own, v_own, None, None)
    return Tiles(k_own, v_own, *(_descriptor(x, keys) for x in fetched))


def _columns(x: Tensor) -> int:
    """Of x [rows, G, D] as a matrix whose row has all heads, each from its stride on."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _fits_tma(x: Tensor) -> bool:
    step = x.stride(0) * x.element_size()
    aligned = x.data_ptr() % 16 == 0 and step > 0 and step % 16 == 0
    return aligned and padded(x.shape[2]) == x.shape[2] and max(len(x), _columns(x)) < 1 << 31


def _descriptor(x: Tensor, keys: int) -> TensorDescriptor:
    shape, strides = (x.shape[0], _columns(x)), (x.stride(0), 1)
    made: TensorDescriptor = descriptor(x, shape, strides, (keys, x.shape[2]))
    return made


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
def _load_tile_of(own, fetched, own_rows, fetched_rows, row, first, num_own, i_g):
    """The tile from `first` on in the block that starts at `row`, by TMA."""
    tile, start = own, row
    column = i_g * own_rows.stride_head
    if fetched is not None:  # noqa: SIM102 (known when this is compiled)
        if row >= num_own:
            tile = fetched
            start = row - num_own
            column = i_g * fetched_rows.stride_head
    return tile.load([start.to(tl.int32) + first, column.to(tl.int32)])


@triton.jit
def load_whole(row, first, tiles, sources, num_own, i_g, C: tl.constexpr):
    """BN keys of a whole block from `first` on, and their values: [BN, PDK] and [BN, PDV].

    row: where the block starts; sources: of KV head i_g.
    """
    if tiles.k_own is not None:
        b_k = _load_tile_of(
            tiles.k_own, tiles.k_fetched, sources.k_own, sources.k_fetched, row, first, num_own, i_g
        )
        b_v = _load_tile_of(
            tiles.v_own, tiles.v_fetched, sources.v_own, sources.v_fetched, row, first, num_own, i_g
        )
    else:
        b_k, b_v = load_block(block_at(row, sources, num_own), first, C.BLOCK, False, C)
    return b_k, b_v


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

"""Products of compression blocks with a matrix: the `mlp` and `linear` kinds, and their gradients.

Blocks are read where they stand: row (block, head) of the left matrix is the block's l rows of x
one after another, I = l*D long, gathered tile by tile and never stored. The position embedding e
adds the same to every block, W vec(e), so it enters as a bias. A row's sum runs over I in tiles of
a size given by widths and dtype, so its bits depend on that block alone.

The gradient of a row of x is a product too, with one term for each block that contains the row:
rows are taken by the block that starts last before them, so that a tile of rows at the same offset
from their blocks meets one slice of the matrix at a time. Nothing is added atomically.

Letters: C blocks, G heads, P sets of weights (G or 1), l rows of a block, D width, I = l*D inputs
(K in kernels) and O outputs of the product, E rows of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.compression.blocks_of_rows import BlocksOfRows
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.arithmetic import PIECE, add_dot, precision, zeros
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import MOST_REGISTERS, ProductTile, cdiv, product_tile

PLAIN, SILU, SILU_BACKWARD = 0, 1, 2
# Programs that share a gradient of weights out: enough to fill a GPU.
PROGRAMS = 512


class Constants(NamedTuple):
    """What a kernel is compiled for.

    G heads; L rows of a block with D channels; O columns of the product; PER_HEAD: whether each
    head has a matrix of its own. Tiles have BM rows, BN columns and depth BK. PRECISION: of dots.
    PIECE: tiles of one running sum.
    """

    G: int
    L: int
    D: int
    O: int
    PER_HEAD: bool
    BM: int
    BN: int
    BK: int
    PRECISION: str
    PIECE: int


@triton.jit
def _block_and_head(o_m, i_p, C: tl.constexpr):
    """Rows of a tile: all heads of a block after another, or blocks of the one head i_p."""
    if C.PER_HEAD:
        return o_m, o_m * 0 + i_p
    else:
        return o_m // C.G, o_m % C.G


@triton.jit
def _multiply_blocks(b_acc, p_x, p_w, m_m, m_n, begin, end, stride_row, C: tl.constexpr):
    """Add the tiles [begin, end) of K of x W^T; p_x [BM], p_w [BN] point at the rows."""
    K: tl.constexpr = C.L * C.D
    for i_k in tl.range(begin, end):
        o_k = i_k * C.BK + tl.arange(0, C.BK)
        m_x, m_w = m_m[:, None], m_n[:, None]
        if K % C.BK != 0:
            m_x = m_x & (o_k < K)[None, :]
            m_w = m_w & (o_k < K)[None, :]
        o_x = (o_k // C.D).to(tl.int64) * stride_row + o_k % C.D
        b_x = tl.load(p_x[:, None] + o_x[None, :], mask=m_x, other=0.0)  # [BM, BK]
        b_w = tl.load(p_w[:, None] + o_k[None, :], mask=m_w, other=0.0)  # [BN, BK]
        b_acc = add_dot(b_acc, b_x, tl.trans(b_w), C)  # [BM, BN]
    return b_acc


@triton.jit(do_not_specialize=["num_rows"])
def _project_kernel(
    x,
    block_rows,
    w,
    bias,
    out,
    dout,
    dh,
    num_rows,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    C: tl.constexpr,
):
    """h = x W^T + bias and out = h or silu(h); in the backward also dh = silu'(h) dout."""
    K: tl.constexpr = C.L * C.D
    num_n: tl.constexpr = (C.O + C.BN - 1) // C.BN
    i_p = tl.program_id(1)
    i_m, i_n = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    o_m = i_m.to(tl.int64) * C.BM + tl.arange(0, C.BM)
    m_m = o_m < num_rows
    block, head = _block_and_head(o_m, i_p, C)
    first = tl.load(block_rows + block, mask=m_m, other=0)  # [BM]
    o_n = i_n * C.BN + tl.arange(0, C.BN)
    m_n = o_n < C.O
    p_x = x.p + first * x.stride_row + head * x.stride_head
    p_w = w + (i_p.to(tl.int64) * C.O + o_n) * K

    num_k: tl.constexpr = (K + C.BK - 1) // C.BK
    b_h = zeros(C.BM, C.BN)
    if num_k > C.PIECE:
        for i_k in tl.range(0, num_k, C.PIECE):
            b_h += _multiply_blocks(
                zeros(C.BM, C.BN), p_x, p_w, m_m, m_n,
                i_k, tl.minimum(i_k + C.PIECE, num_k), x.stride_row, C,
            )  # fmt: skip
    else:
        b_h = _multiply_blocks(b_h, p_x, p_w, m_m, m_n, 0, num_k, x.stride_row, C)
    if HAS_BIAS:
        b_h += tl.load(bias + i_p * C.O + o_n, mask=m_n, other=0.0)[None, :]  # [1, BN]

    row = block * C.G + head
    o_out = row[:, None] * C.O + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if ACTIVATION == 0:
        tl.store(out + o_out, b_h.to(out.dtype.element_ty), mask=m_out)
    else:
        b_gate = tl.sigmoid(b_h)
        tl.store(out + o_out, (b_h * b_gate).to(out.dtype.element_ty), mask=m_out)
        if ACTIVATION == 2:
            b_dout = tl.load(dout + o_out, mask=m_out, other=0.0)  # [BM, BN]
            b_dh = b_dout * (b_gate + b_gate * b_h * (1.0 - b_gate))
            tl.store(dh + o_out, b_dh.to(dh.dtype.element_ty), mask=m_out)


@triton.jit
def _add_blocks(
    b_dx, dh, p_w, block_at, row, head, m_m, m_n, i_r, step, begin, end, C: tl.constexpr
):
    """Add the tiles [begin, end) of O of the blocks that start i_r, i_r + step, ... rows before."""
    num_tiles: tl.constexpr = (C.O + C.BK - 1) // C.BK
    for i_tile in tl.range(begin, end):
        r = i_r + i_tile // num_tiles * step
        m_at = m_m & (row >= r)
        at = tl.load(block_at + (row - r), mask=m_at, other=-1)  # [BM]
        m_at = at >= 0
        o_k = i_tile % num_tiles * C.BK + tl.arange(0, C.BK)
        m_dh, m_w = m_at[:, None], m_n[None, :]
        if C.O % C.BK != 0:
            m_dh = m_dh & (o_k < C.O)[None, :]
            m_w = m_w & (o_k < C.O)[:, None]
        p_dh = dh + (at.to(tl.int64) * C.G + head) * C.O
        b_dh = tl.load(p_dh[:, None] + o_k[None, :], mask=m_dh, other=0.0)  # [BM, BK]
        b_w = tl.load(p_w[None, :] + (o_k * (C.L * C.D) + r * C.D)[:, None], mask=m_w, other=0.0)
        b_dx = add_dot(b_dx, b_dh, b_w, C)  # [BM, BN] from b_w [BK, BN]
    return b_dx


@triton.jit(do_not_specialize=["num_rows"])
def _project_row_gradient_kernel(dh, w, dx, blocks, num_rows, C: tl.constexpr):
    """dx of the rows i_r after the starts of a tile of blocks, where no later block starts."""
    num_n: tl.constexpr = (C.D + C.BN - 1) // C.BN
    i_p = tl.program_id(1)
    i = tl.program_id(0)
    i_n, i_r = i % num_n, i // num_n % C.L
    o_m = (i // (num_n * C.L)).to(tl.int64) * C.BM + tl.arange(0, C.BM)
    block, head = _block_and_head(o_m, i_p, C)
    m_m = o_m < num_rows
    m_m = i_r < tl.load(blocks.owned + block, mask=m_m, other=0)
    row = tl.load(blocks.starts + block, mask=m_m, other=0) + i_r
    o_n = i_n * C.BN + tl.arange(0, C.BN)
    m_n = o_n < C.D
    p_w = w + i_p.to(tl.int64) * C.O * C.L * C.D + o_n

    # At offsets of the stride or more only the last blocks of a run own rows.
    step = tl.load(blocks.step)
    num_tiles: tl.constexpr = (C.O + C.BK - 1) // C.BK
    end = tl.where(tl.max(m_m.to(tl.int32), 0) > 0, tl.cdiv(C.L - i_r, step) * num_tiles, 0)
    b_dx = zeros(C.BM, C.BN)
    if (C.L + 1) // 2 * num_tiles > C.PIECE:
        for i_tile in tl.range(0, end, C.PIECE):
            b_dx += _add_blocks(
                zeros(C.BM, C.BN), dh, p_w, blocks.block_at, row, head, m_m, m_n, i_r,
                step, i_tile, tl.minimum(i_tile + C.PIECE, end),
                C,
            )  # fmt: skip
    else:
        b_dx = _add_blocks(
            b_dx, dh, p_w, blocks.block_at, row, head, m_m, m_n, i_r, step, 0, end,
            C,
        )  # fmt: skip
    p_dx = dx + ((row * C.G + head) * C.D)[:, None] + o_n[None, :]
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["num_rows", "tiles_a_program"])
def _project_weight_gradient_kernel(
    dh, x, block_rows, dw, num_rows, tiles_a_program, C: tl.constexpr
):
    """dh^T x over a run of tiles of rows, to the program's own sums."""
    K: tl.constexpr = C.L * C.D
    num_n: tl.constexpr = (K + C.BN - 1) // C.BN
    i_p, i_run = tl.program_id(2), tl.program_id(1)
    o_o = tl.program_id(0) // num_n * C.BM + tl.arange(0, C.BM)
    o_n = tl.program_id(0) % num_n * C.BN + tl.arange(0, C.BN)
    m_o, m_n = o_o < C.O, o_n < K
    o_x = (o_n // C.D).to(tl.int64) * x.stride_row + o_n % C.D
    begin = i_run * tiles_a_program
    end = tl.minimum(begin + tiles_a_program, tl.cdiv(num_rows, C.BK))
    b_dw = zeros(C.BM, C.BN)
    for piece in tl.range(begin, end, C.PIECE):
        b_part = zeros(C.BM, C.BN)
        for i_k in tl.range(piece, tl.minimum(piece + C.PIECE, end)):
            o_k = i_k * C.BK + tl.arange(0, C.BK).to(tl.int64)
            m_k = o_k < num_rows
            block, head = _block_and_head(o_k, i_p, C)
            first = tl.load(block_rows + block, mask=m_k, other=0)  # [BK]
            p_dh = dh + (block * C.G + head) * C.O
            b_dh = tl.load(
                p_dh[:, None] + o_o[None, :], mask=m_k[:, None] & m_o[None, :], other=0.0
            )  # [BK, BM]
            p_x = x.p + first * x.stride_row + head * x.stride_head
            b_x = tl.load(
                p_x[:, None] + o_x[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0
            )  # [BK, BN]
            b_part = add_dot(b_part, tl.trans(b_dh), b_x, C)  # [BM, BN]
        b_dw += b_part
    row = (i_run * tl.num_programs(2) + i_p).to(tl.int64) * C.O + o_o
    tl.store(dw + row[:, None] * K + o_n[None, :], b_dw, mask=m_o[:, None] & m_n[None, :])


def _constants(
    x: Tensor, groups: int, block: int, width: int, columns: int, sets: int, tile: ProductTile
) -> Constants:
    return Constants(
        groups, block, width, columns, sets > 1, tile.rows, tile.columns, tile.depth, precision(x),
        PIECE,
    )  # fmt: skip


def project(
    x_EGD: Tensor,
    block_rows_C: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None = None,
    activation: int = PLAIN,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [E, G, D] at blocks [C], weight [P, O, I] in x.dtype, bias float32 [P, O] -> [C, G, O].

    activation: PLAIN or SILU; dtype: of the result, x's if None.
    """
    out_CGO = x_EGD.new_empty(
        block_rows_C.shape[0], x_EGD.shape[1], weight_POI.shape[1], dtype=dtype or x_EGD.dtype
    )
    _project(x_EGD, block_rows_C, weight_POI, bias_PO, activation, out_CGO, out_CGO, out_CGO)
    return out_CGO


def project_backward(
    x_EGD: Tensor, block_rows_C: Tensor, weight_POI: Tensor, bias_PO: Tensor, dout_CGO: Tensor
) -> tuple[Tensor, Tensor]:
    """silu(h) and the gradient of h = x W^T + bias, both [C, G, O] in x.dtype.

    dout: float32 [C, G, O], the gradient of silu(h).
    """
    out_CGO, dh_CGO = (torch.empty_like(dout_CGO, dtype=x_EGD.dtype) for _ in range(2))
    _project(x_EGD, block_rows_C, weight_POI, bias_PO, SILU_BACKWARD, out_CGO, dout_CGO, dh_CGO)
    return out_CGO, dh_CGO


def _project(
    x_EGD: Tensor,
    block_rows_C: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None,
    activation: int,
    out_CGO: Tensor,
    dout_CGO: Tensor,
    dh_CGO: Tensor,
) -> None:
    (_, groups, width), (sets, columns, depth) = x_EGD.shape, weight_POI.shape
    num_rows = out_CGO.shape[0] * groups // sets
    tile = product_tile(x_EGD, columns, depth)
    grid = (cdiv(num_rows, tile.rows) * cdiv(columns, tile.columns), sets)
    if num_rows:
        launcher(_project_kernel, grid)(
            head_rows(x_EGD), block_rows_C, weight_POI, weight_POI if bias_PO is None else bias_PO,
            out_CGO, dout_CGO, dh_CGO, num_rows,
            HAS_BIAS=bias_PO is not None, ACTIVATION=activation,
            C=_constants(x_EGD, groups, depth // width, width, columns, sets, tile),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def project_row_gradient(
    dh_CGO: Tensor, weight_POI: Tensor, block: int, blocks: BlocksOfRows
) -> Tensor:
    """dx [E, G, D] of h = x W^T from dh [C, G, O] and weight [P, O, I]."""
    (count, groups, columns), sets = dh_CGO.shape, weight_POI.shape[0]
    width = weight_POI.shape[2] // block
    dx_EGD = dh_CGO.new_zeros(blocks.latest.shape[0], groups, width)
    num_rows = count * groups // sets
    tile = product_tile(dh_CGO, width, columns)
    if (block + 1) // 2 * cdiv(columns, tile.depth) > PIECE:
        tile = tile._replace(stages=2)  # A sum in pieces leaves no registers for more.
    grid = (cdiv(num_rows, tile.rows) * block * cdiv(width, tile.columns), sets)
    if num_rows:
        launcher(_project_row_gradient_kernel, grid)(
            dh_CGO, weight_POI, dx_EGD, blocks, num_rows,
            C=_constants(dh_CGO, groups, block, width, columns, sets, tile),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx_EGD


def project_weight_gradient(
    dh_CGO: Tensor, x_EGD: Tensor, block_rows_C: Tensor, depth: int, sets: int
) -> Tensor:
    """Float32 dW [P, O, I] of h = x W^T from dh [C, G, O] and x [E, G, D]; depth = I."""
    count, groups, columns = dh_CGO.shape
    num_rows = count * groups // sets
    if not num_rows:
        return torch.zeros(sets, columns, depth, dtype=torch.float32, device=x_EGD.device)
    tile = product_tile(x_EGD, depth, 64, columns)
    tiles = cdiv(columns, tile.rows) * cdiv(depth, tile.columns)
    num_tiles = cdiv(num_rows, tile.depth)
    runs = max(1, min(PROGRAMS // (tiles * sets), cdiv(num_tiles, 8)))
    tiles_a_program = cdiv(num_tiles, runs)
    runs = cdiv(num_tiles, tiles_a_program)
    sums = torch.empty(runs, sets, columns, depth, dtype=torch.float32, device=x_EGD.device)
    width = x_EGD.shape[2]
    launcher(_project_weight_gradient_kernel, (tiles, runs, sets))(
        dh_CGO, head_rows(x_EGD), block_rows_C, sums, num_rows, tiles_a_program,
        C=_constants(x_EGD, groups, depth // width, width, columns, sets, tile),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return sums.sum(dim=0)

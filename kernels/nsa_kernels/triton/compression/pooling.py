"""Weighted means over the rows of compression blocks: `mean`, `conv1d`, `attention_pool`.

A program takes the [l, D] rows of one block and head, read where they stand. The position embedding
of `conv1d` adds the same to every block and that of `attention_pool` the same to every block's
logits, so both enter as a bias. The gradient of a row of x is gathered from the blocks that contain
it, latest first: every sum has one owner, and nothing is added atomically.

Letters: C blocks, G heads, P sets of weights (G or 1), l rows of a block, D width, E rows of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.compression.blocks_of_rows import BlocksOfRows
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.arithmetic import PIECE, filled, zeros
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import (
    MOST_REGISTERS,
    cdiv,
    padded,
    pooling_warps,
    power_of_two,
    rows_of_tile,
)

MEAN, CONV1D, ATTENTION_POOL, COPY = 0, 1, 2, 3
# Programs that share a gradient of weights out, for each head.
RUNS = 64


class Constants(NamedTuple):
    """What a kernel is compiled for.

    G heads; L rows of a block, padded to PL; D channels, padded to PD; PER_HEAD: whether each head
    has weights of its own; KIND: MEAN, CONV1D, ATTENTION_POOL or COPY.
    """

    G: int
    L: int
    D: int
    PER_HEAD: bool
    KIND: int
    PL: int
    PD: int


def _constants(groups: int, block: int, width: int, kind: int, sets: int) -> Constants:
    return Constants(groups, block, width, sets > 1, kind, power_of_two(block), padded(width))


@triton.jit
def _block_tile(x, block_rows, i_c, i_g, o_l, o_d, mask):
    """Rows of block i_c and head i_g in float32, [PL, PD]."""
    row = tl.load(block_rows + i_c) + o_l
    o_row = row * x.stride_row + i_g.to(tl.int64) * x.stride_head
    return tl.load(x.p + o_row[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _shares(b_x, b_u, b_bias):
    """softmax over the rows [PL] of x u + bias; the bias of rows that are none is -inf."""
    b_logits = tl.sum(b_x * b_u[None, :], 1) + b_bias  # [PL]
    b_p = tl.exp(b_logits - tl.max(b_logits, 0))
    return b_p / tl.sum(b_p, 0)


@triton.jit
def _pool_kernel(x, block_rows, w, bias, out, C: tl.constexpr):
    i_c, i_g = tl.program_id(0).to(tl.int64) // C.G, tl.program_id(0) % C.G
    i_p = i_g if C.PER_HEAD else 0
    o_l, o_d = tl.arange(0, C.PL), tl.arange(0, C.PD)
    mask = (o_l < C.L)[:, None] & (o_d < C.D)[None, :]
    b_x = _block_tile(x, block_rows, i_c, i_g, o_l, o_d, mask)  # [PL, PD]
    i_out = i_c * C.G + i_g
    if C.KIND == 3:
        p_out = out + i_out * (C.L * C.D) + o_l[:, None] * C.D + o_d[None, :]
        tl.store(p_out, b_x.to(out.dtype.element_ty), mask=mask)
    else:
        if C.KIND == 0:
            b_out = tl.sum(b_x, 0) / C.L  # [PD]
        elif C.KIND == 1:
            p_w = w + i_p * (C.L * C.D) + o_l[:, None] * C.D + o_d[None, :]
            b_out = tl.sum(b_x * tl.load(p_w, mask=mask, other=0.0), 0)  # [PD]
            b_out += tl.load(bias + i_p * C.D + o_d, mask=o_d < C.D, other=0.0)
        else:
            b_u = tl.load(w + i_p * C.D + o_d, mask=o_d < C.D, other=0.0)  # [PD]
            b_bias = tl.load(bias + i_p * C.L + o_l, mask=o_l < C.L, other=-float("inf"))
            b_out = tl.sum(b_x * _shares(b_x, b_u, b_bias)[:, None], 0)  # [PD]
        tl.store(out + i_out * C.D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < C.D)


@triton.jit(do_not_specialize=["num_blocks", "blocks_a_program"])
def _conv1d_weight_kernel(
    x,
    block_rows,
    do,
    dw,
    num_blocks,
    blocks_a_program,
    PIECE_BLOCKS: tl.constexpr,
    C: tl.constexpr,
):
    """Sum of do x over a run of blocks, to the program's own [l, D]."""
    i_run, i_g = tl.program_id(0), tl.program_id(1)
    o_l, o_d = tl.arange(0, C.PL), tl.arange(0, C.PD)
    mask = (o_l < C.L)[:, None] & (o_d < C.D)[None, :]
    begin = i_run * blocks_a_program
    end = tl.minimum(begin + blocks_a_program, num_blocks)
    b_dw = zeros(C.PL, C.PD)
    for piece in tl.range(begin, end, PIECE_BLOCKS):
        b_part = zeros(C.PL, C.PD)
        for i_c in tl.range(piece, tl.minimum(piece + PIECE_BLOCKS, end)):
            b_x = _block_tile(x, block_rows, i_c, i_g, o_l, o_d, mask)  # [PL, PD]
            p_do = do + (i_c * C.G + i_g.to(tl.int64)) * C.D + o_d
            b_part += b_x * tl.load(p_do, mask=o_d < C.D, other=0.0).to(tl.float32)[None, :]
        b_dw += b_part
    p_dw = dw + (i_run * C.G + i_g) * (C.L * C.D) + o_l[:, None] * C.D + o_d[None, :]
    tl.store(p_dw, b_dw, mask=mask)


@triton.jit(do_not_specialize=["num_blocks", "blocks_a_program"])
def _attention_pool_backward_kernel(
    x,
    block_rows,
    w,
    bias,
    do,
    shares,
    dlogits,
    du,
    num_blocks,
    blocks_a_program,
    PIECE_BLOCKS: tl.constexpr,
    C: tl.constexpr,
):
    """Shares a and the logits' gradients a (do x - sum a do x) of a run of blocks, both [l].

    And the run's sum of their products with x, to the program's own [D].
    """
    i_run, i_g = tl.program_id(0), tl.program_id(1)
    i_p = i_g if C.PER_HEAD else 0
    o_l, o_d = tl.arange(0, C.PL), tl.arange(0, C.PD)
    mask = (o_l < C.L)[:, None] & (o_d < C.D)[None, :]
    b_u = tl.load(w + i_p * C.D + o_d, mask=o_d < C.D, other=0.0)  # [PD]
    b_bias = tl.load(bias + i_p * C.L + o_l, mask=o_l < C.L, other=-float("inf"))
    begin = i_run * blocks_a_program
    end = tl.minimum(begin + blocks_a_program, num_blocks)
    b_du = filled(C.PD, 0.0)
    for piece in tl.range(begin, end, PIECE_BLOCKS):
        b_part = filled(C.PD, 0.0)
        for i_c in tl.range(piece, tl.minimum(piece + PIECE_BLOCKS, end)):
            b_x = _block_tile(x, block_rows, i_c, i_g, o_l, o_d, mask)  # [PL, PD]
            i_row = i_c * C.G + i_g.to(tl.int64)
            b_do = tl.load(do + i_row * C.D + o_d, mask=o_d < C.D, other=0.0).to(tl.float32)
            b_a = _shares(b_x, b_u, b_bias)  # [PL]
            b_da = tl.sum(b_x * b_do[None, :], 1)  # [PL]
            b_dl = b_a * (b_da - tl.sum(b_a * b_da, 0))
            tl.store(shares + i_row * C.L + o_l, b_a, mask=o_l < C.L)
            tl.store(dlogits + i_row * C.L + o_l, b_dl, mask=o_l < C.L)
            b_part += tl.sum(b_x * b_dl[:, None], 0)  # [PD]
        b_du += b_part
    tl.store(du + (i_run * C.G + i_g) * C.D + o_d, b_du, mask=o_d < C.D)


@triton.jit(do_not_specialize=["num_rows"])
def _pool_row_gradient_kernel(
    do, w, shares, dlogits, dx, blocks, num_rows, BM: tl.constexpr, C: tl.constexpr
):
    """dx of a tile of rows, from each block that contains them."""
    i_g = tl.program_id(1)
    i_p = i_g if C.PER_HEAD else 0
    o_e = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, C.PD)
    m_e, m_d = o_e < num_rows, (o_d < C.D)[None, :]
    latest_at = tl.load(blocks.latest + o_e, mask=m_e, other=-1)
    if C.KIND == 2:
        b_u = tl.load(w + i_p * C.D + o_d, mask=o_d < C.D, other=0.0)[None, :]
    b_dx = zeros(BM, C.PD)
    for before in tl.range(0, tl.cdiv(C.L, tl.load(blocks.step))):
        at = latest_at - before
        m_first = at >= 0
        i_c = tl.load(blocks.order + at, mask=m_first, other=0)  # [BM]
        r = (o_e - tl.load(blocks.starts + at, mask=m_first, other=0)).to(tl.int32)
        m_at = m_first & (r < C.L)
        row = i_c * C.G + i_g
        mask = m_at[:, None] & m_d
        if C.KIND == 3:
            p_do = do + (row * C.L + r)[:, None] * C.D + o_d[None, :]
            b_dx += tl.load(p_do, mask=mask, other=0.0).to(tl.float32)  # [BM, PD]
        else:
            p_do = do + row[:, None] * C.D + o_d[None, :]
            b_do = tl.load(p_do, mask=mask, other=0.0).to(tl.float32)  # [BM, PD]
            if C.KIND == 0:
                b_dx += b_do / C.L
            elif C.KIND == 1:
                p_w = w + (i_p * C.L + r)[:, None] * C.D + o_d[None, :]
                b_dx += b_do * tl.load(p_w, mask=mask, other=0.0)  # [BM, PD]
            else:
                b_a = tl.load(shares + row * C.L + r, mask=m_at, other=0.0)[:, None]
                b_dl = tl.load(dlogits + row * C.L + r, mask=m_at, other=0.0)[:, None]
                b_dx += b_a * b_do + b_dl * b_u  # [BM, 1] times [BM, PD], and times [1, PD]
    p_dx = dx + (o_e * C.G + i_g)[:, None] * C.D + o_d[None, :]
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_e[:, None] & m_d)


def pool(
    x_EGD: Tensor,
    block_rows_C: Tensor,
    block: int,
    kind: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [E, G, D] at blocks [C] -> [C, G, D]; for COPY the blocks themselves, [C, G, l, D].

    Float32: CONV1D weight [P, l, D], bias [P, D]; ATTENTION_POOL weight [P, D], bias [P, l].
    """
    count, (_, groups, width) = block_rows_C.shape[0], x_EGD.shape
    rows = (block,) if kind == COPY else ()
    out = x_EGD.new_empty(count, groups, *rows, width)
    if count:
        sets = 1 if weight is None else weight.shape[0]
        launcher(_pool_kernel, (count * groups,))(
            head_rows(x_EGD), block_rows_C, x_EGD if weight is None else weight,
            x_EGD if bias is None else bias, out, C=_constants(groups, block, width, kind, sets),
            num_warps=pooling_warps(block, width), maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    return out


def _runs(count: int) -> tuple[int, int]:
    """Programs that share the blocks out, and blocks for each."""
    blocks = cdiv(count, RUNS)
    return cdiv(count, blocks), blocks


def _sum(sums: Tensor, sets: int) -> Tensor:
    """Over programs [runs, G, ...], and over heads that share weights: [P, ...]."""
    return sums.sum(dim=0) if sets > 1 else sums.sum(dim=(0, 1)).unsqueeze(0)


def conv1d_weight_gradient(
    do_CGD: Tensor, x_EGD: Tensor, block_rows_C: Tensor, block: int, sets: int
) -> Tensor:
    """Float32 sum over blocks of do [C, G, D] times their rows -> [P, l, D]."""
    (count, groups, width), (runs, blocks) = do_CGD.shape, _runs(do_CGD.shape[0])
    sums = torch.empty(runs, groups, block, width, dtype=torch.float32, device=x_EGD.device)
    launcher(_conv1d_weight_kernel, (runs, groups))(
        head_rows(x_EGD), block_rows_C, do_CGD, sums, count, blocks, PIECE_BLOCKS=PIECE,
        C=_constants(groups, block, width, CONV1D, 1), num_warps=pooling_warps(block, width),
        maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return _sum(sums, sets)


def attention_pool_backward(
    do_CGD: Tensor, x_EGD: Tensor, block_rows_C: Tensor, query_PD: Tensor, bias_Pl: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares [C, G, l], gradients of the logits [C, G, l], and sum of those times rows [P, D]."""
    (count, groups, width), (runs, blocks) = do_CGD.shape, _runs(do_CGD.shape[0])
    sets, block = bias_Pl.shape
    shares_CGl = torch.empty(count, groups, block, dtype=torch.float32, device=x_EGD.device)
    dlogits_CGl = torch.empty_like(shares_CGl)
    sums = torch.empty(runs, groups, width, dtype=torch.float32, device=x_EGD.device)
    launcher(_attention_pool_backward_kernel, (runs, groups))(
        head_rows(x_EGD), block_rows_C, query_PD, bias_Pl, do_CGD, shares_CGl, dlogits_CGl, sums,
        count, blocks, PIECE_BLOCKS=PIECE, C=_constants(groups, block, width, ATTENTION_POOL, sets),
        num_warps=pooling_warps(block, width), maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return shares_CGl, dlogits_CGl, _sum(sums, sets)


def pool_row_gradient(
    do: Tensor,
    block: int,
    kind: int,
    blocks: BlocksOfRows,
    weight: Tensor | None = None,
    shares_CGl: Tensor | None = None,
    dlogits_CGl: Tensor | None = None,
) -> Tensor:
    """dx [E, G, D] from do [C, G, D], for COPY [C, G, l, D]; the rest as `pool` takes it."""
    groups, width, num_rows = do.shape[1], do.shape[-1], blocks.latest.shape[0]
    dx_EGD = do.new_empty(num_rows, groups, width)
    size = rows_of_tile(width)
    if dx_EGD.numel():
        sets = 1 if weight is None else weight.shape[0]
        launcher(_pool_row_gradient_kernel, (cdiv(num_rows, size), groups))(
            do, do if weight is None else weight, do if shares_CGl is None else shares_CGl,
            do if dlogits_CGl is None else dlogits_CGl, dx_EGD, blocks, num_rows, BM=size,
            C=_constants(groups, block, width, kind, sets), num_warps=4, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    return dx_EGD

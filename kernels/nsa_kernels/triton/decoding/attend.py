"""Selected and window attention of few queries in one kernel, and the sum of all branches.

A program takes the R heads of one query and KV head, and ENTRIES of its chosen blocks or PART keys
of its window: enough programs for a GPU at batch size 1. Parts begin at fixed places, so that a
query's bits do not depend on the other queries of a call. The last kernel merges the parts of each
branch and adds the branches by their gates, in float32, rounded once.

Letters: N queries, H query heads, G KV heads, b branches, B selection blocks, n chosen blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.combine import Gates
from nsa_kernels.triton.decoding.constants import (
    Constants,
    Partial,
    attend_tile,
    load_query,
    num_visible,
    store_part,
)
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.arithmetic import add_softmax, filled, zeros
from nsa_kernels.triton.shared.shapes import Tile

BRANCHES = ("compressed", "selected", "window")


class KeysAndValues(NamedTuple):
    """Those of a branch, [rows, G, D], as a kernel takes them."""

    k: Any
    v: Any


class Blocks(NamedTuple):
    """selected int32 [N, G, n]; rows int64 [B], where each block starts."""

    selected: Any
    rows: Any


@triton.jit(do_not_specialize=["first_part", "num_parts"])
def _selected_and_window_kernel(
    q, of_selected, blocks, of_window, partial, rows, first_part, num_parts, logit_scale,
    C: tl.constexpr,
):  # fmt: skip
    """A part of the selected branch, or behind these of the window; what a query lacks is empty."""
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_part = tl.program_id(2)
    position = tl.load(rows + i_n * 4).to(tl.int32)
    b_q, head, m_m = load_query(q, i_n, i_g, C)
    b_acc = zeros(C.BM, C.PDV)
    b_max = filled(C.BM, -float("inf"))
    b_sum = filled(C.BM, 0.0)
    o_n = tl.arange(0, C.BN)
    first_id = tl.load(rows + i_n * 4 + 2)
    if i_part < C.PARTS_SELECTED:
        TILES: tl.constexpr = C.SELECT_BLOCK // C.BN
        p_list = blocks.selected + (i_n * C.G + i_g) * C.NUM
        # All eligible blocks are chosen while there are no more than NUM: no other place is empty.
        count = tl.minimum(position // C.SELECT_BLOCK + 1, C.NUM) - i_part * C.ENTRIES
        for i in tl.range(0, tl.minimum(count, C.ENTRIES) * TILES):
            block = tl.load(p_list + i_part * C.ENTRIES + i // TILES)
            row = tl.load(blocks.rows + first_id + block)
            o_key = i % TILES * C.BN + o_n
            m_key = block * C.SELECT_BLOCK + o_key <= position
            b_acc, b_max, b_sum, _ = attend_tile(
                b_acc, b_max, b_sum, b_q, of_selected.k, of_selected.v, i_g, row + o_key, m_key,
                logit_scale, C,
            )  # fmt: skip
    else:
        oldest = tl.maximum(position - C.WINDOW + 1, 0)
        part = oldest // C.PART + i_part - C.PARTS_SELECTED
        begin = tl.maximum(part * C.PART, oldest // C.BN * C.BN)
        end = tl.minimum((part + 1) * C.PART, position + 1)
        for first in tl.range(begin, end, C.BN):
            o_key = first + o_n
            m_key = (o_key >= oldest) & (o_key <= position)
            # A tile lies in one block.
            row = tl.load(blocks.rows + first_id + first // C.SELECT_BLOCK)
            o_row = row + first % C.SELECT_BLOCK + o_n
            b_acc, b_max, b_sum, _ = attend_tile(
                b_acc, b_max, b_sum, b_q, of_window.k, of_window.v, i_g, o_row, m_key,
                logit_scale, C,
            )  # fmt: skip
    store_part(partial, i_n, first_part + i_part, head, m_m, num_parts, b_acc, b_max, b_sum, C)


@triton.jit
def _branch(partial, o_head, m_m, begin, end, num_parts, C: tl.constexpr):
    """The attention [BM, PDV] over the parts [begin, end), which are added in pieces."""
    b_acc = zeros(C.BM, C.PDV)
    b_max = filled(C.BM, -float("inf"))
    b_sum = filled(C.BM, 0.0)
    o_d = tl.arange(0, C.PDV)
    mask = m_m[:, None] & (o_d < C.DV)[None, :]
    for piece in tl.range(begin, end, C.PIECE):
        b_a = zeros(C.BM, C.PDV)
        b_m = filled(C.BM, -float("inf"))
        b_l = filled(C.BM, 0.0)
        for i in tl.range(piece, tl.minimum(piece + C.PIECE, end)):
            o_part = o_head * num_parts + i
            b_part = tl.load(
                partial.acc + o_part[:, None] * C.DV + o_d[None, :], mask=mask, other=0.0
            )
            b_pm = tl.load(partial.maxima + o_part, mask=m_m, other=-float("inf"))
            b_pl = tl.load(partial.sums + o_part, mask=m_m, other=0.0)
            b_a, b_m, b_l = add_softmax(b_a, b_m, b_l, b_part, b_pm, b_pl, C)
        b_acc, b_max, b_sum = add_softmax(b_acc, b_max, b_sum, b_a, b_m, b_l, C)
    return b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]  # 0 where nothing was seen


@triton.jit
def _gated(b_out, b_o, gates, o_gate, m_m, BRANCH: tl.constexpr):
    """b_out + the branch's gate times b_o."""
    b_g = tl.load(gates.p + o_gate + BRANCH * gates.stride_branch, mask=m_m, other=0.0)
    return tl.fma(b_o, tl.broadcast_to(b_g.to(tl.float32)[:, None], b_o.shape), b_out)


@triton.jit(do_not_specialize=["splits", "num_parts"])
def _merge_kernel(
    partial, gates, out, rows, splits, num_parts, COMPRESSED: tl.constexpr,
    SELECTED: tl.constexpr, WINDOW: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gated sum of the branches for the heads of one query and KV head.

    COMPRESSED, SELECTED, WINDOW: which gate is the branch's; -1 for a branch that is not used.
    """
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, C.BM)
    m_m, head = o_m < C.R, i_g * C.R + o_m
    o_head = i_n * (C.G * C.R) + head
    o_gate = i_n * gates.stride_row + head * gates.stride_head
    b_out = zeros(C.BM, C.PDV)
    if COMPRESSED >= 0:
        seen = num_visible(tl.load(rows + i_n * 4).to(tl.int32), C)
        b_o = _branch(partial, o_head, m_m, 0, tl.cdiv(seen, C.SPLIT), num_parts, C)
        b_out = _gated(b_out, b_o, gates, o_gate, m_m, COMPRESSED)
    if SELECTED >= 0:
        b_o = _branch(partial, o_head, m_m, splits, splits + C.PARTS_SELECTED, num_parts, C)
        b_out = _gated(b_out, b_o, gates, o_gate, m_m, SELECTED)
    if WINDOW >= 0:
        begin = splits + C.PARTS_SELECTED
        b_o = _branch(partial, o_head, m_m, begin, begin + C.PARTS_WINDOW, num_parts, C)
        b_out = _gated(b_out, b_o, gates, o_gate, m_m, WINDOW)
    o_d = tl.arange(0, C.PDV)
    p_out = out + o_head[:, None] * C.DV + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & (o_d < C.DV)[None, :])


def attend_selected_and_window(
    q_NHD: Tensor,
    selected: tuple[Tensor, Tensor],
    blocks_NGn: Tensor,
    block_rows_B: Tensor,
    window: tuple[Tensor, Tensor],
    partial: Partial,
    rows_N4: Tensor,
    splits: int,
    logit_scale: float,
    tile: Tile,
    C: Constants,
) -> None:
    """Write the parts of `partial` behind its `splits` of compressed keys."""
    parts = C.PARTS_SELECTED + C.PARTS_WINDOW
    _selected_and_window_kernel[(q_NHD.shape[0], C.G, parts)](
        head_rows(q_NHD), KeysAndValues(*map(head_rows, selected)),
        Blocks(blocks_NGn, block_rows_B),
        KeysAndValues(*map(head_rows, window)), partial, rows_N4, splits, splits + parts,
        logit_scale, C=C, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        enable_fp_fusion=False,
    )  # fmt: skip


def add_branches(
    partial: Partial,
    gates_NHb: Tensor,
    branches: tuple[str, ...],
    out_NHD: Tensor,
    rows_N4: Tensor,
    splits: int,
    tile: Tile,
    C: Constants,
) -> None:
    """Write the gated sum of the branches to `out_NHD`."""
    gate = {name: branches.index(name) if name in branches else -1 for name in BRANCHES}
    _merge_kernel[(out_NHD.shape[0], C.G)](
        partial, Gates(gates_NHb, *gates_NHb.stride()), out_NHD, rows_N4, splits,
        splits + C.PARTS_SELECTED + C.PARTS_WINDOW, COMPRESSED=gate["compressed"],
        SELECTED=gate["selected"], WINDOW=gate["window"], C=C, num_warps=4,
        maxnreg=tile.registers, enable_fp_fusion=False,
    )  # fmt: skip

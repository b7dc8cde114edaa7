"""Attention to a band of consecutive keys, which the compressed and window branches are.

Query t of a document sees keys j with j*STRIDE + OFFSET <= t and, with a WINDOW, j > t - WINDOW.
Compressed: STRIDE = d, OFFSET = l - 1, no WINDOW. Window: STRIDE = 1, OFFSET = 0, WINDOW = w.

A program takes BT consecutive tokens of one KV head's R query heads: BM = BT*R rows of one matrix,
so that a tile of keys is loaded once for the whole group. Key tiles start at multiples of BN from
the document's start, whatever the split, and a tile that a row does not see leaves the row's
running maximum, sum and accumulator as they are, bit for bit; so a query's output does not depend
on which queries share its program, nor on where its document was cut. Sums over more than PIECE
tiles are made in pieces, which are then added.

Letters: N local rows, H query heads, G KV heads, R = H/G, Dk and Dv widths, E key rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.band import (
    Band,
    TileKeys,
    constants,
    load_k,
    load_v,
    num_seen,
    sees,
)
from nsa_kernels.triton.shared.arguments import head_rows, last_dim_contiguous, load_head_rows
from nsa_kernels.triton.shared.arithmetic import (
    LN2,
    add_dot,
    add_softmax,
    filled,
    logit_scale,
    power,
    zeros,
)
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import banded_tiles, hopper_forward_tile
from nsa_kernels.triton.shared.tables import load_query_tile, query_tiles


@triton.jit
def _forward_tiles(
    b_acc,
    b_max,
    b_sum,
    b_q,
    b_t,
    keys,
    begin,
    end,
    logit_scale,
    MASKED: tl.constexpr,
    C: tl.constexpr,
):
    """One online-softmax step for each key tile in [begin, end)."""
    for start in tl.range(begin, end, C.BN):
        o_j = start + tl.arange(0, C.BN)
        b_k = load_k(keys, o_j, C)  # [BN, PDK]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=C.PRECISION)  # [BM, BN]
        if MASKED:
            b_s = tl.where(sees(b_t[:, None], o_j[None, :], C), b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * logit_scale)
        # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_scale = power(b_max - b_safe, C)
        # Fused by hand: a tile that is masked for some must round as one that is not.
        b_p = power(tl.fma(b_s, logit_scale, -b_safe[:, None]), C)
        b_sum = tl.fma(b_sum, b_scale, tl.sum(b_p, 1))
        b_v = load_v(keys, o_j, C)  # [BN, PDV]
        b_acc = b_acc * b_scale[:, None]
        b_acc = add_dot(b_acc, b_p.to(b_v.dtype), b_v, C)  # [BM, PDV]
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["num_tiles"])
def _forward_kernel(
    q, k, v, o, lse, tiles, num_tiles, logit_scale, LONG: tl.constexpr, C: tl.constexpr
):
    """o and lse of one tile of queries. LONG: whether sums over its keys are made in pieces."""
    # Late tokens see most: starting with them leaves the short programs for the end.
    i_tile = num_tiles - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    first_row, num_tokens, position, base = load_query_tile(tiles, i_tile)

    o_m = tl.arange(0, C.BM)
    token, head = o_m // C.R, (i_g * C.R + o_m % C.R).to(tl.int64)
    m_m = token < num_tokens
    if C.BT * C.R != C.BM:
        m_m = m_m & (token < C.BT)
    row = first_row + token
    b_t = position + token
    b_q = load_head_rows(q, row, head, m_m, C.DK, C.PDK)  # [BM, PDK]

    last = position + num_tokens - 1
    limit = num_seen(last, C)  # Keys that the last query sees.
    shared = num_seen(position, C) // C.BN * C.BN  # Before: all tiles seen by all.
    # Rows of the buffer before the first key that any query sees may be another document's.
    first = 0
    if C.WINDOW > 0:
        first = tl.maximum(position - C.WINDOW + 1, 0)
    begin = first // C.BN * C.BN
    inner = begin  # From here on no tile begins before a query's window.
    if C.WINDOW > 0:
        inner = tl.cdiv(tl.maximum(last - C.WINDOW + 1, 0), C.BN) * C.BN
        inner = tl.minimum(tl.maximum(inner, begin), tl.cdiv(limit, C.BN) * C.BN)
    shared = tl.maximum(shared, inner)
    p_k = k.p + i_g.to(tl.int64) * k.stride_head
    p_v = v.p + i_g.to(tl.int64) * v.stride_head
    keys = TileKeys(p_k, p_v, k.stride_row, v.stride_row, base, first, limit)

    b_acc = zeros(C.BM, C.PDV)
    b_max = filled(C.BM, -float("inf"))
    b_sum = filled(C.BM, 0.0)
    if LONG:
        span = C.PIECE * C.BN
        for piece in tl.range(begin // span * span, limit, span):
            start = tl.maximum(piece, begin)
            stop = tl.minimum(piece + span, limit)
            low = tl.minimum(tl.maximum(inner, start), tl.cdiv(stop, C.BN) * C.BN)
            high = tl.minimum(tl.maximum(shared, low), tl.cdiv(stop, C.BN) * C.BN)
            high = tl.where(shared >= stop, tl.maximum(low, stop // C.BN * C.BN), high)
            b_a = zeros(C.BM, C.PDV)
            b_m = filled(C.BM, -float("inf"))
            b_l = filled(C.BM, 0.0)
            if C.WINDOW > 0:
                b_a, b_m, b_l = _forward_tiles(
                    b_a, b_m, b_l, b_q, b_t, keys, start, low, logit_scale, True, C
                )
            b_a, b_m, b_l = _forward_tiles(
                b_a, b_m, b_l, b_q, b_t, keys, low, high, logit_scale, False, C
            )
            b_a, b_m, b_l = _forward_tiles(
                b_a, b_m, b_l, b_q, b_t, keys, high, stop, logit_scale, True, C
            )
            b_acc, b_max, b_sum = add_softmax(b_acc, b_max, b_sum, b_a, b_m, b_l, C)
    else:
        if C.WINDOW > 0:
            b_acc, b_max, b_sum = _forward_tiles(
                b_acc, b_max, b_sum, b_q, b_t, keys, begin, inner, logit_scale, True, C
            )
        b_acc, b_max, b_sum = _forward_tiles(
            b_acc, b_max, b_sum, b_q, b_t, keys, inner, shared, logit_scale, False, C
        )
        b_acc, b_max, b_sum = _forward_tiles(
            b_acc, b_max, b_sum, b_q, b_t, keys, shared, limit, logit_scale, True, C
        )

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # With nothing seen the maximum is -inf.
    b_o = b_acc / b_sum[:, None]
    if C.PRECISION == "ieee":
        b_lse = b_max + tl.log(b_sum)
    else:
        b_lse = (b_max + tl.log2(b_sum)) * LN2
    o_dv = tl.arange(0, C.PDV)
    row_head = row * (C.G * C.R) + head
    p_o = o + row_head[:, None] * C.DV + o_dv[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & (o_dv < C.DV)[None, :])
    tl.store(lse + row_head, b_lse, mask=m_m)


def banded_forward(
    q_NHD: Tensor, k_EGD: Tensor, v_EGD: Tensor, segments: QuerySegments, band: Band, scale: float
) -> tuple[Tensor, Tensor]:
    """o [N, H, Dv] and lse [N, H] of q [N, H, Dk], k [E, G, Dk] and v [E, G, Dv]."""
    o_NHD, lse_NH = empty_outputs(q_NHD, v_EGD)
    if (hopper_tile := hopper_forward_tile(q_NHD, v_EGD)) is not None:
        from nsa_kernels.triton.banded.hopper_forward import hopper_forward

        if q_NHD.shape[0]:
            hopper_forward(q_NHD, k_EGD, v_EGD, o_NHD, lse_NH, segments, band, scale, hopper_tile)
        return o_NHD, lse_NH
    q_NHD, k_EGD, v_EGD = (last_dim_contiguous(x) for x in (q_NHD, k_EGD, v_EGD))
    tile = banded_tiles(q_NHD, v_EGD).forward
    C = constants(q_NHD, v_EGD, band, tile)
    tiles = query_tiles(segments, C.BT, band.column)
    most_keys = band.window + C.BT if band.window else band.most_keys(tiles.last)
    long = most_keys > (C.PIECE - 1) * C.BN
    if q_NHD.shape[0]:
        launcher(_forward_kernel, (len(tiles.host), C.G))(
            head_rows(q_NHD),
            head_rows(k_EGD),
            head_rows(v_EGD),
            o_NHD,
            lse_NH,
            tiles.table,
            len(tiles.host),
            logit_scale(q_NHD, scale),
            LONG=long,
            C=C,
            num_warps=tile.warps,
            # Sums of pieces beside two bounds leave registers for one tile in flight less.
            num_stages=tile.stages - 1 if long and band.window else tile.stages,
            maxnreg=tile.registers,
            enable_fp_fusion=False,
        )
    return o_NHD, lse_NH


def empty_outputs(q_NHD: Tensor, v_EGD: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse, not yet written."""
    o_NHD = q_NHD.new_empty(*q_NHD.shape[:2], v_EGD.shape[-1])
    return o_NHD, q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)

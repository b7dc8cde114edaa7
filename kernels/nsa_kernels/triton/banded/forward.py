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
from nsa_kernels.triton.banded.band import Band, load_rows, num_seen, sees
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.arithmetic import PIECE, add_dot, logit_scale, power, precision
from nsa_kernels.triton.shared.shapes import banded_tiles, padded
from nsa_kernels.triton.shared.tables import query_tiles


@triton.jit
def _forward_tiles(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_k,
    p_v,
    b_t,
    base,
    begin,
    end,
    first,
    limit,
    stride_kt,
    stride_vt,
    logit_scale,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One online-softmax step for each key tile in [begin, end)."""
    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    for start in tl.range(begin, end, BN):
        o_j = start + tl.arange(0, BN)
        m_j = (o_j >= first) & (o_j < limit)
        row = base + o_j.to(tl.int64)
        b_k = load_rows(p_k, row * stride_kt, o_dk, m_j, DK, PDK)  # [BN, PDK]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if MASKED:
            b_s = tl.where(
                sees(b_t[:, None], o_j[None, :], OFFSET, STRIDE, WINDOW), b_s, -float("inf")
            )
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * logit_scale)
        # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_scale = power(b_max - b_safe, PRECISION)
        # Fused by hand: a tile that is masked for some must round as one that is not.
        b_p = power(tl.fma(b_s, logit_scale, -b_safe[:, None]), PRECISION)
        b_sum = tl.fma(b_sum, b_scale, tl.sum(b_p, 1))
        b_v = load_rows(p_v, row * stride_vt, o_dv, m_j, DV, PDV)  # [BN, PDV]
        b_acc = b_acc * b_scale[:, None]
        b_acc = add_dot(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["num_tiles"])
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    tiles,
    num_tiles,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    logit_scale,
    H: tl.constexpr,
    R: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    LONG: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE_TILES: tl.constexpr,
):
    # Late tokens see most: starting with them leaves the short programs for the end.
    i_tile = num_tiles - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    first_row = tl.load(tiles + i_tile * 4)
    num_tokens = tl.load(tiles + i_tile * 4 + 1).to(tl.int32)
    position = tl.load(tiles + i_tile * 4 + 2).to(tl.int32)
    base = tl.load(tiles + i_tile * 4 + 3)

    o_m = tl.arange(0, BM)
    token, head = o_m // R, (i_g * R + o_m % R).to(tl.int64)
    m_m = token < num_tokens
    if BT * R != BM:
        m_m = m_m & (token < BT)
    row = first_row + token
    b_t = position + token
    b_q = load_rows(q, row * stride_qt + head * stride_qh, tl.arange(0, PDK), m_m, DK, PDK)

    last = position + num_tokens - 1
    limit = num_seen(last, OFFSET, STRIDE)  # Keys that the last query sees.
    shared = num_seen(position, OFFSET, STRIDE) // BN * BN  # Before: all tiles seen by all.
    # Rows of the buffer before the first key that any query sees may be another document's.
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    begin = first // BN * BN
    inner = begin  # From here on no tile begins before a query's window.
    if WINDOW > 0:
        inner = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BN) * BN
        inner = tl.minimum(tl.maximum(inner, begin), tl.cdiv(limit, BN) * BN)
    shared = tl.maximum(shared, inner)
    p_k = k + i_g.to(tl.int64) * stride_kh
    p_v = v + i_g.to(tl.int64) * stride_vh

    b_acc = tl.zeros([BM, PDV], dtype=tl.float32)
    b_max = tl.full([BM], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    if LONG:
        span = PIECE_TILES * BN
        for piece in tl.range(begin // span * span, limit, span):
            start = tl.maximum(piece, begin)
            stop = tl.minimum(piece + span, limit)
            low = tl.minimum(tl.maximum(inner, start), tl.cdiv(stop, BN) * BN)
            high = tl.minimum(tl.maximum(shared, low), tl.cdiv(stop, BN) * BN)
            high = tl.where(shared >= stop, tl.maximum(low, stop // BN * BN), high)
            b_a = tl.zeros([BM, PDV], dtype=tl.float32)
            b_m = tl.full([BM], -float("inf"), dtype=tl.float32)
            b_l = tl.zeros([BM], dtype=tl.float32)
            if WINDOW > 0:
                b_a, b_m, b_l = _forward_tiles(
                    b_a, b_m, b_l, b_q, p_k, p_v, b_t, base, start, low, first, limit, stride_kt,
                    stride_vt, logit_scale, OFFSET, STRIDE, WINDOW, True,
                    BN, DK, DV, PDK, PDV, PRECISION,
                )  # fmt: skip
            b_a, b_m, b_l = _forward_tiles(
                b_a, b_m, b_l, b_q, p_k, p_v, b_t, base, low, high, first, limit, stride_kt,
                stride_vt, logit_scale, OFFSET, STRIDE, WINDOW, False,
                BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
            b_a, b_m, b_l = _forward_tiles(
                b_a, b_m, b_l, b_q, p_k, p_v, b_t, base, high, stop, first, limit, stride_kt,
                stride_vt, logit_scale, OFFSET, STRIDE, WINDOW, True,
                BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
            b_new = tl.maximum(b_max, b_m)
            b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_old, b_add = power(b_max - b_safe, PRECISION), power(b_m - b_safe, PRECISION)
            b_acc = tl.fma(b_acc, b_old[:, None], b_a * b_add[:, None])
            b_sum = tl.fma(b_sum, b_old, b_l * b_add)
            b_max = b_new
    else:
        if WINDOW > 0:
            b_acc, b_max, b_sum = _forward_tiles(
                b_acc, b_max, b_sum, b_q, p_k, p_v, b_t, base, begin, inner, first, limit,
                stride_kt, stride_vt, logit_scale, OFFSET, STRIDE, WINDOW, True,
                BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
        b_acc, b_max, b_sum = _forward_tiles(
            b_acc, b_max, b_sum, b_q, p_k, p_v, b_t, base, inner, shared, first, limit,
            stride_kt, stride_vt, logit_scale, OFFSET, STRIDE, WINDOW, False,
            BN, DK, DV, PDK, PDV, PRECISION,
        )  # fmt: skip
        b_acc, b_max, b_sum = _forward_tiles(
            b_acc, b_max, b_sum, b_q, p_k, p_v, b_t, base, shared, limit, first, limit,
            stride_kt, stride_vt, logit_scale, OFFSET, STRIDE, WINDOW, True,
            BN, DK, DV, PDK, PDV, PRECISION,
        )  # fmt: skip

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # With nothing seen the maximum is -inf.
    b_o = b_acc / b_sum[:, None]
    if PRECISION == "ieee":
        b_lse = b_max + tl.log(b_sum)
    else:
        b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    o_dv = tl.arange(0, PDV)
    p_o = o + (row * H + head)[:, None] * DV + o_dv[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & (o_dv < DV)[None, :])
    tl.store(lse + row * H + head, b_lse, mask=m_m)


def banded_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments, band: Band, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    num_rows, heads, dk = q.shape
    groups, dv = k.shape[1], v.shape[-1]
    ratio = heads // groups
    o, lse = empty_outputs(q, v)
    shape = banded_tiles(q, v).forward
    tokens = shape.rows // ratio
    tiles = query_tiles(segments, tokens, band.column)
    keys = band.window + tokens if band.window else band.most_keys(tiles.last)
    long = keys > (PIECE - 1) * shape.keys
    if num_rows:
        _forward_kernel[(len(tiles.host), groups)](
            q,
            k,
            v,
            o,
            lse,
            tiles.table,
            len(tiles.host),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            logit_scale(q, scale),
            H=heads,
            R=ratio,
            OFFSET=band.offset,
            STRIDE=band.stride,
            WINDOW=band.window,
            LONG=long,
            BT=tokens,
            BM=shape.rows,
            BN=shape.keys,
            DK=dk,
            DV=dv,
            PDK=padded(dk),
            PDV=padded(dv),
            PRECISION=precision(q),
            PIECE_TILES=PIECE,
            num_warps=shape.warps,
            # Sums of pieces beside two bounds leave registers for one tile in flight less.
            num_stages=shape.stages - 1 if long and band.window else shape.stages,
            maxnreg=shape.registers,
            enable_fp_fusion=False,
        )
    return o, lse


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse, not yet written."""
    o = q.new_empty(*q.shape[:2], v.shape[-1])
    return o, q.new_empty(q.shape[:2], dtype=torch.float32)

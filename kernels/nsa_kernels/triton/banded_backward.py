"""Gradients of attention to a band of keys: see banded_attention.py.

dq has a program for each query tile, dk and dv one for each key tile and run of query tiles that
see it. Both compute the probabilities P again from the log-sum-exp: dP = do v^T,
dS = P (dP - delta) with delta = sum of o do, dq = scale dS k, dk = scale dS^T q, dv = P^T do. Each
sum has one owner; long lists of query tiles are shared out and their sums added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.band import Band, load_rows, num_seen, sees
from nsa_kernels.triton.tiles import (
    LOG2E,
    PIECE,
    attention_shapes,
    key_tiles,
    padded,
    precision,
    query_tiles,
)


@triton.jit
def _dq_tiles(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
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
    scale_log2,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS K of each key tile in [begin, end) to dq."""
    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    for start in tl.range(begin, end, BN):
        o_j = start + tl.arange(0, BN)
        m_j = (o_j >= first) & (o_j < limit)
        row = base + o_j.to(tl.int64)
        b_k = load_rows(p_k, row * stride_kt, o_dk, m_j, DK, PDK)  # [BN, PDK]
        b_v = load_rows(p_v, row * stride_vt, o_dv, m_j, DV, PDV)  # [BN, PDV]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        seen = sees(b_t[:, None], o_j[None, :], OFFSET, STRIDE, WINDOW)
        b_p = tl.where(seen, tl.exp2(b_s - b_lse[:, None]), 0.0)  # [BM, BN]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = tl.where(seen, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    return b_dq


@triton.jit
def _dq_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    tiles,
    num_tiles,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    scale,
    scale_log2,
    H: tl.constexpr,
    R: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
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
    i_tile = num_tiles - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    first_row = tl.load(tiles + i_tile * 4)
    num_tokens = tl.load(tiles + i_tile * 4 + 1).to(tl.int32)
    position = tl.load(tiles + i_tile * 4 + 2).to(tl.int32)
    base = tl.load(tiles + i_tile * 4 + 3)

    o_m = tl.arange(0, BM)
    o_dk = tl.arange(0, PDK)
    token, head = o_m // R, i_g * R + o_m % R
    m_m = (token < num_tokens) & (token < BT)
    row = first_row + token
    b_t = position + token
    b_q = load_rows(q, row * stride_qt + head * stride_qh, o_dk, m_m, DK, PDK)
    b_do = load_rows(do, row * stride_dot + head * stride_doh, tl.arange(0, PDV), m_m, DV, PDV)
    b_lse = tl.load(lse + row * H + head, mask=m_m, other=0.0) * 1.4426950408889634
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
    b_delta = tl.load(delta + row * H + head, mask=m_m, other=0.0)

    last = position + num_tokens - 1
    limit = num_seen(last, OFFSET, STRIDE)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    begin = first // BN * BN
    b_dq = tl.zeros([BM, PDK], dtype=tl.float32)
    for piece in tl.range(begin, limit, PIECE_TILES * BN):
        b_dq += _dq_tiles(
            tl.zeros([BM, PDK], dtype=tl.float32), b_q, b_do, b_lse, b_delta,
            k + i_g * stride_kh, v + i_g * stride_vh, b_t, base,
            piece, tl.minimum(piece + PIECE_TILES * BN, limit), first, limit,
            stride_kt, stride_vt, scale_log2,
            OFFSET, STRIDE, WINDOW, BN, DK, DV, PDK, PDV, PRECISION,
        )  # fmt: skip
    p_dq = dq + (row * H + head)[:, None] * DK + o_dk[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_m[:, None] & (o_dk < DK)[None, :])


@triton.jit
def _dkv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    tiles,
    programs,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    scale,
    scale_log2,
    G: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED_OUT: tl.constexpr,
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
    """dK, dV of one key tile from a run of query tiles.

    Written to the keys' rows, or with SHARED_OUT to the program's rows of a float32 workspace.
    """
    i_program = tl.program_id(0)
    i_g = tl.program_id(1)
    base = tl.load(programs + i_program * 6)
    first_key = tl.load(programs + i_program * 6 + 1).to(tl.int32)
    end_key = tl.load(programs + i_program * 6 + 2).to(tl.int32)
    first_tile = tl.load(programs + i_program * 6 + 3).to(tl.int32)
    end_tile = tl.load(programs + i_program * 6 + 4).to(tl.int32)

    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    o_n = tl.arange(0, BN)
    o_j = first_key // BN * BN + o_n
    m_j = (o_j >= first_key) & (o_j < end_key)
    key_row = base + o_j.to(tl.int64)
    b_k = load_rows(k + i_g * stride_kh, key_row * stride_kt, o_dk, m_j, DK, PDK)
    b_v = load_rows(v + i_g * stride_vh, key_row * stride_vt, o_dv, m_j, DV, PDV)

    o_m = tl.arange(0, BM)
    token, head = o_m // R, i_g * R + o_m % R
    b_dk = tl.zeros([BN, PDK], dtype=tl.float32)
    b_dv = tl.zeros([BN, PDV], dtype=tl.float32)
    for piece in tl.range(first_tile, end_tile, PIECE_TILES):
        b_dk_piece = tl.zeros([BN, PDK], dtype=tl.float32)
        b_dv_piece = tl.zeros([BN, PDV], dtype=tl.float32)
        for i_tile in tl.range(piece, tl.minimum(piece + PIECE_TILES, end_tile)):
            p_tile = tiles + i_tile * 4
            first_row = tl.load(p_tile)
            num_tokens = tl.load(p_tile + 1).to(tl.int32)
            position = tl.load(p_tile + 2).to(tl.int32)
            m_m = (token < num_tokens) & (token < BT)
            row = first_row + token
            b_q = load_rows(q, row * stride_qt + head * stride_qh, o_dk, m_m, DK, PDK)
            b_do = load_rows(do, row * stride_dot + head * stride_doh, o_dv, m_m, DV, PDV)
            b_lse = tl.load(lse + row * H + head, mask=m_m, other=0.0) * 1.4426950408889634
            b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
            b_delta = tl.load(delta + row * H + head, mask=m_m, other=0.0)
            seen = sees((position + token)[None, :], o_j[:, None], OFFSET, STRIDE, WINDOW)
            seen = seen & m_m[None, :] & m_j[:, None]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BN, BM]
            b_p = tl.where(seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
            b_dv_piece += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = tl.where(seen, b_p * (b_dp - b_delta[None, :]), 0.0)
            b_dk_piece += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
        b_dk += b_dk_piece
        b_dv += b_dv_piece

    b_dk *= scale
    row = key_row
    if SHARED_OUT:
        row = i_program.to(tl.int64) * BN + o_n
    p_dk = dk + (row * G + i_g)[:, None] * DK + o_dk[None, :]
    p_dv = dv + (row * G + i_g)[:, None] * DV + o_dv[None, :]
    tl.store(p_dk, b_dk.to(dk.dtype.element_ty), mask=m_j[:, None] & (o_dk < DK)[None, :])
    tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_j[:, None] & (o_dv < DV)[None, :])


@triton.jit
def _add_parts_kernel(
    parts, workspace, out, programs, G: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PD: tl.constexpr,
):  # fmt: skip
    """Add what the programs of one key tile left in the workspace, in their order."""
    i_key = tl.program_id(0)
    i_g = tl.program_id(1)
    begin, end = tl.load(parts + i_key), tl.load(parts + i_key + 1)
    base = tl.load(programs + begin * 6)
    first_key = tl.load(programs + begin * 6 + 1).to(tl.int32)
    end_key = tl.load(programs + begin * 6 + 2).to(tl.int32)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, PD)
    o_j = first_key // BN * BN + o_n
    mask = ((o_j >= first_key) & (o_j < end_key))[:, None] & (o_d < D)[None, :]
    b_sum = tl.zeros([BN, PD], dtype=tl.float32)
    for i_program in tl.range(begin, end):
        row = i_program * BN + o_n.to(tl.int64)
        p = workspace + (row * G + i_g)[:, None] * D + o_d[None, :]
        b_sum += tl.load(p, mask=mask, other=0.0)
    row = base + o_j.to(tl.int64)
    p_out = out + (row * G + i_g)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _delta_kernel(
    o, do, delta, num_rows, stride_dot, stride_doh, H: tl.constexpr, BM: tl.constexpr,
    DV: tl.constexpr, PDV: tl.constexpr,
):  # fmt: skip
    """delta = sum over channels of o do: what the softmax's gradient subtracts from every dP."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, PDV)
    mask = (i < num_rows)[:, None] & (o_d < DV)[None, :]
    b_o = tl.load(o + i[:, None] * DV + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    p_do = do + (i // H * stride_dot + i % H * stride_doh)[:, None] + o_d[None, :]
    b_do = tl.load(p_do, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + i, tl.sum(b_o * b_do, 1), mask=i < num_rows)


def banded_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    segments: QuerySegments,
    band: Band,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [N, H, Dk], k [E, G, Dk] and v [E, G, Dv] in their dtypes.

    o and do [N, H, Dv], lse [N, H]; the last dimension of each contiguous.
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    if not q.shape[0]:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(lse.numel(), 64),)](
        o, do, delta, lse.numel(), *do.stride()[:2], H=q.shape[1], BM=64,
        DV=v.shape[-1], PDV=padded(v.shape[-1]),
    )  # fmt: skip
    groups, ratio = k.shape[1], q.shape[1] // k.shape[1]
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2])
    shared = {
        "H": q.shape[1],
        "R": ratio,
        "OFFSET": band.offset,
        "STRIDE": band.stride,
        "WINDOW": band.window,
        "DK": q.shape[-1],
        "DV": v.shape[-1],
        "PDK": padded(q.shape[-1]),
        "PDV": padded(v.shape[-1]),
        "PRECISION": precision(q),
        "PIECE_TILES": PIECE,
    }
    _, shape, key_shape = attention_shapes(q, v)
    tiles = query_tiles(segments, shape.rows // ratio, band.column)
    _dq_kernel[(len(tiles.rows), groups)](
        q, k, v, do, lse, delta, dq, tiles.table, len(tiles.rows), *strides, scale, scale * LOG2E,
        BT=shape.rows // ratio, BM=shape.rows, BN=shape.keys, **shared,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

    tokens, size = key_shape.rows // ratio, key_shape.keys
    tiles = query_tiles(segments, tokens, band.column)
    programs = key_tiles(segments, band, tokens, size)
    if not len(programs.table):
        return dq, dk, dv
    shared_out = programs.most > 1
    to_k, to_v = dk, dv
    if shared_out:
        rows = len(programs.table) * size
        to_k = k.new_empty(rows, *k.shape[1:], dtype=torch.float32)
        to_v = v.new_empty(rows, *v.shape[1:], dtype=torch.float32)
    _dkv_kernel[(len(programs.table), groups)](
        q, k, v, do, lse, delta, to_k, to_v, tiles.table, programs.table, *strides, scale,
        scale * LOG2E, G=groups, SHARED_OUT=shared_out, BT=tokens, BM=key_shape.rows, BN=size,
        **shared, num_warps=key_shape.warps, num_stages=key_shape.stages,
    )  # fmt: skip
    if shared_out:
        for workspace, out in ((to_k, dk), (to_v, dv)):
            _add_parts_kernel[(len(programs.parts) - 1, groups)](
                programs.parts, workspace, out, programs.table, G=groups, BN=size,
                D=out.shape[-1], PD=padded(out.shape[-1]),
            )  # fmt: skip
    return dq, dk, dv

"""Gradients of attention to a band of keys: see forward.py.

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
from nsa_kernels.triton.banded.band import Band, load_rows, num_seen, sees
from nsa_kernels.triton.banded.key_tiles import key_tiles
from nsa_kernels.triton.shared.arithmetic import (
    PIECE,
    add_dot,
    add_tiles,
    logit_scale,
    power,
    precision,
)
from nsa_kernels.triton.shared.shapes import MOST_REGISTERS, banded_tiles, padded
from nsa_kernels.triton.shared.tables import query_tiles

# Bytes for what programs of dk and dv leave to be added; more programs run in several launches.
WORKSPACE = 256 << 20


@triton.jit
def _probabilities(
    b_q,
    b_do,
    b_lse,
    b_k,
    b_v,
    b_t,
    o_j,
    logit_scale,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P, 0 where the query does not see the key, and dP, both [BM, BN]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    seen = sees(b_t[:, None], o_j[None, :], OFFSET, STRIDE, WINDOW)
    b_p = tl.where(seen, power(tl.fma(b_s, logit_scale, -b_lse[:, None]), PRECISION), 0.0)
    return b_p, tl.where(seen, tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION), 0.0)


@triton.jit
def _delta_tiles(
    b_delta,
    b_sum,
    b_q,
    b_do,
    b_lse,
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
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add P dP and P of each key tile in [begin, end) to delta and sum."""
    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    for start in tl.range(begin, end, BN):
        o_j = start + tl.arange(0, BN)
        m_j = (o_j >= first) & (o_j < limit)
        row = base + o_j.to(tl.int64)
        b_k = load_rows(p_k, row * stride_kt, o_dk, m_j, DK, PDK)  # [BN, PDK]
        b_v = load_rows(p_v, row * stride_vt, o_dv, m_j, DV, PDV)  # [BN, PDV]
        b_p, b_dp = _probabilities(
            b_q, b_do, b_lse, b_k, b_v, b_t, o_j, logit_scale, OFFSET, STRIDE, WINDOW, PRECISION
        )
        b_delta += tl.sum(b_p * b_dp, 1)
        b_sum += tl.sum(b_p, 1)
    return b_delta, b_sum


@triton.jit
def _dq_tiles(
    b_dq,
    b_rest,
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
    logit_scale,
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
    """Add dS K of each key tile in [begin, end) to dq, and dS itself to rest."""
    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    for start in tl.range(begin, end, BN):
        o_j = start + tl.arange(0, BN)
        m_j = (o_j >= first) & (o_j < limit)
        row = base + o_j.to(tl.int64)
        b_k = load_rows(p_k, row * stride_kt, o_dk, m_j, DK, PDK)  # [BN, PDK]
        b_v = load_rows(p_v, row * stride_vt, o_dv, m_j, DV, PDV)  # [BN, PDV]
        b_p, b_dp = _probabilities(
            b_q, b_do, b_lse, b_k, b_v, b_t, o_j, logit_scale, OFFSET, STRIDE, WINDOW, PRECISION
        )
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_rest += tl.sum(b_ds, 1)
        b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION)
    return b_dq, b_rest


@triton.jit
def _load_lse(lse, o, mask, PRECISION: tl.constexpr):
    """The log-sum-exp as `power` counts; 0, not -inf, where no key is seen."""
    b_lse = tl.load(lse + o, mask=mask, other=0.0)
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
    return b_lse if PRECISION == "ieee" else b_lse * 1.4426950408889634


@triton.jit
def _sees_several(t, OFFSET: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at position t sees more than one key."""
    count = num_seen(t, OFFSET, STRIDE)
    if WINDOW > 0:
        count = tl.minimum(count, WINDOW)
    return count > 1


@triton.jit(do_not_specialize=["num_tiles"])
def _dq_kernel(
    q,
    k,
    v,
    o,
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
    logit_scale,
    H: tl.constexpr,
    R: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    FEW_KEYS: tl.constexpr,
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
    """dq of one tile of queries, and delta for dk and dv.

    With at most FEW_KEYS keys delta is the mean of dP under P, in a walk of its own: dP and delta
    may cancel there, and then the rounding of o and of the log-sum-exp would be what is left.
    With more, what the rounding of o leaves of the sum of dS goes into the delta for dk and dv:
    each query's dS then add up to 0, and so does what they give to sums over many keys, such as the
    gradient of a compressor's position embedding, in which it would outgrow the rest.
    """
    i_tile = num_tiles - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    first_row = tl.load(tiles + i_tile * 4)
    num_tokens = tl.load(tiles + i_tile * 4 + 1).to(tl.int32)
    position = tl.load(tiles + i_tile * 4 + 2).to(tl.int32)
    base = tl.load(tiles + i_tile * 4 + 3)

    o_m = tl.arange(0, BM)
    o_dk = tl.arange(0, PDK)
    token, head = o_m // R, (i_g * R + o_m % R).to(tl.int64)
    m_m = (token < num_tokens) & (token < BT)
    row = first_row + token
    b_t = position + token
    b_q = load_rows(q, row * stride_qt + head * stride_qh, o_dk, m_m, DK, PDK)
    o_dv = tl.arange(0, PDV)
    b_do = load_rows(do, row * stride_dot + head * stride_doh, o_dv, m_m, DV, PDV)
    row_head = row * H + head
    b_lse = _load_lse(lse, row_head, m_m, PRECISION)
    last = position + num_tokens - 1
    limit = num_seen(last, OFFSET, STRIDE)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    begin = first // BN * BN
    p_k = k + i_g.to(tl.int64) * stride_kh
    p_v = v + i_g.to(tl.int64) * stride_vh
    b_o = load_rows(o, row_head * DV, o_dv, m_m, DV, PDV)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if limit - begin <= FEW_KEYS:
        b_delta = tl.zeros([BM], dtype=tl.float32)
        b_sum = tl.zeros([BM], dtype=tl.float32)
        for piece in tl.range(begin, limit, PIECE_TILES * BN):
            b_delta_piece, b_sum_piece = _delta_tiles(
                tl.zeros([BM], dtype=tl.float32), tl.zeros([BM], dtype=tl.float32), b_q, b_do,
                b_lse, p_k, p_v, b_t, base,
                piece, tl.minimum(piece + PIECE_TILES * BN, limit), first, limit,
                stride_kt, stride_vt, logit_scale,
                OFFSET, STRIDE, WINDOW, BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
            b_delta += b_delta_piece
            b_sum += b_sum_piece
        b_delta /= tl.where(b_sum == 0.0, 1.0, b_sum)
    b_dq = tl.zeros([BM, PDK], dtype=tl.float32)
    b_rest = tl.zeros([BM], dtype=tl.float32)
    for piece in tl.range(begin, limit, PIECE_TILES * BN):
        b_dq_piece, b_rest_piece = _dq_tiles(
            tl.zeros([BM, PDK], dtype=tl.float32), tl.zeros([BM], dtype=tl.float32), b_q, b_do,
            b_lse, b_delta, p_k, p_v, b_t, base,
            piece, tl.minimum(piece + PIECE_TILES * BN, limit), first, limit,
            stride_kt, stride_vt, logit_scale,
            OFFSET, STRIDE, WINDOW, BN, DK, DV, PDK, PDV, PRECISION,
        )  # fmt: skip
        b_dq += b_dq_piece
        b_rest += b_rest_piece
    tl.store(delta + row_head, b_delta + b_rest, mask=m_m)
    b_dq = tl.where(_sees_several(b_t, OFFSET, STRIDE, WINDOW)[:, None], b_dq * scale, 0.0)
    p_dq = dq + row_head[:, None] * DK + o_dk[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_m[:, None] & (o_dk < DK)[None, :])


@triton.jit(do_not_specialize=["first_program"])
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
    first_program,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    scale,
    logit_scale,
    G: tl.constexpr,
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
):
    """dK, dV of one key tile from a run of query tiles, at most a piece, to a float32 workspace."""
    i_program = first_program + tl.program_id(0)
    i_g = tl.program_id(1)
    base = tl.load(programs + i_program * 6)
    first_key = tl.load(programs + i_program * 6 + 1).to(tl.int32)
    end_key = tl.load(programs + i_program * 6 + 2).to(tl.int32)
    first_tile = tl.load(programs + i_program * 6 + 3).to(tl.int32)
    end_tile = tl.load(programs + i_program * 6 + 4).to(tl.int32)
    # Never so; but for a loop of no turns, ptxas would let every wgmma wait for the one before.
    if first_tile >= end_tile:
        return

    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    o_n = tl.arange(0, BN)
    o_j = first_key // BN * BN + o_n
    m_j = (o_j >= first_key) & (o_j < end_key)
    key_row = base + o_j.to(tl.int64)
    i_g_wide = i_g.to(tl.int64)
    b_k = load_rows(k + i_g_wide * stride_kh, key_row * stride_kt, o_dk, m_j, DK, PDK)
    b_v = load_rows(v + i_g_wide * stride_vh, key_row * stride_vt, o_dv, m_j, DV, PDV)

    o_m = tl.arange(0, BM)
    token, head = o_m // R, (i_g * R + o_m % R).to(tl.int64)
    b_dk = tl.zeros([BN, PDK], dtype=tl.float32)
    b_dv = tl.zeros([BN, PDV], dtype=tl.float32)
    for i_tile in tl.range(first_tile, end_tile):
        p_tile = tiles + i_tile * 4
        first_row = tl.load(p_tile)
        num_tokens = tl.load(p_tile + 1).to(tl.int32)
        position = tl.load(p_tile + 2).to(tl.int32)
        m_m = (token < num_tokens) & (token < BT)
        row = first_row + token
        b_q = load_rows(q, row * stride_qt + head * stride_qh, o_dk, m_m, DK, PDK)
        b_do = load_rows(do, row * stride_dot + head * stride_doh, o_dv, m_m, DV, PDV)
        b_lse = _load_lse(lse, row * H + head, m_m, PRECISION)
        b_delta = tl.load(delta + row * H + head, mask=m_m, other=0.0)
        b_t = position + token
        seen = sees(b_t[None, :], o_j[:, None], OFFSET, STRIDE, WINDOW)
        seen = seen & m_m[None, :] & m_j[:, None]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_p = power(tl.fma(b_s, logit_scale, -b_lse[None, :]), PRECISION)
        several = _sees_several(b_t, OFFSET, STRIDE, WINDOW)[None, :]
        if PRECISION == "ieee":
            b_p = tl.where(several, b_p, 1.0)
        b_p = tl.where(seen, b_p, 0.0)
        b_dv = add_dot(b_dv, b_p.to(b_do.dtype), b_do, PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = tl.where(seen & several, b_p * (b_dp - b_delta[None, :]), 0.0)
        b_dk = add_dot(b_dk, b_ds.to(b_q.dtype), b_q, PRECISION)

    b_dk *= scale
    row = tl.program_id(0).to(tl.int64) * BN + o_n
    p_dk = dk + (row * G + i_g)[:, None] * DK + o_dk[None, :]
    p_dv = dv + (row * G + i_g)[:, None] * DV + o_dv[None, :]
    tl.store(p_dk, b_dk, mask=m_j[:, None] & (o_dk < DK)[None, :])
    tl.store(p_dv, b_dv, mask=m_j[:, None] & (o_dv < DV)[None, :])


@triton.jit(do_not_specialize=["first_program", "end_program"])
def _add_parts_kernel(
    parts,
    workspace,
    carried,
    carry,
    out,
    programs,
    first_program,
    end_program,
    G: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    D: tl.constexpr,
    PD: tl.constexpr,
    PIECE_TILES: tl.constexpr,
):
    """Add what programs first_program..end_program-1 of one key tile left, in their order.

    On top of `carried`, what earlier programs of the key tile left; to `carry` when more will come.
    """
    i_key = tl.program_id(0)
    i_g = tl.program_id(1)
    begin, end = tl.load(parts + i_key), tl.load(parts + i_key + 1)
    low = tl.maximum(begin, first_program)
    high = tl.minimum(end, end_program)
    if low >= high:
        return
    base = tl.load(programs + begin * 6)
    first_key = tl.load(programs + begin * 6 + 1).to(tl.int32)
    end_key = tl.load(programs + begin * 6 + 2).to(tl.int32)
    o_n = tl.program_id(2) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, PD)
    o_j = first_key // BN * BN + o_n
    mask = ((o_j >= first_key) & (o_j < end_key))[:, None] & (o_d < D)[None, :]
    o_in = (o_n * G + i_g)[:, None] * D + o_d[None, :]  # in the BN rows of a program
    b_sum = tl.zeros([BR, PD], dtype=tl.float32)
    if begin < low:
        b_sum = tl.load(carried + o_in, mask=mask, other=0.0)
    b_sum = add_tiles(
        b_sum, workspace + o_in, (low - first_program).to(tl.int64),
        (high - first_program).to(tl.int64), BN * G * D, mask, PIECE_TILES,
    )  # fmt: skip
    if end > high:
        tl.store(carry + o_in, b_sum, mask=mask)
        return
    row = base + o_j.to(tl.int64)
    p_out = out + (row * G + i_g)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=mask)


def few_keys(q: Tensor) -> int:
    """Up to how many keys the sum that dP cancels with is computed anew: see `_dq_kernel`."""
    return 1 << 30 if q.dtype == torch.float32 else 128


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
    }
    _, shape, key_shape = banded_tiles(q, v)
    tiles = query_tiles(segments, shape.rows // ratio, band.column)
    _dq_kernel[(len(tiles.host), groups)](
        q, k, v, o, do, lse, delta, dq, tiles.table, len(tiles.host), *strides, scale,
        logit_scale(q, scale), FEW_KEYS=few_keys(q), PIECE_TILES=PIECE, BT=shape.rows // ratio,
        BM=shape.rows, BN=shape.keys, **shared,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

    tokens, size = key_shape.rows // ratio, key_shape.keys
    tiles = query_tiles(segments, tokens, band.column)
    programs = key_tiles(segments, band, tokens, size)
    if not len(programs.table):
        return dq, dk, dv
    count = len(programs.table)
    widths = (k.shape[-1], v.shape[-1])

    def empty(tiles: int) -> list[Tensor]:
        return [q.new_empty(tiles * size, groups, w, dtype=torch.float32) for w in widths]

    launch = max(1, WORKSPACE // (4 * size * groups * sum(widths)))
    workspace, carried, carry = empty(min(launch, count)), empty(1), empty(1)
    for first in range(0, count, launch):
        end = min(first + launch, count)
        _dkv_kernel[(end - first, groups)](
            q, k, v, do, lse, delta, *workspace, tiles.table, programs.table, first, *strides,
            scale, logit_scale(q, scale), G=groups, BT=tokens,
            BM=key_shape.rows, BN=size, **shared, num_warps=key_shape.warps,
            num_stages=key_shape.stages, maxnreg=key_shape.registers,
        )  # fmt: skip
        for i, out in enumerate((dk, dv)):
            _add_parts_kernel[(len(programs.parts) - 1, groups, size // 8)](
                programs.parts, workspace[i], carried[i], carry[i], out, programs.table, first,
                end, G=groups, BN=size, BR=8, D=out.shape[-1], PD=padded(out.shape[-1]),
                PIECE_TILES=PIECE, maxnreg=MOST_REGISTERS,
            )  # fmt: skip
        carried, carry = carry, carried
    return dq, dk, dv

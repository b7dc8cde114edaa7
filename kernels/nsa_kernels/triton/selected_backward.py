"""Gradients of the selection branch: see selected_attention.py.

The probabilities P are computed again from the log-sum-exp: dP = do v^T, dS = P (dP - delta) with
delta = sum of o do, dq = scale dS k, dk = scale dS^T q, dv = P^T do. dq walks the blocks of a tile
of tokens, as forward does. dk and dv walk, for each block, the queries that chose it, BQ of them
with their R heads at a time; long lists are shared out to programs whose float32 sums are then
added in order. Each sum has one owner and one order.

A query that sees a single key has P = 1 and dS = 0, whatever rounding says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selected_lists import (
    EDGES,
    block_lists,
    first_of,
    key_shape,
    load_block,
    query_lists,
    token_tile,
    walk_shape,
)
from nsa_kernels.triton.tiles import LOG2E, PIECE, padded, precision, query_tiles

# Pieces of a block's list of queries that one program walks over.
PIECES_A_PROGRAM = 8


@triton.jit
def _dq_block(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    stride_k,
    stride_v,
    chose,
    b_seen,
    limit,
    scale_log2,
    EDGE: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS K of one block, of the rows that `chose` it; with APART summed by itself first."""
    b_sum = b_dq
    if APART:
        b_sum = tl.zeros_like(b_dq)
    for start in tl.static_range(0, BLOCK, BN):
        b_k = load_block(p_k, stride_k, start, limit, BN, DK, PDK, EDGE)  # [BN, PDK]
        b_v = load_block(p_v, stride_v, start, limit, BN, DV, PDV, EDGE)  # [BN, PDV]
        seen = chose[:, None]
        if EDGE:
            seen = seen & (start + tl.arange(0, BN)[None, :] < b_seen[:, None])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_lse[:, None]))
        b_ds = tl.where(seen, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_sum = tl.dot(b_ds.to(b_k.dtype), b_k, b_sum, input_precision=PRECISION)
    if APART:
        b_sum += b_dq
    return b_sum


@triton.jit
def _dq_kernel(
    q,
    k_own,
    v_own,
    k_fetched,
    v_fetched,
    o,
    do,
    lse,
    delta,
    dq,
    tiles,
    lists,
    counts,
    num_own,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_fkt,
    stride_fkh,
    stride_fvt,
    stride_fvh,
    stride_dot,
    stride_doh,
    scale,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    LENGTH: tl.constexpr,
    EDGE_BLOCKS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one tile of tokens, and delta for dk and dv."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1)
    first_row = tl.load(tiles + i_tile * 4)
    num_tokens = tl.load(tiles + i_tile * 4 + 1).to(tl.int32)
    position = tl.load(tiles + i_tile * 4 + 2).to(tl.int32)
    p_list = lists + (i_tile * G + i_g) * LENGTH
    count = tl.load(counts + i_tile * G + i_g)

    o_m = tl.arange(0, BM)
    o_dk = tl.arange(0, PDK)
    o_dv = tl.arange(0, PDV)
    token, head = o_m // R, i_g * R + o_m % R
    m_m = (token < num_tokens) & (token < BT)
    m_dk = m_m[:, None] & (o_dk < DK)[None, :]
    m_dv = m_m[:, None] & (o_dv < DV)[None, :]
    row = first_row + token
    row_head = row * (G * R) + head
    p_q = q + (row * stride_qt + head * stride_qh)[:, None] + o_dk[None, :]
    b_q = tl.load(p_q, mask=m_dk, other=0.0)  # [BM, PDK]
    p_do = do + (row * stride_dot + head * stride_doh)[:, None] + o_dv[None, :]
    b_do = tl.load(p_do, mask=m_dv, other=0.0)  # [BM, PDV]
    b_o = tl.load(o + row_head[:, None] * DV + o_dv[None, :], mask=m_dv, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + row_head, b_delta, mask=m_m)
    b_lse = tl.load(lse + row_head, mask=m_m, other=0.0) * 1.4426950408889634
    k_own += i_g * stride_kh
    v_own += i_g * stride_vh
    k_fetched += i_g * stride_fkh
    v_fetched += i_g * stride_fvh

    b_dq = tl.zeros([BM, PDK], dtype=tl.float32)
    num_seen = tl.zeros([BM], dtype=tl.int32)
    entry = tl.load(p_list + EDGE_BLOCKS, mask=count > 0, other=0)
    for i in tl.range(0, count):
        following = tl.load(p_list + EDGE_BLOCKS + 1 + i, mask=i + 1 < count, other=0)
        start = entry >> 24
        p_k, stride_k = first_of(k_own, k_fetched, start, num_own, stride_kt, stride_fkt)
        p_v, stride_v = first_of(v_own, v_fetched, start, num_own, stride_vt, stride_fvt)
        chose = ((entry.to(tl.int32) >> token) & 1) != 0
        b_dq = _dq_block(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_k, stride_v, chose, token, BLOCK,
            scale_log2, False, APART, BLOCK, BN, DK, DV, PDK, PDV, PRECISION,
        )  # fmt: skip
        num_seen += tl.where(chose, BLOCK, 0)
        entry = following
    first_edge = (position + 1) // BLOCK
    for i in tl.range(0, EDGE_BLOCKS, num_stages=1):
        entry = tl.load(p_list + i)
        if entry != 0:
            start = entry >> 24
            p_k, stride_k = first_of(k_own, k_fetched, start, num_own, stride_kt, stride_fkt)
            p_v, stride_v = first_of(v_own, v_fetched, start, num_own, stride_vt, stride_fvt)
            chose = ((entry.to(tl.int32) >> token) & 1) != 0
            b_seen = position + token + 1 - (first_edge + i) * BLOCK
            limit = ((entry >> 16) & 255).to(tl.int32)
            b_dq = _dq_block(
                b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_k, stride_v, chose, b_seen,
                limit, scale_log2, True, APART, BLOCK, BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
            num_seen += tl.where(chose, tl.maximum(b_seen, 0), 0)
    b_dq = tl.where((num_seen > 1)[:, None], b_dq * scale, 0.0)
    p_dq = dq + row_head[:, None] * DK + o_dk[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_dk)


@triton.jit
def _add_to(p, b, mask, first):
    """Write b, or with more than the `first` piece there add to it."""
    if first:
        tl.store(p, b, mask=mask)
    else:
        tl.store(p, b + tl.load(p, mask=mask, other=0.0), mask=mask)


@triton.jit
def _dkv_kernel(
    q,
    k_own,
    v_own,
    k_fetched,
    v_fetched,
    do,
    lse,
    delta,
    dk,
    dv,
    queries,
    starts,
    ends,
    owner,
    block_rows,
    block_lengths,
    num_blocks,
    num_own,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_fkt,
    stride_fkh,
    stride_fvt,
    stride_fvh,
    stride_dot,
    stride_doh,
    scale,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    PIECE_QUERIES: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv of BN keys of a block from at most MOST of its queries, to a float32 workspace."""
    i_program = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(1) * BN
    block = tl.load(owner + i_program)
    if block < G * num_blocks:
        i_g = block // num_blocks
        before = tl.load(ends + block - 1, mask=block > 0, other=0)
        begin = tl.load(starts + block) + (i_program - before) * MOST
        end = tl.minimum(begin + MOST, tl.load(starts + block + 1))
        start = tl.load(block_rows + block)
        length = tl.load(block_lengths + block % num_blocks).to(tl.int32)
        p_k, stride_k = first_of(
            k_own + i_g * stride_kh, k_fetched + i_g * stride_fkh, start, num_own, stride_kt,
            stride_fkt,
        )  # fmt: skip
        p_v, stride_v = first_of(
            v_own + i_g * stride_vh, v_fetched + i_g * stride_fvh, start, num_own, stride_vt,
            stride_fvt,
        )  # fmt: skip
        b_k = load_block(p_k, stride_k, first_key, length, BN, DK, PDK, True)  # [BN, PDK]
        b_v = load_block(p_v, stride_v, first_key, length, BN, DV, PDV, True)  # [BN, PDV]

        o_m = tl.arange(0, BM)
        o_dk = tl.arange(0, PDK)
        o_dv = tl.arange(0, PDV)
        o_n = first_key + tl.arange(0, BN)
        place, head = o_m // R, i_g * R + o_m % R
        row = i_program * BLOCK + o_n
        p_dk = dk + row[:, None] * DK + o_dk[None, :]
        p_dv = dv + row[:, None] * DV + o_dv[None, :]
        m_dk = (o_n < length)[:, None] & (o_dk < DK)[None, :]
        m_dv = (o_n < length)[:, None] & (o_dv < DV)[None, :]
        for piece in tl.range(begin, end, PIECE_QUERIES, num_stages=1):
            b_dk = tl.zeros([BN, PDK], dtype=tl.float32)
            b_dv = tl.zeros([BN, PDV], dtype=tl.float32)
            stop = tl.minimum(piece + PIECE_QUERIES, end)
            for i in tl.range(piece, stop, BQ):
                m_m = (i + place < stop) & (place < BQ)
                entry = tl.load(queries + i + place, mask=m_m, other=0)
                query = entry >> 9
                b_seen = (entry & 255).to(tl.int32)  # 0 where masked
                several = (entry & 256) != 0
                p_q = q + (query * stride_qt + head * stride_qh)[:, None] + o_dk[None, :]
                b_q = tl.load(p_q, mask=m_m[:, None] & (o_dk < DK)[None, :], other=0.0)
                p_do = do + (query * stride_dot + head * stride_doh)[:, None] + o_dv[None, :]
                b_do = tl.load(p_do, mask=m_m[:, None] & (o_dv < DV)[None, :], other=0.0)
                row_head = query * (G * R) + head
                b_lse = tl.load(lse + row_head, mask=m_m, other=0.0) * 1.4426950408889634
                b_delta = tl.load(delta + row_head, mask=m_m, other=0.0)
                seen = o_n[:, None] < b_seen[None, :]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
                b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_lse[None, :]))
                b_p = tl.where(seen, b_p, 0.0)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
                b_ds = b_p * (b_dp - b_delta[None, :])
                b_ds = tl.where(seen & several[None, :], b_ds, 0.0)
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
            _add_to(p_dk, b_dk * scale, m_dk, piece == begin)
            _add_to(p_dv, b_dv, m_dv, piece == begin)
            # What one thread wrote, another may read for the next piece.
            tl.debug_barrier()


@triton.jit
def _add_programs_kernel(
    workspace,
    own,
    fetched,
    ends,
    block_rows,
    block_lengths,
    num_blocks,
    num_own,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    PD: tl.constexpr,
):
    """Add what the programs of one block left in the workspace, in their order."""
    block = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, PD)
    begin = tl.load(ends + block - 1, mask=block > 0, other=0)
    end = tl.load(ends + block)
    if begin < end:
        i_g = block // num_blocks
        start = tl.load(block_rows + block)
        length = tl.load(block_lengths + block % num_blocks).to(tl.int32)
        mask = (o_n < length)[:, None] & (o_d < D)[None, :]
        b_sum = tl.zeros([BN, PD], dtype=tl.float32)
        for i in tl.range(begin, end):
            p = workspace + (i * BLOCK + o_n)[:, None] * D + o_d[None, :]
            b_sum += tl.load(p, mask=mask, other=0.0)
        p_out, _ = first_of(own, fetched, start, num_own, G * D, G * D)
        p_out += (i_g * D + o_n[:, None] * (G * D)) + o_d[None, :]
        tl.store(p_out, b_sum.to(own.dtype.element_ty), mask=mask)


def selected_backward(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    o: Tensor,
    lse: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    do: Tensor,
    segments: QuerySegments,
    select_block: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k_own, v_own, k_fetched and v_fetched, the arguments of forward.

    o and do [N, H, Dv], lse [N, H]; the last dimension of each contiguous. Works in a float32 copy
    of dk and dv of the blocks, and of one block more for each MOST queries that chose one.
    """
    sources = (k_own, v_own, k_fetched, v_fetched)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    if not q.shape[0] or not block_lengths.shape[0]:
        return dq.zero_(), *grads
    groups = k_own.shape[1]
    ratio = q.shape[1] // groups
    delta = torch.empty_like(lse)
    strides = [stride for x in (q, *sources, do) for stride in x.stride()[:2]]
    shared = {
        "G": groups,
        "R": ratio,
        "BLOCK": select_block,
        "DK": q.shape[-1],
        "DV": v_own.shape[-1],
        "PDK": padded(q.shape[-1]),
        "PDV": padded(v_own.shape[-1]),
        "PRECISION": precision(q),
        "enable_fp_fusion": False,
    }
    shape = walk_shape(q, v_own, select_block)
    tokens, rows = token_tile(ratio)
    tiles = query_tiles(segments, tokens, "selected_base").table
    lists, counts = block_lists(selected, block_rows, block_lengths, tiles, tokens, select_block)
    _dq_kernel[(len(tiles), groups)](
        q, *sources, o, do, lse, delta, dq, tiles, lists, counts, k_own.shape[0], *strides, scale,
        scale * LOG2E, LENGTH=lists.shape[-1], EDGE_BLOCKS=EDGES,
        APART=selected.shape[-1] * select_block > PIECE * shape.keys, BT=tokens, BM=rows,
        BN=shape.keys, **shared, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip

    shape = key_shape(q, v_own, select_block)
    at_once = shape.rows // ratio
    most = at_once * PIECE * PIECES_A_PROGRAM
    queries, starts, ends, owner = query_lists(
        selected, block_lengths, segments, select_block, most
    )
    block_rows = block_rows.contiguous()
    space = len(owner) * select_block
    to_k, to_v = (x.new_empty(space, x.shape[-1], dtype=torch.float32) for x in (k_own, v_own))
    blocks = (block_rows, block_lengths, block_lengths.shape[0], k_own.shape[0])
    _dkv_kernel[(len(owner), select_block // shape.keys)](
        q, *sources, do, lse, delta, to_k, to_v, queries, starts, ends, owner, *blocks, *strides,
        scale, scale * LOG2E, PIECE_QUERIES=at_once * PIECE, MOST=most, BQ=at_once,
        BM=shape.rows, BN=shape.keys, **shared, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    for workspace, own, fetched in ((to_k, *grads[::2]), (to_v, *grads[1::2])):
        _add_programs_kernel[(groups * block_lengths.shape[0], select_block // 16)](
            workspace, own, fetched, ends, *blocks, G=groups, BLOCK=select_block, BN=16,
            D=own.shape[-1], PD=padded(own.shape[-1]),
        )  # fmt: skip
    return dq, *grads

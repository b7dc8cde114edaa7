"""Gradients of the selection branch: see forward.py.

The probabilities P are computed again from the log-sum-exp: dP = do v^T, dS = P (dP - delta) with
delta = sum of o do, dq = scale dS k, dk = scale dS^T q, dv = P^T do. dq walks the blocks of a tile
of tokens, as forward does. dk and dv walk, for each block, the queries that chose it, BQ of them
with their R heads at a time; long lists are shared out to programs whose float32 sums are then
added in order. Each sum has one owner and one order.

A query that sees a single key has P = 1 and dS = 0, whatever rounding says.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selected.blocks import (
    block_of,
    first_of,
    load_block,
    load_columns,
    load_tile,
    store_tile,
)
from nsa_kernels.triton.selected.lists import EDGES, block_lists, query_lists
from nsa_kernels.triton.shared.arithmetic import (
    PIECE,
    add_dot,
    add_tiles,
    logit_scale,
    power,
    precision,
)
from nsa_kernels.triton.shared.shapes import (
    MOST_REGISTERS,
    padded,
    selected_dkv_tile,
    token_tile,
    walk_tiles,
)
from nsa_kernels.triton.shared.tables import query_tiles

# Bytes for what programs of dk and dv leave to be added; more programs run in several launches.
WORKSPACE = 256 << 20


@triton.jit
def _add_dq(
    b_dq,
    b_delta,
    b_q,
    b_do,
    b_lse,
    p_k,
    p_v,
    stride_k,
    stride_v,
    first_key,
    chose,
    b_seen,
    limit,
    logit_scale,
    EDGE: tl.constexpr,
    TO_DELTA: tl.constexpr,
    APART: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS K over BN keys of a block to b_dq, or with TO_DELTA the sum of P dP to b_delta.

    For the rows that `chose` the block; EDGE, b_seen and limit as in forward.
    """
    b_k = load_block(p_k, stride_k, first_key, limit, BN, DK, PDK, EDGE)  # [BN, PDK]
    b_v = load_block(p_v, stride_v, first_key, limit, BN, DV, PDV, EDGE)  # [BN, PDV]
    seen = chose[:, None]
    if EDGE:
        seen = seen & (first_key + tl.arange(0, BN)[None, :] < b_seen[:, None])
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_p = power(tl.fma(b_s, logit_scale, -b_lse[:, None]), PRECISION)
    if TO_DELTA:
        b_delta += tl.sum(tl.where(seen, b_p * b_dp, 0.0), 1)
    else:
        b_ds = tl.where(seen, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION, APART)
    return b_dq, b_delta


@triton.jit(do_not_specialize=["num_own"])
def _dq_kernel(
    q,
    k_own,
    v_own,
    k_fetched,
    v_fetched,
    o,
    do,
    log_sum,
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
    logit_scale,
    G: tl.constexpr,
    R: tl.constexpr,
    LENGTH: tl.constexpr,
    EDGE_BLOCKS: tl.constexpr,
    EXACT: tl.constexpr,
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
    """dq of one tile of tokens, and delta for dk and dv.

    EXACT: delta as the sum of P dP, in a walk of its own. For a query with few keys dP and delta
    cancel, and then the rounding of o would be all that is left.
    """
    i_tile = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
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
    if EXACT:
        b_delta = tl.zeros([BM], dtype=tl.float32)
    else:
        b_o = tl.load(o + row_head[:, None] * DV + o_dv[None, :], mask=m_dv, other=0.0)
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    b_lse = tl.load(log_sum + row_head, mask=m_m, other=0.0)
    k_own += i_g * stride_kh
    v_own += i_g * stride_vh
    k_fetched += i_g * stride_fkh
    v_fetched += i_g * stride_fvh

    b_dq = tl.zeros([BM, PDK], dtype=tl.float32)
    b_dq_sum = b_dq  # With APART the tiles of a block are summed by themselves and then added.
    several = tl.zeros([BM], dtype=tl.int1)
    first_edge = (position + 1) // BLOCK
    TILES: tl.constexpr = BLOCK // BN
    for i_pass in tl.static_range(0 if EXACT else 1, 2):
        # As in forward; not asked where that costs registers and does not help.
        if TILES == 1 or count > 0:
            entry = tl.load(p_list + EDGE_BLOCKS)
            for i in tl.range(0, count * TILES):
                following = tl.load(p_list + EDGE_BLOCKS + tl.minimum((i + 1) // TILES, count - 1))
                p_k, p_v, stride_k, stride_v = block_of(
                    entry, k_own, v_own, k_fetched, v_fetched, num_own, stride_kt, stride_vt,
                    stride_fkt, stride_fvt,
                )  # fmt: skip
                chose = ((entry.to(tl.int32) >> token) & 1) != 0
                b_dq, b_delta = _add_dq(
                    b_dq, b_delta, b_q, b_do, b_lse, p_k, p_v, stride_k, stride_v, i % TILES * BN,
                    chose, token, BLOCK, logit_scale, False, i_pass == 0, APART, BN, DK, DV, PDK,
                    PDV, PRECISION,
                )  # fmt: skip
                if APART:
                    ends = i % TILES == TILES - 1
                    b_dq_sum += tl.where(ends, b_dq, 0.0)
                    b_dq = tl.where(ends, 0.0, b_dq)
                several = several | chose
                entry = following
        for i in tl.range(0, EDGE_BLOCKS * TILES, num_stages=1):
            entry = tl.load(p_list + i // TILES)
            limit = ((entry >> 16) & 255).to(tl.int32)
            if i % TILES * BN < limit:
                p_k, p_v, stride_k, stride_v = block_of(
                    entry, k_own, v_own, k_fetched, v_fetched, num_own, stride_kt, stride_vt,
                    stride_fkt, stride_fvt,
                )  # fmt: skip
                chose = ((entry.to(tl.int32) >> token) & 1) != 0
                b_seen = position + token + 1 - (first_edge + i // TILES) * BLOCK
                b_dq, b_delta = _add_dq(
                    b_dq, b_delta, b_q, b_do, b_lse, p_k, p_v, stride_k, stride_v, i % TILES * BN,
                    chose, b_seen, limit, logit_scale, True, i_pass == 0, APART, BN, DK, DV, PDK,
                    PDV, PRECISION,
                )  # fmt: skip
                several = several | (chose & (b_seen > 1))
            if APART and i % TILES == TILES - 1:
                b_dq_sum += b_dq
                b_dq = tl.zeros([BM, PDK], dtype=tl.float32)
    if APART:
        b_dq = b_dq_sum
    tl.store(delta + row_head, b_delta, mask=m_m)
    b_dq = tl.where(several[:, None], b_dq * scale, 0.0)
    p_dq = dq + row_head[:, None] * DK + o_dk[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_dk)


@triton.jit(do_not_specialize=["num_blocks", "num_own", "first_program"])
def _dkv_kernel(
    q,
    k_own,
    v_own,
    k_fetched,
    v_fetched,
    do,
    log_sum,
    delta,
    dk,
    dv,
    rows,
    seen,
    starts,
    ends,
    owner,
    order,
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
    first_program,
    scale,
    logit_scale,
    G: tl.constexpr,
    R: tl.constexpr,
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
    i_program = tl.load(order + first_program + tl.program_id(0))
    first_key = tl.program_id(1) * BN
    block = tl.load(owner + i_program)
    if block >= G * num_blocks:
        return
    i_g = block // num_blocks
    before = tl.where(block > 0, tl.load(ends + tl.maximum(block - 1, 0)), 0)
    begin = tl.load(starts + block) + (i_program - before) * MOST
    num = tl.minimum(tl.load(starts + block + 1) - begin, MOST).to(tl.int32)
    # Never so; but for a loop of no turns, ptxas would let every wgmma wait for the one before.
    if num <= 0:
        return
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
    place = o_m // R
    head = i_g * R + o_m % R
    p_rows = rows + begin
    p_seen = seen + begin
    p_q = q + (head * stride_qh)[:, None] + o_dk[None, :]
    p_do = do + (head * stride_doh)[:, None] + o_dv[None, :]
    p_lse = log_sum + head
    p_delta = delta + head
    b_dk = tl.zeros([BN, PDK], dtype=tl.float32)
    b_dv = tl.zeros([BN, PDV], dtype=tl.float32)
    # Read ahead, so that the addresses of q and do never wait for it. Places without a query
    # stand for the last one, and see nothing.
    row = tl.load(p_rows + tl.minimum(place, num - 1)).to(tl.int64)
    for i in tl.range(0, num, BQ):
        following = tl.load(p_rows + tl.minimum(i + BQ + place, num - 1)).to(tl.int64)
        b_q = load_columns(p_q + (row * stride_qt)[:, None], DK, PDK)  # [BM, PDK]
        b_do = load_columns(p_do + (row * stride_dot)[:, None], DV, PDV)  # [BM, PDV]
        b_lse = tl.load(p_lse + row * (G * R))
        b_delta = tl.load(p_delta + row * (G * R))
        m_m = (i + place < num) & (place < BQ)
        b_seen = tl.load(p_seen + i + place, mask=m_m, other=0).to(tl.int32)
        b_several = b_seen >> 8
        b_seen = b_seen & 255
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_p = power(tl.fma(b_s, logit_scale, -b_lse[None, :]), PRECISION)
        b_p = tl.where(o_n[:, None] < b_seen[None, :], b_p, 0.0)
        b_dv = add_dot(b_dv, b_p.to(b_do.dtype), b_do, PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_ds = tl.where(o_n[:, None] < (b_seen * b_several)[None, :], b_ds, 0.0)
        b_dk = add_dot(b_dk, b_ds.to(b_q.dtype), b_q, PRECISION)
        row = following
    tile = (i_program - first_program).to(tl.int32) * BLOCK + first_key
    store_tile(dk + tile * DK, b_dk * scale, BN, DK, PDK)
    store_tile(dv + tile * DV, b_dv, BN, DV, PDV)


@triton.jit(do_not_specialize=["num_blocks", "num_own", "first_program", "end_program"])
def _add_programs_kernel(
    workspace,
    carried,
    carry,
    own,
    fetched,
    ends,
    block_rows,
    block_lengths,
    num_blocks,
    num_own,
    first_program,
    end_program,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    PD: tl.constexpr,
    PIECE_TILES: tl.constexpr,
):
    """Add what programs first_program..end_program-1 of one block left in the workspace, in order.

    On top of `carried`, what earlier programs of the block left; to `carry` when more will come.
    """
    block = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(1) * BN
    begin = tl.where(block > 0, tl.load(ends + tl.maximum(block - 1, 0)), 0)
    end = tl.load(ends + block)
    low = tl.maximum(begin, first_program)
    high = tl.minimum(end, end_program)
    if low >= high:
        return
    b_sum = tl.zeros([BN, PD], dtype=tl.float32)
    if begin < low:
        b_sum = load_tile(carried + first_key * D, BN, D, PD)
    o_in = tl.arange(0, BN)[:, None] * D + tl.arange(0, PD)[None, :]
    b_sum = add_tiles(
        b_sum, workspace + first_key * D + o_in, low - first_program, high - first_program,
        BLOCK * D, (tl.arange(0, PD) < D)[None, :], PIECE_TILES,
    )  # fmt: skip
    if end > high:
        store_tile(carry + first_key * D, b_sum, BN, D, PD)
        return
    i_g = block // num_blocks
    row = tl.load(block_rows + block)
    length = tl.load(block_lengths + block % num_blocks).to(tl.int32)
    p_out, _ = first_of(own, fetched, row, num_own, G * D, G * D)
    o_n = first_key + tl.arange(0, BN)
    o_d = tl.arange(0, PD)
    p_out += i_g * D + o_n[:, None] * (G * D) + o_d[None, :]
    mask = (o_n < length)[:, None] & (o_d < D)[None, :]
    tl.store(p_out, b_sum.to(own.dtype.element_ty), mask=mask)


def selected_backward(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    o: Tensor,
    log_sum: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    do: Tensor,
    segments: QuerySegments,
    select_block: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k_own, v_own, k_fetched and v_fetched, the arguments of forward.

    o and do [N, H, Dv], log_sum [N, H] the log-sum-exp as forward kept it; the last dimension of
    each contiguous. Besides the lists of lists.py this takes a workspace of
    at most WORKSPACE bytes.
    """
    sources = (k_own, v_own, k_fetched, v_fetched)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in sources]
    if not q.shape[0] or not block_lengths.shape[0]:
        return dq.zero_(), *grads
    groups, widths = k_own.shape[1], (k_own.shape[-1], v_own.shape[-1])
    ratio = q.shape[1] // groups
    delta = torch.empty_like(log_sum)
    strides = [stride for x in (q, *sources, do) for stride in x.stride()[:2]]
    shared: dict[str, Any] = {
        "G": groups,
        "R": ratio,
        "BLOCK": select_block,
        "DK": widths[0],
        "DV": widths[1],
        "PDK": padded(widths[0]),
        "PDV": padded(widths[1]),
        "PRECISION": precision(q),
        "enable_fp_fusion": False,
    }
    walk = walk_tiles(q, v_own, selected.shape[-1], select_block)[1]
    tokens, rows = token_tile(ratio, q.dtype)
    tiles = query_tiles(segments, tokens, "selected_base").table
    lists, counts = block_lists(selected, block_rows, block_lengths, tiles, tokens, select_block)
    _dq_kernel[(len(tiles), groups)](
        q, *sources, o, do, log_sum, delta, dq, tiles, lists, counts, k_own.shape[0], *strides,
        scale, logit_scale(q, scale), LENGTH=lists.shape[-1], EDGE_BLOCKS=EDGES,
        EXACT=q.dtype == torch.float32,
        APART=walk.apart, BT=tokens, BM=rows,
        BN=walk.keys, **shared, num_warps=walk.warps, num_stages=walk.stages,
        maxnreg=walk.registers,
    )  # fmt: skip
    del lists, counts

    shape = selected_dkv_tile(q, v_own, select_block)
    at_once = shape.rows // ratio
    most = at_once * PIECE
    space = [4 * select_block * width for width in widths]
    launch = max(1, WORKSPACE // sum(space) - 4)
    queries = query_lists(selected, block_lengths, segments, select_block, most, launch)
    blocks = (block_rows.contiguous(), block_lengths, block_lengths.shape[0], k_own.shape[0])
    programs = len(queries.owner)

    def empty(tiles: int) -> list[Tensor]:
        return [q.new_empty(tiles, select_block, w, dtype=torch.float32) for w in widths]

    workspace, carried, carry = empty(min(launch, programs)), empty(1), empty(1)
    for first in range(0, programs, launch):
        end = min(first + launch, programs)
        _dkv_kernel[(end - first, select_block // shape.keys)](
            q, *sources, do, log_sum, delta, *workspace, *queries, *blocks, *strides, first, scale,
            logit_scale(q, scale), MOST=most, BQ=at_once, BM=shape.rows, BN=shape.keys, **shared,
            num_warps=shape.warps, num_stages=shape.stages, maxnreg=shape.registers,
        )  # fmt: skip
        for i, width in enumerate(widths):
            _add_programs_kernel[(groups * block_lengths.shape[0], select_block // 8)](
                workspace[i], carried[i], carry[i], grads[i], grads[i + 2], queries.ends, *blocks,
                first, end, G=groups, BLOCK=select_block, BN=8, D=width, PD=padded(width),
                PIECE_TILES=PIECE, maxnreg=MOST_REGISTERS,
            )  # fmt: skip
        carried, carry = carry, carried
    return dq, *grads

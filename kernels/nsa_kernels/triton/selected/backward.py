"""Gradients of the selected branch: see forward.py.

The probabilities P are computed again from the log-sum-exp: dP = do v^T, dS = P (dP - delta) with
delta = sum of o do, dq = scale dS k, dk = scale dS^T q, dv = P^T do. dq walks the blocks of a tile
of tokens, as forward does. dk and dv walk, for each block, the queries that chose it, BQ of them
with their R heads at a time; long lists are shared out to programs whose float32 sums are then
added in order. Each sum has one owner and one order. On Hopper dq as well as dk and dv have kernels
of their own, see hopper_dq.py and hopper_dkv.py.

A gate g makes g P of P, see shared/gates.py. In dq, where queries are rows, it multiplies the sum.

A query that sees a single key has P = 1 and dS = 0, whatever rounding says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selected.blocks import (
    Blocks,
    Tiles,
    block_at,
    constants,
    first_of,
    load_block,
    load_columns,
    load_tile,
    load_whole,
    sources_of,
    sources_of_head,
    store_tile,
    tiles_of,
)
from nsa_kernels.triton.selected.hopper_dkv import HopperDkv
from nsa_kernels.triton.selected.hopper_dq import hopper_dq
from nsa_kernels.triton.selected.lists import (
    EDGES,
    block_lists,
    entry_chosen_by,
    entry_length,
    entry_row,
    query_lists,
)
from nsa_kernels.triton.shared.arguments import HeadRows, head_rows, load_head_rows, load_rows
from nsa_kernels.triton.shared.arithmetic import (
    PIECE,
    add_dot,
    add_tiles,
    filled,
    logit_scale,
    power,
    zeros,
)
from nsa_kernels.triton.shared.custom_ops import empty_as
from nsa_kernels.triton.shared.gates import gate_rows, load_gate
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import (
    MOST_REGISTERS,
    selected_dkv_gluon,
    selected_dkv_tile,
    selected_walk_gluon,
    token_tile,
    walk_tiles,
)
from nsa_kernels.triton.shared.tables import load_query_tile, query_tiles

# Bytes for what programs of dk and dv leave to be added; more programs run in several launches.
WORKSPACE = 256 << 20


class TileQueries(NamedTuple):
    """The query rows of a tile, in a kernel: q [BM, PDK], do [BM, PDV] and the log-sum-exp [BM]."""

    b_q: Any
    b_do: Any
    b_lse: Any


class PartialSums(NamedTuple):
    """Float32 sums over queries for dk or dv, each [.., BLOCK, D].

    workspace: of the programs of this launch; carried: of earlier ones of the block that is cut by
    its start; carry: for later ones. own, fetched: the gradients [E, G, D] and [F, G, D].
    """

    workspace: Any
    carried: Any
    carry: Any
    own: Any
    fetched: Any


class SumConstants(NamedTuple):
    """What the sum of partial sums is compiled for: BN rows of BLOCK at a time, widths DK and DV,
    PDK and PDV padded, PIECE summands of one running sum."""

    G: int
    BLOCK: int
    BN: int
    DK: int
    PDK: int
    DV: int
    PDV: int
    PIECE: int


@triton.jit
def _add_dq(
    b_dq,
    b_delta,
    queries,
    b_k,
    b_v,
    first_key,
    chose,
    b_seen,
    logit_scale,
    EDGE: tl.constexpr,
    TO_DELTA: tl.constexpr,
    C: tl.constexpr,
):
    """Add dS K over BN keys of a block to b_dq, or with TO_DELTA the sum of P dP to b_delta.

    For the rows that `chose` the block; EDGE and b_seen as in forward.
    """
    seen = chose[:, None]
    if EDGE:
        seen = seen & (first_key + tl.arange(0, C.BN)[None, :] < b_seen[:, None])
    b_s = tl.dot(queries.b_q, tl.trans(b_k), input_precision=C.PRECISION)  # [BM, BN]
    b_dp = tl.dot(queries.b_do, tl.trans(b_v), input_precision=C.PRECISION)  # [BM, BN]
    b_p = power(tl.fma(b_s, logit_scale, -queries.b_lse[:, None]), C)
    if TO_DELTA:
        b_delta += tl.sum(tl.where(seen, b_p * b_dp, 0.0), 1)
    else:
        b_ds = tl.where(seen, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, C, C.APART)  # [BM, PDK]
    return b_dq, b_delta


@triton.jit(do_not_specialize=["num_own"])
def _dq_kernel(
    q,
    sources,
    num_own,
    k_own_tiles,
    v_own_tiles,
    k_fetched_tiles,
    v_fetched_tiles,
    o,
    do,
    gate,
    log_sum,
    delta,
    dq,
    tiles,
    blocks,
    scale,
    logit_scale,
    EXACT: tl.constexpr,
    EDGE_BLOCKS: tl.constexpr,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
):
    """dq of one tile of tokens from its list of blocks, and delta for dk and dv.

    EXACT: delta as the sum of P dP, in a walk of its own. For a query with few keys dP and delta
    cancel, and then the rounding of o would be all that is left.
    """
    i_tile = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    first_row, num_tokens, position, _ = load_query_tile(tiles, i_tile)
    p_list = blocks.lists + (i_tile * C.G + i_g) * LENGTH
    count = tl.load(blocks.counts + i_tile * C.G + i_g)

    o_m = tl.arange(0, C.BM)
    token, head = o_m // C.R, i_g * C.R + o_m % C.R
    m_m = (token < num_tokens) & (token < C.BT)
    row = first_row + token
    row_head = row * (C.G * C.R) + head
    b_q = load_head_rows(q, row, head, m_m, C.DK, C.PDK)  # [BM, PDK]
    b_do = load_head_rows(do, row, head, m_m, C.DV, C.PDV)  # [BM, PDV]
    if EXACT:
        b_delta = filled(C.BM, 0.0)
    else:
        b_o = load_rows(o, row_head * C.DV, tl.arange(0, C.PDV), m_m, C.DV, C.PDV)  # [BM, PDV]
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    queries = TileQueries(b_q, b_do, tl.load(log_sum + row_head, mask=m_m, other=0.0))
    sources = sources_of_head(sources, i_g)
    kv_tiles = Tiles(k_own_tiles, v_own_tiles, k_fetched_tiles, v_fetched_tiles)

    b_dq = zeros(C.BM, C.PDK)
    b_dq_sum = b_dq  # With APART the tiles of a block are summed by themselves and then added.
    BM: tl.constexpr = C.BM
    several = tl.zeros([BM], dtype=tl.int1)
    first_edge = (position + 1) // C.BLOCK
    TILES: tl.constexpr = C.BLOCK // C.BN
    for i_pass in tl.static_range(0 if EXACT else 1, 2):
        # As in forward; not asked where that costs registers and does not help.
        if TILES == 1 or count > 0:
            entry = tl.load(p_list + EDGE_BLOCKS)
            for i in tl.range(0, count * TILES):
                following = tl.load(p_list + EDGE_BLOCKS + tl.minimum((i + 1) // TILES, count - 1))
                first_key = i % TILES * C.BN
                b_k, b_v = load_whole(
                    entry_row(entry), first_key, kv_tiles, sources, num_own, i_g, C
                )
                chose = entry_chosen_by(entry, token)
                b_dq, b_delta = _add_dq(
                    b_dq, b_delta, queries, b_k, b_v, first_key, chose, token, logit_scale, False,
                    i_pass == 0, C,
                )  # fmt: skip
                if C.APART:
                    ends = i % TILES == TILES - 1
                    b_dq_sum += tl.where(ends, b_dq, 0.0)
                    b_dq = tl.where(ends, 0.0, b_dq)
                several = several | chose
                entry = following
        for i in tl.range(0, EDGE_BLOCKS * TILES, num_stages=1):
            entry = tl.load(p_list + i // TILES)
            limit = entry_length(entry)
            if i % TILES * C.BN < limit:
                first_key = i % TILES * C.BN
                block = block_at(entry_row(entry), sources, num_own)
                b_k, b_v = load_block(block, first_key, limit, True, C)  # [BN, PDK], [BN, PDV]
                chose = entry_chosen_by(entry, token)
                b_seen = position + token + 1 - (first_edge + i // TILES) * C.BLOCK
                b_dq, b_delta = _add_dq(
                    b_dq, b_delta, queries, b_k, b_v, first_key, chose, b_seen, logit_scale, True,
                    i_pass == 0, C,
                )  # fmt: skip
                several = several | (chose & (b_seen > 1))
            if C.APART and i % TILES == TILES - 1:
                b_dq_sum += b_dq
                b_dq = zeros(C.BM, C.PDK)
    if C.APART:
        b_dq = b_dq_sum
    tl.store(delta + row_head, b_delta, mask=m_m)
    b_dq *= scale
    if gate is not None:
        b_dq *= load_gate(gate, row, head, m_m)[:, None]
    b_dq = tl.where(several[:, None], b_dq, 0.0)
    o_dk = tl.arange(0, C.PDK)
    p_dq = dq + row_head[:, None] * C.DK + o_dk[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_m[:, None] & (o_dk < C.DK)[None, :])


@triton.jit(do_not_specialize=["stride_group", "num_blocks", "num_own", "first_program"])
def _dkv_kernel(
    q,
    sources,
    num_own,
    do,
    gate,
    log_sum,
    delta,
    dk,
    dv,
    queries,
    blocks,
    stride_group,
    num_blocks,
    first_program,
    scale,
    logit_scale,
    MOST: tl.constexpr,
    C: tl.constexpr,
):
    """dk, dv of BN keys of a block from at most MOST of its queries, to a float32 workspace."""
    i_program = tl.load(queries.order + first_program + tl.program_id(0))
    first_key = tl.program_id(1) * C.BN
    i_block = tl.load(queries.owner + i_program)
    if i_block >= C.G * num_blocks:
        return
    i_g = i_block // num_blocks
    before = tl.where(i_block > 0, tl.load(queries.ends + tl.maximum(i_block - 1, 0)), 0)
    begin = tl.load(queries.starts + i_block) + (i_program - before) * MOST
    num = tl.minimum(tl.load(queries.starts + i_block + 1) - begin, MOST).to(tl.int32)
    # Every program has a query. Where the loop may be empty, ptxas makes each wgmma wait for the
    # one before.
    if num <= 0:
        return
    start = tl.load(blocks.rows + i_g * stride_group + i_block % num_blocks)
    length = tl.load(blocks.lengths + i_block % num_blocks).to(tl.int32)
    block = block_at(start, sources_of_head(sources, i_g), num_own)
    b_k, b_v = load_block(block, first_key, length, True, C)  # [BN, PDK], [BN, PDV]

    o_m = tl.arange(0, C.BM)
    o_dk = tl.arange(0, C.PDK)
    o_dv = tl.arange(0, C.PDV)
    o_n = first_key + tl.arange(0, C.BN)
    place = o_m // C.R
    head = i_g * C.R + o_m % C.R
    p_rows = queries.rows + begin
    p_seen = queries.seen + begin
    p_q = q.p + (head * q.stride_head)[:, None] + o_dk[None, :]
    p_do = do.p + (head * do.stride_head)[:, None] + o_dv[None, :]
    p_lse = log_sum + head
    p_delta = delta + head
    b_dk = zeros(C.BN, C.PDK)
    b_dv = zeros(C.BN, C.PDV)
    # Read ahead, so that the addresses of q and do never wait for it. Places without a query
    # stand for the last one, and see nothing.
    row = tl.load(p_rows + tl.minimum(place, num - 1)).to(tl.int64)
    for i in tl.range(0, num, C.BT):
        following = tl.load(p_rows + tl.minimum(i + C.BT + place, num - 1)).to(tl.int64)
        b_q = load_columns(p_q + (row * q.stride_row)[:, None], C.DK, C.PDK)  # [BM, PDK]
        b_do = load_columns(p_do + (row * do.stride_row)[:, None], C.DV, C.PDV)  # [BM, PDV]
        b_lse = tl.load(p_lse + row * (C.G * C.R))
        b_delta = tl.load(p_delta + row * (C.G * C.R))
        m_m = (i + place < num) & (place < C.BT)
        b_seen = tl.load(p_seen + i + place, mask=m_m, other=0).to(tl.int32)
        b_several = b_seen >> 8
        b_seen = b_seen & 255
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=C.PRECISION)  # [BN, BM]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=C.PRECISION)  # [BN, BM]
        b_p = power(tl.fma(b_s, logit_scale, -b_lse[None, :]), C)
        if gate is not None:
            b_p *= load_gate(gate, row, head, m_m)[None, :]
        b_p = tl.where(o_n[:, None] < b_seen[None, :], b_p, 0.0)
        b_dv = add_dot(b_dv, b_p.to(b_do.dtype), b_do, C)  # [BN, PDV]
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_ds = tl.where(o_n[:, None] < (b_seen * b_several)[None, :], b_ds, 0.0)
        b_dk = add_dot(b_dk, b_ds.to(b_q.dtype), b_q, C)  # [BN, PDK]
        row = following
    tile = (i_program - first_program).to(tl.int32) * C.BLOCK + first_key
    store_tile(dk + tile * C.DK, b_dk * scale, C.BN, C.DK, C.PDK)
    store_tile(dv + tile * C.DV, b_dv, C.BN, C.DV, C.PDV)


@triton.jit
def _add_programs(
    sums, num_own, ends, blocks, stride_group, num_blocks, i_rows, first_program, end_program,
    D: tl.constexpr, PD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows i_rows*BN.. of one block, of dk or dv: see `_add_programs_kernel`."""
    i_block = tl.program_id(0).to(tl.int64)
    first_key = i_rows * C.BN
    begin = tl.where(i_block > 0, tl.load(ends + tl.maximum(i_block - 1, 0)), 0)
    end = tl.load(ends + i_block)
    low = tl.maximum(begin, first_program)
    high = tl.minimum(end, end_program)
    if low < high:
        b_sum = zeros(C.BN, PD)
        if begin < low:
            b_sum = load_tile(sums.carried + first_key * D, C.BN, D, PD)
        o_in = tl.arange(0, C.BN)[:, None] * D + tl.arange(0, PD)[None, :]
        b_sum = add_tiles(
            b_sum, sums.workspace + first_key * D + o_in, low - first_program,
            high - first_program, C.BLOCK * D, (tl.arange(0, PD) < D)[None, :], C.PIECE,
        )  # fmt: skip
        if end > high:
            store_tile(sums.carry + first_key * D, b_sum, C.BN, D, PD)
        else:
            i_g = i_block // num_blocks
            row = tl.load(blocks.rows + i_g * stride_group + i_block % num_blocks)
            length = tl.load(blocks.lengths + i_block % num_blocks).to(tl.int32)
            own, fetched = sums.own, sums.fetched
            p_out, _ = first_of(
                HeadRows(own, C.G * D, D), HeadRows(fetched, C.G * D, D), row, num_own
            )
            o_n = first_key + tl.arange(0, C.BN)
            o_d = tl.arange(0, PD)
            p_out += i_g * D + o_n[:, None] * (C.G * D) + o_d[None, :]
            mask = (o_n < length)[:, None] & (o_d < D)[None, :]
            tl.store(p_out, b_sum.to(own.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["stride_group", "num_blocks", "num_own", "first_program", "end_program"]
)
def _add_programs_kernel(
    dk_sums, dv_sums, num_own, ends, blocks, stride_group, num_blocks, first_program, end_program,
    C: tl.constexpr,
):  # fmt: skip
    """Add what programs first_program..end_program-1 of one block left in the workspace, in order.

    On top of `carried`, what earlier programs of the block left; to `carry` when more will come.
    The first BLOCK/BN programs of the last dimension of the grid add dk, as many after them dv.
    """
    i_rows = tl.program_id(1)
    if i_rows < C.BLOCK // C.BN:
        _add_programs(
            dk_sums, num_own, ends, blocks, stride_group, num_blocks, i_rows, first_program,
            end_program, C.DK, C.PDK, C,
        )  # fmt: skip
    else:
        i_rows -= C.BLOCK // C.BN
        _add_programs(
            dv_sums, num_own, ends, blocks, stride_group, num_blocks, i_rows, first_program,
            end_program, C.DV, C.PDV, C,
        )  # fmt: skip


def selected_backward(
    q_NHD: Tensor,
    k_own_EGD: Tensor,
    v_own_EGD: Tensor,
    k_fetched_FGD: Tensor,
    v_fetched_FGD: Tensor,
    o_NHD: Tensor,
    log_sum_NH: Tensor,
    selected_NGn: Tensor,
    block_rows_GB: Tensor,
    block_lengths_B: Tensor,
    do_NHD: Tensor,
    segments: QuerySegments,
    select_block: int,
    scale: float,
    gate_NH: Tensor | None = None,
    into_NHD: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k_own, v_own, k_fetched and v_fetched, the arguments of forward; and delta.

    o and do [N, H, Dv], log_sum [N, H] the log-sum-exp as forward kept it; the last dimension of
    each contiguous. With a gate [N, H], of any floating dtype and strides, do is the gradient of
    the gated sum, and the gradients are those of g o. delta, the gate's gradient, is float32
    [N, H]. Besides the lists of lists.py this takes a workspace of at most WORKSPACE bytes.
    """
    tensors = [k_own_EGD, v_own_EGD, k_fetched_FGD, v_fetched_FGD]
    dq_NHD = empty_as(q_NHD) if into_NHD is None else into_NHD
    grads = [empty_as(x) for x in tensors]
    torch._foreach_zero_(grads)  # One launch. Rows of blocks that no query chose stay zero.
    num_blocks, num_own = block_lengths_B.shape[0], k_own_EGD.shape[0]
    if not q_NHD.shape[0] or not num_blocks:
        return dq_NHD.zero_(), *grads, torch.zeros_like(log_sum_NH)
    ratio = q_NHD.shape[1] // k_own_EGD.shape[1]
    delta_NH = empty_as(log_sum_NH)
    q, do, sources = head_rows(q_NHD), head_rows(do_NHD), sources_of(tensors)
    gate = gate_rows(gate_NH)
    in_logits = logit_scale(q_NHD, scale)
    walk = walk_tiles(q_NHD, v_own_EGD, selected_NGn.shape[-1], select_block)[1]
    tokens, rows = token_tile(ratio, q_NHD.dtype)
    C = constants(
        q_NHD, v_own_EGD, select_block, tokens=tokens, rows=rows, keys=walk.keys, apart=walk.apart
    )
    tiles = query_tiles(segments, tokens, "selected_base").table
    lists = block_lists(selected_NGn, block_rows_GB, block_lengths_B, tiles, tokens, select_block)
    if selected_walk_gluon(q_NHD, v_own_EGD, select_block, walk) and any(map(len, tensors)):
        hopper_dq(
            q_NHD, tensors, o_NHD, do_NHD, gate_NH, log_sum_NH, delta_NH, dq_NHD, tiles, lists,
            scale, in_logits,
        )  # fmt: skip
    else:
        launcher(_dq_kernel, (len(tiles), C.G))(
            q, sources, num_own, *tiles_of(tensors, walk), o_NHD, do, gate, log_sum_NH, delta_NH,
            dq_NHD, tiles, lists, scale, in_logits, EXACT=q_NHD.dtype == torch.float32,
            EDGE_BLOCKS=EDGES, LENGTH=lists.lists.shape[-1], C=C, num_warps=walk.warps,
            num_stages=walk.stages, maxnreg=walk.registers, enable_fp_fusion=False,
        )  # fmt: skip
    del lists

    tile = selected_dkv_tile(q_NHD, v_own_EGD, select_block)
    gluon = selected_dkv_gluon(q_NHD, v_own_EGD, select_block) and any(map(len, tensors))
    rows = 64 if gluon else tile.rows
    C = constants(q_NHD, v_own_EGD, select_block, tokens=rows // ratio, rows=rows, keys=tile.keys)
    most, widths = C.BT * PIECE, (C.DK, C.DV)
    in_sums = SumConstants(C.G, select_block, 8, C.DK, C.PDK, C.DV, C.PDV, PIECE)
    launch = max(1, WORKSPACE // (4 * select_block * sum(widths)) - 4)
    queries = query_lists(selected_NGn, block_lengths_B, segments, select_block, most, launch)
    blocks, stride_group = Blocks(block_rows_GB, block_lengths_B), block_rows_GB.stride(0)
    programs = queries.owner.shape[0]

    def empty(tiles: int) -> list[Tensor]:
        return [q_NHD.new_empty(tiles, select_block, w, dtype=torch.float32) for w in widths]

    if gluon:
        run_programs = HopperDkv(
            q_NHD, do_NHD, tensors, log_sum_NH, delta_NH, gate_NH, queries, blocks, scale,
            in_logits, most,
        )  # fmt: skip
    workspace = carried = carry = empty(min(launch, programs))
    if programs > launch:
        carried, carry = empty(1), empty(1)
    for first in range(0, programs, launch):
        end = min(first + launch, programs)
        if gluon:
            run_programs(workspace[0], workspace[1], first, end)
        else:
            launcher(_dkv_kernel, (end - first, select_block // tile.keys))(
                q, sources, num_own, do, gate, log_sum_NH, delta_NH, *workspace, queries, blocks,
                stride_group, num_blocks, first, scale, in_logits, MOST=most, C=C,
                num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
                enable_fp_fusion=False,
            )  # fmt: skip
        sums = map(PartialSums, workspace, carried, carry, grads[:2], grads[2:])
        launcher(_add_programs_kernel, (C.G * num_blocks, 2 * (select_block // 8)))(
            *sums, num_own, queries.ends, blocks, stride_group, num_blocks, first, end, C=in_sums,
            maxnreg=MOST_REGISTERS,
        )  # fmt: skip
        carried, carry = carry, carried
    return dq_NHD, *grads, delta_NH

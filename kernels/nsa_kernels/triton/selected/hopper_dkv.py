"""dk and dv of the selected branch on Hopper, in Gluon: see backward.py for the maths.

A multiprocessor holds two workers, each a warpgroup that multiplies and a warp that loads for it. A
worker takes a block and at most MOST of its queries, and keeps 64 keys and values in shared memory
and dk, dv [64, D] in registers. The loading warp walks the list of queries. A
token's R heads are R adjacent rows of q, so TMA gathers a tile of 64 rows from 64 / R tokens, in
halves of 64 channels, as the matrix instructions want them: [half, token, head, 64] in memory is a
swizzled [64 rows, D] tile.

Keys are the rows of all products, S^T = k q^T and dP^T = v do^T: so P and dS stay in registers as
the left operands of dv += P do and dk += dS q, and what TMA reads behind the end of a document
stays in rows that nobody stores. The product S of the next tile runs beside dS q of this one. The
two workers share nothing, so that one multiplies while the other computes exponentials; that they
begin and end together lets the GPU spread programs of unequal length over its multiprocessors.

What a column needs (log-sum-exp, delta, gate, keys seen) is loaded by the warpgroup itself, a
number a thread, one tile ahead, and goes round through shared memory. Places behind the last query
repeat it with a log-sum-exp of infinity: P = 0. Only tiles up to the last query that does not see
the whole block compare positions; queries stand in order, so these are the first.

At widths of 192 and 128, dk and dv take the registers of half of a tile: there it has 32 rows.

Letters: TT tokens of a tile, KH and VH halves of a row of q and do, three of 192 channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_kernels.triton.selected.blocks import own_and_fetched, with_rows
from nsa_kernels.triton.shared.hopper import (
    add_products,
    append,
    channel_parts,
    for_tma,
    host_part_width,
    multiply_rows,
    part_width,
    parts_of,
    tile_layout,
    wait_for_sums,
)
from nsa_kernels.triton.shared.launch import descriptor, launcher

WORKERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # keys of a block
HALF = gl.constexpr(64)  # channels that a swizzled row of shared memory has
SEVERAL = gl.constexpr(256)  # see QueryLists.seen


@gluon.constexpr_function
def _tile_rows(width: int) -> int:
    """Query rows of a tile, at this width of queries."""
    return 32 if width == 192 else 64


@gluon.constexpr_function
def _q_stages(width: int) -> int:
    """Tiles of q in flight."""
    return 4 if width == 192 else 3


@gluon.constexpr_function
def _do_stages(width: int) -> int:
    """Tiles of do in flight, at this width of queries."""
    return 3 if width == 192 else 2


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _program(
    order, owner, ends, starts, first_program, p, num_programs, none, MOST: gl.constexpr
):  # fmt: skip
    """Program, its (group, block), where its queries begin, and how many it has, maybe none."""
    there = p < num_programs
    i_program = gl.load(order + first_program + gl.where(there, p, 0))
    i_block = gl.load(owner + i_program)
    there = there & (i_block < none)
    i_block = gl.where(there, i_block, 0)
    before = gl.where(i_block > 0, gl.load(ends + gl.maximum(i_block - 1, 0)), 0)
    begin = gl.load(starts + i_block) + (i_program - before) * MOST
    num = gl.minimum(gl.load(starts + i_block + 1) - begin, MOST)
    return i_program, i_block, begin, gl.where(there, num, 0).to(gl.int32)


@gluon.jit
def _load_warp(
    w: gl.constexpr, q_desc, do_desc, k_own, v_own, k_fetched, v_fetched, k_column, v_column,
    k_fetched_column, v_fetched_column, num_own, order, owner, ends, starts, rows, block_rows,
    group_step, num_blocks, first_program, num_programs, q_c, do_c, k_s, v_s, q_full, q_empty,
    do_full, do_empty, kv_full, G: gl.constexpr, R: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, FETCHED: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """The loads of worker w."""
    Q_ROWS: gl.constexpr = _tile_rows(DK)
    Q_STAGES: gl.constexpr = _q_stages(DK)
    DO_STAGES: gl.constexpr = _do_stages(DK)
    PARTS: gl.constexpr = channel_parts(DK)
    TT: gl.constexpr = Q_ROWS // R
    KH: gl.constexpr = DK // HALF
    VH: gl.constexpr = DV // HALF
    p = gl.program_id(0) * WORKERS + w
    _, i_block, begin, num = _program(
        order, owner, ends, starts, first_program, p, num_programs, num_blocks * G, MOST
    )
    if num > 0:
        i_g = (i_block // num_blocks).to(gl.int32)
        row = gl.load(block_rows + i_block + i_g * group_step).to(gl.int32)
        mbarrier.expect(kv_full.index(w), ROWS * (DK + DV) * 2)
        if FETCHED and row >= num_own:
            for part in gl.static_range(PARTS):
                column = i_g * k_fetched_column + part * part_width(DK)
                tma.async_copy_global_to_shared(
                    k_fetched, [row - num_own, column], kv_full.index(w),
                    k_s.index(w * PARTS + part),
                )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_fetched, [row - num_own, i_g * v_fetched_column], kv_full.index(w), v_s.index(w)
            )
        else:
            for part in gl.static_range(PARTS):
                column = i_g * k_column + part * part_width(DK)
                tma.async_copy_global_to_shared(
                    k_own, [row, column], kv_full.index(w), k_s.index(w * PARTS + part)
                )
            tma.async_copy_global_to_shared(
                v_own, [row, i_g * v_column], kv_full.index(w), v_s.index(w)
            )
        p_rows = rows + begin
        q_stage = gl.to_tensor(0)
        q_phase = gl.to_tensor(1)
        do_stage = gl.to_tensor(0)
        do_phase = gl.to_tensor(1)
        for i in range(0, num, TT):
            q_at = w * Q_STAGES + q_stage
            do_at = w * DO_STAGES + do_stage
            mbarrier.wait(q_empty.index(q_at), q_phase)
            mbarrier.expect(q_full.index(q_at), Q_ROWS * DK * 2)
            for t in gl.static_range(TT):
                token = gl.load(p_rows + gl.minimum(i + t, num - 1))
                for half in gl.static_range(KH):
                    tma.async_copy_global_to_shared(
                        q_desc, [token, i_g * R, half * HALF], q_full.index(q_at),
                        q_c.index((q_at * KH + half) * TT + t),
                    )  # fmt: skip
            mbarrier.wait(do_empty.index(do_at), do_phase)
            mbarrier.expect(do_full.index(do_at), Q_ROWS * DV * 2)
            for t in gl.static_range(TT):
                token = gl.load(p_rows + gl.minimum(i + t, num - 1))
                for half in gl.static_range(VH):
                    tma.async_copy_global_to_shared(
                        do_desc, [token, i_g * R, half * HALF], do_full.index(do_at),
                        do_c.index((do_at * VH + half) * TT + t),
                    )  # fmt: skip
            q_stage, q_phase = _advance(q_stage, q_phase, Q_STAGES)
            do_stage, do_phase = _advance(do_stage, do_phase, DO_STAGES)


@gluon.jit
def _load_rows(p_rows, i, num, place, TT: gl.constexpr):
    """The rows of tile i's queries, [64]; the last one's behind it."""
    return gl.load(p_rows + gl.minimum(i * TT + place, num - 1))


@gluon.jit
def _load_columns(
    row, i, num, place, head, p_seen, log_sum, delta, gate, gate_row, gate_head, H: gl.constexpr,
    TT: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Of tile i's queries: lse, delta, the gate and how many keys they see, [64] each."""
    row = row.to(gl.int64)
    at = row * H + head
    there = i * TT + place < num
    b_lse = gl.where(there, gl.load(log_sum + at), float("inf"))
    b_delta = gl.load(delta + at)
    b_gate = b_delta
    if GATED:
        b_gate = gl.load(gate + row * gate_row + head * gate_head).to(gl.float32)
    b_seen = gl.load(p_seen + gl.minimum(i * TT + place, num - 1)).to(gl.int32)
    return b_lse, b_delta, b_gate, b_seen


@gluon.jit
def _step(
    w: gl.constexpr, i, tiles, num, b_s, b_dk, b_dv, row, b_lse, b_delta, b_gate, b_seen, k, v, q_t,
    do_t, lse_s, delta_s, gate_s, seen_s, q_full, q_empty, do_full, do_empty, q_stage, q_phase,
    do_stage, do_phase, p_rows, p_seen, place, head, o_n, log_sum, delta, gate, gate_row, gate_head,
    logit_scale, MASKED: gl.constexpr, H: gl.constexpr, R: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Tile i of a program's queries; b_s is its k q^T. Issues that of the next beside dS q."""
    Q_ROWS: gl.constexpr = _tile_rows(DK)
    Q_STAGES: gl.constexpr = _q_stages(DK)
    DO_STAGES: gl.constexpr = _do_stages(DK)
    PARTS: gl.constexpr = channel_parts(DK)
    TT: gl.constexpr = Q_ROWS // R
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q_ROWS, 16])
    DK_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, part_width(DK), 16])
    DV_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_L)
    zero = gl.zeros([ROWS, Q_ROWS], gl.float32, S_L)
    lse_s.index(w).store(b_lse)
    delta_s.index(w).store(b_delta)
    if GATED:
        gate_s.index(w).store(b_gate)
    if MASKED:
        seen_s.index(w).store(b_seen)
    b_lse, b_delta, b_gate, b_seen = _load_columns(
        row, i + 1, num, place, head, p_seen, log_sum, delta, gate, gate_row, gate_head, H, TT,
        GATED,
    )  # fmt: skip
    row = _load_rows(p_rows, i + 2, num, place, TT)

    do_at = w * DO_STAGES + do_stage
    mbarrier.wait(do_full.index(do_at), do_phase)
    b_do = do_t.index(do_at)
    # dP - delta as a product on top of -delta: one number less to hold beside P and dP.
    b_dp = zero - gl.expand_dims(delta_s.index(w).load(COLUMN), 0)
    a_dp = warpgroup_mma(v, b_do.permute((1, 0)), b_dp, is_async=True)
    c_lse = lse_s.index(w).load(COLUMN)
    b_p = gl.exp2(gl.fma(b_s, logit_scale, gl.expand_dims(-c_lse, 0)))
    if GATED:
        b_p = b_p * gl.expand_dims(gate_s.index(w).load(COLUMN), 0)
    if MASKED:
        c_seen = seen_s.index(w).load(COLUMN)
        b_p = gl.where(gl.expand_dims(o_n, 1) < gl.expand_dims(c_seen & 255, 0), b_p, 0.0)
    b_p16 = gl.convert_layout(b_p.to(q_t.dtype), gl.DotOperandLayout(0, DV_L, 2))
    a_dv = warpgroup_mma(b_p16, b_do, b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, deps=(a_dp,))
    b_ds = b_p * b_dp
    if MASKED:
        c_several = (c_seen & 255) * (c_seen >> 8)
        b_ds = gl.where(gl.expand_dims(o_n, 1) < gl.expand_dims(c_several, 0), b_ds, 0.0)
    b_ds16 = gl.convert_layout(b_ds.to(q_t.dtype), gl.DotOperandLayout(0, DK_L, 2))
    q_at = w * Q_STAGES + q_stage
    a_dk = add_products(b_ds16, parts_of(q_t, q_at, Q_ROWS, DK), b_dk)
    # The last tile computes its own S again, which nobody reads.
    more = i + 1 < tiles
    next_stage, next_phase = _advance(q_stage, q_phase, Q_STAGES)
    next_stage = gl.where(more, next_stage, q_stage)
    next_phase = gl.where(more, next_phase, q_phase)
    next_at = w * Q_STAGES + next_stage
    mbarrier.wait(q_full.index(next_at), next_phase)
    a_s = multiply_rows(k, parts_of(q_t, next_at, Q_ROWS, DK), zero, False)
    b_dv, b_p16 = warpgroup_mma_wait(2 * PARTS, deps=(a_dv, b_p16))
    mbarrier.arrive(do_empty.index(do_at), count=1)
    b_dk, b_ds16 = wait_for_sums(PARTS, a_dk, b_ds16)
    b_s = warpgroup_mma_wait(0, deps=(a_s,))
    mbarrier.arrive(q_empty.index(q_at), count=1)
    do_stage, do_phase = _advance(do_stage, do_phase, DO_STAGES)
    return (
        b_s, b_dk, b_dv, row, b_lse, b_delta, b_gate, b_seen, next_stage, next_phase, do_stage,
        do_phase,
    )  # fmt: skip


@gluon.jit
def _multiply(
    w: gl.constexpr, dk, dv, order, owner, ends, starts, rows, seen, log_sum, delta, gate, gate_row,
    gate_head, num_blocks, first_program, num_programs, scale, logit_scale, q_t, do_t, k_s, v_s,
    lse_s, delta_s, gate_s, seen_s, q_full, q_empty, do_full, do_empty, kv_full,
    G: gl.constexpr, R: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, GATED: gl.constexpr,
    MOST: gl.constexpr,
):  # fmt: skip
    """The products of worker w."""
    Q_ROWS: gl.constexpr = _tile_rows(DK)
    Q_STAGES: gl.constexpr = _q_stages(DK)
    PARTS: gl.constexpr = channel_parts(DK)
    PART: gl.constexpr = part_width(DK)
    TT: gl.constexpr = Q_ROWS // R
    H: gl.constexpr = G * R
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q_ROWS, 16])
    DK_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    DV_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    k = parts_of(k_s, w, ROWS, DK)
    v = v_s.index(w)
    p = gl.program_id(0) * WORKERS + w
    i_program, i_block, begin, num = _program(
        order, owner, ends, starts, first_program, p, num_programs, num_blocks * G, MOST
    )
    if num > 0:
        o_m = gl.arange(0, Q_ROWS, layout=LINE)
        place = o_m // R
        o_n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L))
        head = (i_block // num_blocks).to(gl.int32) * R + o_m % R
        p_rows = rows + begin
        p_seen = seen + begin
        tiles = (num + TT - 1) // TT
        row = _load_rows(p_rows, 0, num, place, TT)
        b_lse, b_delta, b_gate, b_seen = _load_columns(
            row, 0, num, place, head, p_seen, log_sum, delta, gate, gate_row, gate_head, H, TT,
            GATED,
        )  # fmt: skip
        row = _load_rows(p_rows, 1, num, place, TT)
        o_p = gl.arange(0, MOST, layout=LINE)
        all_seen = gl.load(p_seen + gl.minimum(o_p, num - 1)).to(gl.int32)
        partly = gl.where((all_seen != ROWS + SEVERAL) & (o_p < num), o_p // TT + 1, 0)
        masked = gl.max(partly, 0)

        b_dk = ()
        for _part in gl.static_range(PARTS):
            b_dk = append(b_dk, gl.zeros([ROWS, PART], gl.float32, DK_L))
        b_dv = gl.zeros([ROWS, DV], gl.float32, DV_L)
        q_stage = gl.to_tensor(0)
        q_phase = gl.to_tensor(0)
        do_stage = gl.to_tensor(0)
        do_phase = gl.to_tensor(0)
        mbarrier.wait(kv_full.index(w), 0)
        mbarrier.wait(q_full.index(w * Q_STAGES), 0)
        q = parts_of(q_t, w * Q_STAGES, Q_ROWS, DK)
        a_s = multiply_rows(k, q, gl.zeros([ROWS, Q_ROWS], gl.float32, S_L), False)
        b_s = warpgroup_mma_wait(0, deps=(a_s,))
        for i in range(masked):
            (
                b_s, b_dk, b_dv, row, b_lse, b_delta, b_gate, b_seen, q_stage, q_phase,
                do_stage, do_phase,
            ) = _step(
                w, i, tiles, num, b_s, b_dk, b_dv, row, b_lse, b_delta, b_gate, b_seen, k, v,
                q_t, do_t, lse_s, delta_s, gate_s, seen_s, q_full, q_empty, do_full, do_empty,
                q_stage, q_phase, do_stage, do_phase, p_rows, p_seen, place, head, o_n, log_sum,
                delta, gate, gate_row, gate_head, logit_scale, True, H, R, DK, DV, GATED,
            )  # fmt: skip
        for i in range(masked, tiles):
            (
                b_s, b_dk, b_dv, row, b_lse, b_delta, b_gate, b_seen, q_stage, q_phase,
                do_stage, do_phase,
            ) = _step(
                w, i, tiles, num, b_s, b_dk, b_dv, row, b_lse, b_delta, b_gate, b_seen, k, v,
                q_t, do_t, lse_s, delta_s, gate_s, seen_s, q_full, q_empty, do_full, do_empty,
                q_stage, q_phase, do_stage, do_phase, p_rows, p_seen, place, head, o_n, log_sum,
                delta, gate, gate_row, gate_head, logit_scale, False, H, R, DK, DV, GATED,
            )  # fmt: skip
        first = (i_program - first_program) * ROWS
        o_k = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, DK_L)), 1) * DK
        o_k += gl.expand_dims(gl.arange(0, PART, layout=gl.SliceLayout(0, DK_L)), 0)
        for part in gl.static_range(PARTS):
            gl.store(dk + first * DK + part * PART + o_k, b_dk[part] * scale)
        o_v = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, DV_L)), 1) * DV
        o_v += gl.expand_dims(gl.arange(0, DV, layout=gl.SliceLayout(0, DV_L)), 0)
        gl.store(dv + first * DV + o_v, b_dv)


@gluon.jit
def _hopper_block_dkv_kernel(
    q_desc, do_desc, k_own, v_own, k_fetched, v_fetched, k_column, v_column, k_fetched_column,
    v_fetched_column, num_own, log_sum, delta, gate, gate_row, gate_head, dk, dv, order, owner,
    ends, starts, rows, seen, block_rows, group_step, num_blocks, first_program, num_programs,
    scale, logit_scale, G: gl.constexpr, R: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    FETCHED: gl.constexpr, GATED: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """As `_dkv_kernel` of backward.py, for programs first_program.. of a launch.

    group_step: how far the rows of the blocks of one group are from those of the next, less
    num_blocks.
    """
    Q_ROWS: gl.constexpr = _tile_rows(DK)
    Q_STAGES: gl.constexpr = _q_stages(DK)
    DO_STAGES: gl.constexpr = _do_stages(DK)
    PARTS: gl.constexpr = channel_parts(DK)
    PART: gl.constexpr = part_width(DK)
    TT: gl.constexpr = Q_ROWS // R
    dtype: gl.constexpr = q_desc.dtype
    q_c = gl.allocate_shared_memory(
        dtype, [WORKERS * Q_STAGES * (DK // HALF) * TT, 1, R, HALF], q_desc.layout
    )
    do_c = gl.allocate_shared_memory(
        dtype, [WORKERS * DO_STAGES * (DV // HALF) * TT, 1, R, HALF], do_desc.layout
    )
    k_s = gl.allocate_shared_memory(dtype, [WORKERS * PARTS, ROWS, PART], k_own.layout)
    v_s = gl.allocate_shared_memory(dtype, [WORKERS, ROWS, DV], v_own.layout)
    q_t = q_c._reinterpret(dtype, [WORKERS * Q_STAGES * PARTS, Q_ROWS, PART], k_own.layout)
    do_t = do_c._reinterpret(dtype, [WORKERS * DO_STAGES, Q_ROWS, DV], v_own.layout)
    COLUMNS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_s = gl.allocate_shared_memory(gl.float32, [WORKERS, Q_ROWS], COLUMNS)
    delta_s = gl.allocate_shared_memory(gl.float32, [WORKERS, Q_ROWS], COLUMNS)
    gate_s = gl.allocate_shared_memory(gl.float32, [WORKERS, Q_ROWS], COLUMNS)
    seen_s = gl.allocate_shared_memory(gl.int32, [WORKERS, Q_ROWS], COLUMNS)
    B_L: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [WORKERS * Q_STAGES, 1], B_L)
    q_empty = gl.allocate_shared_memory(gl.int64, [WORKERS * Q_STAGES, 1], B_L)
    do_full = gl.allocate_shared_memory(gl.int64, [WORKERS * DO_STAGES, 1], B_L)
    do_empty = gl.allocate_shared_memory(gl.int64, [WORKERS * DO_STAGES, 1], B_L)
    kv_full = gl.allocate_shared_memory(gl.int64, [WORKERS, 1], B_L)
    for i in gl.static_range(WORKERS * Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(WORKERS * DO_STAGES):
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=1)
    for i in gl.static_range(WORKERS):
        mbarrier.init(kv_full.index(i), count=1)
    # Arguments are written out: a constant of a tuple with a name would become a tensor.
    gl.warp_specialize([
        (_multiply, (
            0, dk, dv, order, owner, ends, starts, rows, seen, log_sum, delta, gate, gate_row,
            gate_head, num_blocks, first_program, num_programs, scale, logit_scale, q_t, do_t, k_s,
            v_s, lse_s, delta_s, gate_s, seen_s, q_full, q_empty, do_full, do_empty, kv_full, G,
            R, DK, DV, GATED, MOST,
        )),
        (_multiply, (
            1, dk, dv, order, owner, ends, starts, rows, seen, log_sum, delta, gate, gate_row,
            gate_head, num_blocks, first_program, num_programs, scale, logit_scale, q_t, do_t, k_s,
            v_s, lse_s, delta_s, gate_s, seen_s, q_full, q_empty, do_full, do_empty, kv_full, G,
            R, DK, DV, GATED, MOST,
        )),
        (_load_warp, (
            0, q_desc, do_desc, k_own, v_own, k_fetched, v_fetched, k_column, v_column,
            k_fetched_column, v_fetched_column, num_own, order, owner, ends, starts, rows,
            block_rows, group_step, num_blocks, first_program, num_programs, q_c, do_c, k_s, v_s,
            q_full, q_empty, do_full, do_empty, kv_full, G, R, DK, DV, FETCHED, MOST,
        )),
        (_load_warp, (
            1, q_desc, do_desc, k_own, v_own, k_fetched, v_fetched, k_column, v_column,
            k_fetched_column, v_fetched_column, num_own, order, owner, ends, starts, rows,
            block_rows, group_step, num_blocks, first_program, num_programs, q_c, do_c, k_s, v_s,
            q_full, q_empty, do_full, do_empty, kv_full, G, R, DK, DV, FETCHED, MOST,
        )),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


def _queries(x: Tensor, ratio: int, layout: Any) -> TensorDescriptor:
    made: TensorDescriptor = descriptor(
        x, x.shape, x.stride(), (1, ratio, HALF.value), layout, TensorDescriptor
    )
    return made


def _keys(x: Tensor, layout: Any) -> TensorDescriptor:
    """Of x [rows, G, D] as a matrix whose row has all heads, each from its stride on."""
    shape, strides = (x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]), (x.stride(0), 1)
    block = ROWS.value, host_part_width(x.shape[2])
    made: TensorDescriptor = descriptor(x, shape, strides, block, layout, TensorDescriptor)
    return made


class HopperDkv:
    """What the launches of the kernel share. tensors: k_own, v_own, k_fetched, v_fetched."""

    def __init__(
        self,
        q_NHD: Tensor,
        do_NHD: Tensor,
        tensors: list[Tensor],
        log_sum_NH: Tensor,
        delta_NH: Tensor,
        gate_NH: Tensor | None,
        queries: Any,
        blocks: Any,
        scale: float,
        logit_scale: float,
        most: int,
    ) -> None:
        num_own, fetched_rows = tensors[0].shape[0], tensors[2].shape[0]
        groups, heads = tensors[0].shape[1], q_NHD.shape[1]
        ratio, widths = heads // groups, (q_NHD.shape[2], do_NHD.shape[2])
        rows = tile_layout((1, ratio, HALF.value), q_NHD.dtype)
        keys = [tile_layout((ROWS.value, host_part_width(w)), q_NHD.dtype) for w in widths]
        sources = [for_tma(x) for x in with_rows(tensors)]
        descriptors = [_keys(x, keys[i % 2]) for i, x in enumerate(sources)]
        columns = [x.stride(1) for x in sources]
        q, do = for_tma(q_NHD), for_tma(do_NHD)
        self._before = (
            _queries(q, ratio, rows), _queries(do, ratio, rows), *own_and_fetched(descriptors),
            *own_and_fetched(columns), num_own, log_sum_NH, delta_NH,
            *((log_sum_NH, 0, 0) if gate_NH is None else (gate_NH, *gate_NH.stride())),
        )  # fmt: skip
        num_blocks = blocks.lengths.shape[0]
        self._after = (
            queries.order, queries.owner, queries.ends, queries.starts, queries.rows, queries.seen,
            blocks.rows, blocks.rows.stride(0) - num_blocks, num_blocks,
        )  # fmt: skip
        self._scales = (scale, logit_scale)
        self._constants = (groups, ratio, *widths, fetched_rows > 0, gate_NH is not None, most)

    def __call__(self, dk: Tensor, dv: Tensor, first: int, end: int) -> None:
        """Programs first..end-1, to workspaces [programs, 64, D]."""
        launcher(_hopper_block_dkv_kernel, (-(-(end - first) // WORKERS.value),))(
            *self._before, dk, dv, *self._after, first, end - first, *self._scales,
            *self._constants, num_warps=4, maxnreg=168,
        )  # fmt: skip

"""dQ of attention to a band of keys, in Gluon for Hopper: see hopper_backward.py for the maths.

A program takes two tiles of 64 query rows, one for each warpgroup, through all keys that they see;
both multiply with the same keys and values, which a third partition of one warp loads. A warpgroup
has the scores of the next tile computed while it adds dS K of this one:

    issue dP = dO V^T                              P = exp2(S - lse)
    wait for dP                                    dS = P (dP - delta)
    issue dQ += dS K and the next S = Q K^T        free the keys when both are done

The accumulator takes the registers that sums in pieces would need. Over 65,536 keys its rounding is
far below that of dS in 16 bits: tests/ops/triton/test_hopper_backward.py judges it there.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.triton.banded.band import num_seen, sees_several
from nsa_kernels.triton.shared.hopper import (
    add_products,
    advance,
    append,
    channel_parts,
    keep_rows,
    multiply_rows,
    new_barriers,
    part_width,
    parts_of,
    to_16_bits,
    wait_for_sums,
)


class Constants(NamedTuple):
    """What the kernels are compiled for.

    G KV heads with R query heads each; OFFSET, STRIDE, WINDOW: of the band; DK, DV: widths; BT:
    tokens of 64 rows. BN: keys of a tile of dq. KV_STAGES, Q_STAGES: buffers for keys in dq and
    for queries in dk and dv. FEW_KEYS: up to how many keys delta is computed anew, as the
    mean of dP under P: see backward.py. GATED: whether there is a gate. REGISTERS: of a thread that
    multiplies.
    """

    G: int
    R: int
    OFFSET: int
    STRIDE: int
    WINDOW: int
    DK: int
    DV: int
    BT: int
    BN: int
    KV_STAGES: int
    Q_STAGES: int
    FEW_KEYS: int
    GATED: bool
    REGISTERS: int


@gluon.jit
def _load_work(work, p, C: gl.constexpr):
    """Of program p: its row of the table, its KV head, and its key tiles [begin, end).

    All rows see all keys of the tiles inner..shared-1. Every program has a tile: where it sees
    nothing, one that is masked.
    """
    at = work + p // C.G * 8
    first_row = gl.load(at)
    tokens = gl.load(at + 1)
    position = gl.load(at + 2)
    base = gl.load(at + 3)
    first_key = gl.load(at + 4)
    end_key = gl.load(at + 5)
    tile = gl.load(at + 6)
    last = position + tokens - 1
    limit = num_seen(last, C)
    first = 0
    if C.WINDOW > 0:
        first = gl.maximum(position - C.WINDOW + 1, 0)
    begin = first // C.BN
    end = gl.maximum((limit + C.BN - 1) // C.BN, begin + 1)
    inner = begin
    if C.WINDOW > 0:
        inner = (gl.maximum(last - C.WINDOW + 1, 0) + C.BN - 1) // C.BN
        inner = gl.minimum(gl.maximum(inner, begin), end)
    shared = gl.minimum(gl.maximum(num_seen(position, C) // C.BN, inner), end)
    few = limit - first <= C.FEW_KEYS
    return (
        first_row, tokens, position, base, first_key, end_key, tile, p % C.G, begin, inner,
        shared, end, few,
    )  # fmt: skip


@gluon.jit
def _producer(
    q_desc, do_desc, k_desc, v_desc, q_s, do_s, k_s, v_s, q_full, q_empty, kv_full, kv_empty,
    work, num_programs, C: gl.constexpr,
):  # fmt: skip
    """Load both tiles of queries and the tiles of keys, these twice where delta comes of a walk."""
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    s = gl.to_tensor(0)
    ph = gl.to_tensor(1)
    q_ph = gl.to_tensor(1)
    for p in range(gl.program_id(0), num_programs, gl.num_programs(0)):
        first_row, _, _, base, _, _, _, g, begin, _, _, end, few = _load_work(work, p, C)
        for w in gl.static_range(2):
            row = first_row + w * C.BT
            mbarrier.wait(q_empty.index(w), q_ph)
            mbarrier.expect(q_full.index(w), 128 * (C.DK + C.DV))
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    q_desc, [row, g * C.R, part * PART], q_full.index(w),
                    q_s.index(w * PARTS + part),
                )  # fmt: skip
            tma.async_copy_global_to_shared(
                do_desc, [row, g * C.R, 0], q_full.index(w), do_s.index(w)
            )
        q_ph ^= 1
        walk = end - begin
        for i in range(gl.where(few, 2 * walk, walk)):
            j = begin + gl.where(i < walk, i, i - walk)
            mbarrier.wait(kv_empty.index(s), ph)
            mbarrier.expect(kv_full.index(s), 2 * C.BN * (C.DK + C.DV))
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    k_desc, [base + j * C.BN, g, part * PART], kv_full.index(s),
                    k_s.index(s * PARTS + part),
                )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_desc, [base + j * C.BN, g, 0], kv_full.index(s), v_s.index(s)
            )
            s, ph = advance(s, ph, C.KV_STAGES)


@gluon.jit
def _sees(j, b_t, C: gl.constexpr, S_L: gl.constexpr):
    """Which keys of tile j [BN] the queries at positions b_t [64] see."""
    o_n = gl.expand_dims(gl.arange(0, C.BN, layout=gl.SliceLayout(0, S_L)), 0)
    seen = o_n < gl.expand_dims(num_seen(b_t, C) - j * C.BN, 1)
    if C.WINDOW > 0:
        seen = seen & (o_n > gl.expand_dims(b_t - C.WINDOW - j * C.BN, 1))
    return seen


@gluon.jit
def _delta_step(
    j, b_num, b_den, q, do, k_s, v_s, kv_full, kv_empty, s, ph, b_lse, b_t, scale2,
    C: gl.constexpr, S_L: gl.constexpr,
):  # fmt: skip
    """Add P dP and P of key tile j to num and den."""
    BN: gl.constexpr = C.BN
    zero = gl.zeros([64, BN], gl.float32, S_L)
    mbarrier.wait(kv_full.index(s), ph)
    k, v = parts_of(k_s, s, C.BN, C.DK), v_s.index(s).reshape((C.BN, C.DV))
    a_s = multiply_rows(q, k, zero, False)
    a_dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    b_s, b_dp = warpgroup_mma_wait(0, deps=(a_s, a_dp))
    mbarrier.arrive(kv_empty.index(s), count=1)
    seen = _sees(j, b_t, C, S_L)
    b_p = gl.exp2(gl.fma(b_s, scale2, gl.expand_dims(-b_lse, 1)))
    b_p = gl.where(seen, b_p, 0.0)
    b_num += gl.sum(gl.where(seen, b_p * b_dp, 0.0), 1)
    b_den += gl.sum(b_p, 1)
    s, ph = advance(s, ph, C.KV_STAGES)
    return b_num, b_den, s, ph


@gluon.jit
def _step(
    j, more, b_s, b_dq, b_rest, q, do, k_s, v_s, kv_full, kv_empty, s, ph, b_lse, b_delta, b_t,
    first_key, end_key, scale2, MASKED: gl.constexpr, C: gl.constexpr, S_L: gl.constexpr,
    P_L: gl.constexpr,
):  # fmt: skip
    """Add dS K of key tile j to dq, and dS to rest. b_s: the scores; returns the next tile's."""
    BN: gl.constexpr = C.BN
    zero = gl.zeros([64, BN], gl.float32, S_L)
    PARTS: gl.constexpr = channel_parts(C.DK)
    k, v = parts_of(k_s, s, C.BN, C.DK), v_s.index(s).reshape((C.BN, C.DV))
    if MASKED:
        # Another document's rows, or none: their scores are masked, but 0 K must be 0.
        low, high = first_key - j * C.BN, end_key - j * C.BN
        if (low > 0) | (high < C.BN):
            for part in gl.static_range(PARTS):
                keep_rows(k[part], low, high, C.BN, part_width(C.DK))
    a_dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    b_p = gl.exp2(gl.fma(b_s, scale2, gl.expand_dims(-b_lse, 1)))
    b_dp = warpgroup_mma_wait(0, deps=(a_dp,))
    b_ds = b_p * (b_dp - gl.expand_dims(b_delta, 1))
    if MASKED:
        b_ds = gl.where(_sees(j, b_t, C, S_L), b_ds, 0.0)
    b_rest += gl.sum(b_ds, 1)
    b_ds = gl.convert_layout(to_16_bits(b_ds, k_s.dtype), P_L)
    a_dq = add_products(b_ds, k, b_dq)
    ns, nph = advance(s, ph, C.KV_STAGES)
    # The last tile has its own scores computed again, which nobody reads.
    ns = gl.where(more, ns, s)
    nph = gl.where(more, nph, ph)
    mbarrier.wait(kv_full.index(ns), nph)
    a_s = multiply_rows(q, parts_of(k_s, ns, C.BN, C.DK), zero, False)
    b_dq, b_ds = wait_for_sums(PARTS, a_dq, b_ds)
    b_s = warpgroup_mma_wait(0, deps=(a_s,))
    mbarrier.arrive(kv_empty.index(s), count=1)
    return b_s, b_dq, b_rest, ns, nph


@gluon.jit
def _consumer(
    w: gl.constexpr, dq_desc, dq, lse2, delta, gate, q_s, do_s, dq_s, k_s, v_s, q_full, q_empty,
    kv_full, kv_empty, work, num_programs, num_tiles, scale, scale2, C: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: dq of its 64 rows, and delta with what is left of the sum of dS."""
    BN: gl.constexpr = C.BN
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    ROW_L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [4, 1], [1, 0])
    s = gl.to_tensor(0)
    ph = gl.to_tensor(0)
    q_ph = gl.to_tensor(0)
    q = parts_of(q_s, w, 64, C.DK)
    do = do_s.index(w).reshape((64, C.DV))
    dq_rows = parts_of(dq_s, w, 64, C.DK)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    for p in range(gl.program_id(0), num_programs, gl.num_programs(0)):
        (
            first_row, tokens, position, _, first_key, end_key, tile, g, begin, inner, shared,
            end, few,
        ) = _load_work(work, p, C)  # fmt: skip
        m_m = o_m // C.R + w * C.BT < tokens
        b_t = position + w * C.BT + o_m // C.R
        at = ((g * num_tiles + tile + w) * 64).to(gl.int64) + o_m
        b_lse = gl.load(lse2 + at, mask=m_m, other=0.0)
        b_delta = gl.load(delta + at, mask=m_m, other=0.0)
        mbarrier.wait(q_full.index(w), q_ph)
        if few:
            b_num = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_L))
            b_den = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_L))
            for j in range(begin, end):
                b_num, b_den, s, ph = _delta_step(
                    j, b_num, b_den, q, do, k_s, v_s, kv_full, kv_empty, s, ph, b_lse, b_t,
                    scale2, C, S_L,
                )  # fmt: skip
            b_delta = b_num / gl.where(b_den == 0.0, 1.0, b_den)
        b_rest = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_L))
        b_dq = ()
        for _part in gl.static_range(PARTS):
            b_dq = append(b_dq, gl.zeros([64, PART], gl.float32, O_L))
        mbarrier.wait(kv_full.index(s), ph)
        zero = gl.zeros([64, BN], gl.float32, S_L)
        a_s = multiply_rows(q, parts_of(k_s, s, C.BN, C.DK), zero, False)
        b_s = warpgroup_mma_wait(0, deps=(a_s,))
        if C.WINDOW > 0:
            for j in range(begin, inner):
                b_s, b_dq, b_rest, s, ph = _step(
                    j, j + 1 < end, b_s, b_dq, b_rest, q, do, k_s, v_s, kv_full, kv_empty, s,
                    ph, b_lse, b_delta, b_t, first_key, end_key, scale2, True, C, S_L, P_L,
                )  # fmt: skip
        for j in range(inner, shared):
            b_s, b_dq, b_rest, s, ph = _step(
                j, j + 1 < end, b_s, b_dq, b_rest, q, do, k_s, v_s, kv_full, kv_empty, s, ph,
                b_lse, b_delta, b_t, first_key, end_key, scale2, False, C, S_L, P_L,
            )  # fmt: skip
        for j in range(shared, end):
            b_s, b_dq, b_rest, s, ph = _step(
                j, j + 1 < end, b_s, b_dq, b_rest, q, do, k_s, v_s, kv_full, kv_empty, s, ph,
                b_lse, b_delta, b_t, first_key, end_key, scale2, True, C, S_L, P_L,
            )  # fmt: skip
        s, ph = advance(s, ph, C.KV_STAGES)
        mbarrier.arrive(q_empty.index(w), count=1)
        q_ph ^= 1
        gl.store(delta + at, b_delta + b_rest, mask=m_m)
        b_factor = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, S_L)) * scale
        if C.GATED:
            b_factor = b_factor * gl.load(gate + at, mask=m_m, other=0.0)
        b_several = gl.convert_layout(sees_several(b_t, C), gl.SliceLayout(1, O_L))
        b_factor = gl.convert_layout(b_factor, gl.SliceLayout(1, O_L))
        for part in gl.static_range(PARTS):
            b_part = b_dq[part] * gl.expand_dims(b_factor, 1)
            b_part = gl.where(gl.expand_dims(b_several, 1), b_part, 0.0)
            if part == 0:
                tma.store_wait(0)
            dq_rows[part].store(b_part.to(q_s.dtype))
        if tokens >= (w + 1) * C.BT:
            fence_async_shared()
            row = first_row + w * C.BT
            for part in gl.static_range(PARTS):
                tma.async_copy_shared_to_global(
                    dq_desc, [row, g * C.R, part * PART], dq_s.index(w * PARTS + part)
                )
        else:  # What follows are rows of another segment.
            o_r = gl.arange(0, 64, layout=gl.SliceLayout(1, ROW_L))
            o_d = gl.arange(0, PART, layout=gl.SliceLayout(0, ROW_L))
            token = o_r // C.R + w * C.BT
            row_head = (first_row + token).to(gl.int64) * (C.G * C.R) + g * C.R + o_r % C.R
            to = gl.expand_dims(row_head * C.DK, 1) + gl.expand_dims(o_d, 0)
            for part in gl.static_range(PARTS):
                b_row = dq_rows[part].load(ROW_L)
                gl.store(dq + part * PART + to, b_row, mask=gl.expand_dims(token < tokens, 1))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_programs", "num_tiles"])
def _hopper_dq_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, dq, lse2, delta, gate, work, num_programs, num_tiles,
    scale, scale2, C: gl.constexpr,
):  # fmt: skip
    """dq [N, H, DK]; delta [G, tiles, 64] becomes that of dk and dv."""
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2 * PARTS, C.BT, C.R, PART], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [2, C.BT, C.R, C.DV], do_desc.layout)
    dq_s = gl.allocate_shared_memory(q_desc.dtype, [2 * PARTS, C.BT, C.R, PART], dq_desc.layout)
    k_s = gl.allocate_shared_memory(
        q_desc.dtype, [C.KV_STAGES * PARTS, C.BN, 1, PART], k_desc.layout
    )
    v_s = gl.allocate_shared_memory(q_desc.dtype, [C.KV_STAGES, C.BN, 1, C.DV], v_desc.layout)
    q_full, q_empty = new_barriers(2, 1), new_barriers(2, 1)
    kv_full, kv_empty = new_barriers(C.KV_STAGES, 1), new_barriers(C.KV_STAGES, 2)
    gl.warp_specialize(
        [
            (_consumer, (
                0, dq_desc, dq, lse2, delta, gate, q_s, do_s, dq_s, k_s, v_s, q_full, q_empty,
                kv_full, kv_empty, work, num_programs, num_tiles, scale, scale2, C,
            )),
            (_consumer, (
                1, dq_desc, dq, lse2, delta, gate, q_s, do_s, dq_s, k_s, v_s, q_full, q_empty,
                kv_full, kv_empty, work, num_programs, num_tiles, scale, scale2, C,
            )),
            (_producer, (
                q_desc, do_desc, k_desc, v_desc, q_s, do_s, k_s, v_s, q_full, q_empty, kv_full,
                kv_empty, work, num_programs, C,
            )),
        ],
        [4, 1],
        [C.REGISTERS, 24],
    )  # fmt: skip

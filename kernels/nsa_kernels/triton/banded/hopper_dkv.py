"""dK and dV of attention to a band of keys, in Gluon for Hopper: see hopper_backward.py.

A program takes 128 keys, 64 for each warpgroup, through a run of query tiles, which a third
partition of one warp loads for both. Keys are the rows of all matrices, so P^T and dS^T come out of
one product as the next one takes them, in registers, and nothing passes through shared memory:

    issue dP^T - delta = V dO^T - delta    P^T = exp2(S^T - lse)    issue dV += P^T dO
    wait for dP^T - delta                  dS^T = P^T (dP^T - delta)
    issue dK += dS^T Q and the next S^T = K Q^T     free the queries when all are done

Runs are at most 256 tiles; their sums are added in float32, in order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.triton.shared.hopper import advance, keep_rows, to_16_bits

# Places in one array of barriers and in one of lines, as each array takes a register of every
# thread. Barriers of keys, by warpgroup, and those of a stage of queries, of which there are four.
KV_FULL = gl.constexpr(0)
KV_EMPTY = gl.constexpr(2)
Q_FULL = gl.constexpr(4)
Q_EMPTY = gl.constexpr(5)
DO_FULL = gl.constexpr(6)
DO_EMPTY = gl.constexpr(7)
# Lines of a stage, of which there are three.
LSE = gl.constexpr(0)
DELTA = gl.constexpr(1)
GATE = gl.constexpr(2)


@gluon.jit
def _program():
    """program_id(0), read where it is used: held from the start it would be spilled."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x; // $1", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _producer(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, gate_desc, q_s, do_s, lines_s, k_s,
    v_s, ring, work, num_programs, grid, group_lines, C: gl.constexpr,
):  # fmt: skip
    """Load each program's keys, and its query tiles with their lines one after another."""
    s = gl.to_tensor(0)
    ph = gl.to_tensor(1)
    kv_ph = gl.to_tensor(1)
    BYTES_Q: gl.constexpr = 128 * C.DK + 256
    BYTES_DO: gl.constexpr = 128 * C.DV + (512 if C.GATED else 256)
    for p in range(_program(), num_programs, grid):
        at = work + p // C.G * 10
        g = p % C.G
        key_row = gl.load(at)
        tile = gl.load(at + 2)
        row = gl.load(at + 3)
        count = gl.load(at + 6)
        for w in gl.static_range(2):
            mbarrier.wait(ring.index(KV_EMPTY + w), kv_ph)
            mbarrier.expect(ring.index(KV_FULL + w), 128 * (C.DK + C.DV))
            tma.async_copy_global_to_shared(
                k_desc, [key_row + w * 64, g, 0], ring.index(KV_FULL + w), k_s.index(w)
            )
            tma.async_copy_global_to_shared(
                v_desc, [key_row + w * 64, g, 0], ring.index(KV_FULL + w), v_s.index(w)
            )
        kv_ph ^= 1
        for i in range(count):
            line = g * group_lines + (tile + i) * 64
            mbarrier.wait(ring.index(4 * s + Q_EMPTY), ph)
            mbarrier.expect(ring.index(4 * s + Q_FULL), BYTES_Q)
            tma.async_copy_global_to_shared(
                q_desc, [row + i * C.BT, g * C.R, 0], ring.index(4 * s + Q_FULL), q_s.index(s)
            )
            tma.async_copy_global_to_shared(
                lse_desc, [line], ring.index(4 * s + Q_FULL), lines_s.index(3 * s + LSE)
            )
            mbarrier.wait(ring.index(4 * s + DO_EMPTY), ph)
            mbarrier.expect(ring.index(4 * s + DO_FULL), BYTES_DO)
            tma.async_copy_global_to_shared(
                do_desc, [row + i * C.BT, g * C.R, 0], ring.index(4 * s + DO_FULL), do_s.index(s)
            )
            tma.async_copy_global_to_shared(
                delta_desc, [line], ring.index(4 * s + DO_FULL), lines_s.index(3 * s + DELTA)
            )
            if C.GATED:
                tma.async_copy_global_to_shared(
                    gate_desc, [line], ring.index(4 * s + DO_FULL), lines_s.index(3 * s + GATE)
                )
            s, ph = advance(s, ph, C.Q_STAGES)


@gluon.jit
def _step(
    i, more, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j, position, end, scale2,
    MASKED: gl.constexpr, C: gl.constexpr, S_L: gl.constexpr, P_L: gl.constexpr,
):  # fmt: skip
    """Add what query tile i gives to dk and dv. b_s: its scores; returns the next tile's."""
    COL_L: gl.constexpr = gl.SliceLayout(0, S_L)
    zero = gl.zeros([64, 64], gl.float32, S_L)
    mbarrier.wait(ring.index(4 * s + DO_FULL), ph)
    do = do_s.index(s).reshape((64, C.DV))
    if MASKED:
        here = position + i * C.BT
        tokens = gl.minimum(end - here, C.BT)
        if tokens < C.BT:
            # The rows of another segment, or none: they are masked, but 0 dO must be 0.
            keep_rows(do, 0, tokens * C.R, 64, C.DV)
            keep_rows(q_s.index(s).reshape((64, C.DK)), 0, tokens * C.R, 64, C.DK)
        # The tokens of the tile that see a key: [low, high).
        token = gl.expand_dims(gl.arange(0, 64, layout=COL_L) // C.R, 0)
        low = gl.expand_dims(o_j * C.STRIDE + C.OFFSET - here, 1)
        if C.WINDOW > 0:
            high = gl.expand_dims(gl.minimum(o_j + C.WINDOW - here, tokens), 1)
        else:
            high = tokens
        seen = (token >= low) & (token < high)
    # The sum starts with -delta, which then takes no registers beside it.
    b_delta = lines_s.index(3 * s + DELTA).load(COL_L)
    b_dp, _ = gl.broadcast(gl.expand_dims(-b_delta, 0), zero)
    a_dp = warpgroup_mma(v, do.permute((1, 0)), b_dp, is_async=True)
    b_lse = lines_s.index(3 * s + LSE).load(COL_L)
    b_p = gl.exp2(gl.fma(b_s, scale2, gl.expand_dims(-b_lse, 0)))
    if C.GATED:
        b_p = b_p * gl.expand_dims(lines_s.index(3 * s + GATE).load(COL_L), 0)
    if MASKED:
        b_p = gl.where(seen, b_p, 0.0)
    b_p16 = gl.convert_layout(to_16_bits(b_p, do_s.dtype), P_L)
    a_dv = warpgroup_mma(b_p16, do, b_dv, is_async=True)
    b_ds = b_p * warpgroup_mma_wait(1, deps=(a_dp,))
    if MASKED:
        # A query that sees one key gives it nothing. What is 0 stays 0, whatever dP is.
        if C.WINDOW == 1:
            b_ds = zero
        else:
            b_ds = gl.where((b_p == 0.0) | (token < C.STRIDE + C.OFFSET - here), 0.0, b_ds)
    b_ds = gl.convert_layout(to_16_bits(b_ds, do_s.dtype), P_L)
    a_dk = warpgroup_mma(b_ds, q_s.index(s).reshape((64, C.DK)), b_dk, is_async=True)
    ns, nph = advance(s, ph, C.Q_STAGES)
    # The last tile has its own scores computed again, which nobody reads.
    ns = gl.where(more, ns, s)
    nph = gl.where(more, nph, ph)
    mbarrier.wait(ring.index(4 * ns + Q_FULL), nph)
    q = q_s.index(ns).reshape((64, C.DK))
    a_s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    b_dv, b_p16 = warpgroup_mma_wait(2, deps=(a_dv, b_p16))
    mbarrier.arrive(ring.index(4 * s + DO_EMPTY), count=1)
    b_dk, b_ds = warpgroup_mma_wait(1, deps=(a_dk, b_ds))
    b_s = warpgroup_mma_wait(0, deps=(a_s,))
    mbarrier.arrive(ring.index(4 * s + Q_EMPTY), count=1)
    return b_s, b_dk, b_dv, ns, nph


@gluon.jit
def _load_bounds(at, w: gl.constexpr, S_L: gl.constexpr):
    """A program's keys [64] of warpgroup w, its first position and the end of its segment's."""
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    return gl.load(at + 1) + w * 64 + o_n, gl.load(at + 4), gl.load(at + 5)


@gluon.jit
def _consumer(
    w: gl.constexpr, dk, dv, q_s, do_s, lines_s, k_s, v_s, ring, work, num_programs, grid, scale,
    scale2, C: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: the sums of its 64 keys, to the program's place in the workspaces."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    DK: gl.constexpr = C.DK
    DV: gl.constexpr = C.DV
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    V_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, K_L, 2)
    s = gl.to_tensor(0)
    ph = gl.to_tensor(0)
    k = k_s.index(w).reshape((64, C.DK))
    v = v_s.index(w).reshape((64, C.DV))
    for p in range(_program(), num_programs, grid):
        at = work + p // C.G * 10
        count = gl.load(at + 6)
        b_dk = gl.zeros([64, DK], gl.float32, K_L)
        b_dv = gl.zeros([64, DV], gl.float32, V_L)
        # The parity of how many programs came before: to count along takes a register.
        mbarrier.wait(ring.index(KV_FULL + w), p // grid & 1)
        mbarrier.wait(ring.index(4 * s + Q_FULL), ph)
        q = q_s.index(s).reshape((64, C.DK))
        zero = gl.zeros([64, 64], gl.float32, S_L)
        a_s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(a_s,))
        o_j, position, end = _load_bounds(at, w, S_L)
        for i in range(gl.load(at + 7)):
            b_s, b_dk, b_dv, s, ph = _step(
                i, i + 1 < count, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j,
                position, end, scale2, True, C,
                S_L, P_L,
            )  # fmt: skip
        for i in range(gl.load(at + 7), gl.load(at + 8)):
            b_s, b_dk, b_dv, s, ph = _step(
                i, i + 1 < count, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j,
                position, end, scale2, False, C,
                S_L, P_L,
            )  # fmt: skip
        # Loaded again, as the loop before has no register for them.
        o_j, position, end = _load_bounds(at, w, S_L)
        for i in range(gl.load(at + 8), count):
            b_s, b_dk, b_dv, s, ph = _step(
                i, i + 1 < count, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j,
                position, end, scale2, True, C,
                S_L, P_L,
            )  # fmt: skip
        s, ph = advance(s, ph, C.Q_STAGES)
        mbarrier.arrive(ring.index(KV_EMPTY + w), count=1)
        g = p % C.G
        place = gl.load(work + p // C.G * 10 + 9)
        o_k = gl.arange(0, 64, layout=gl.SliceLayout(1, K_L))
        o_v = gl.arange(0, 64, layout=gl.SliceLayout(1, V_L))
        o_dk = gl.arange(0, C.DK, layout=gl.SliceLayout(0, K_L))
        o_dv = gl.arange(0, C.DV, layout=gl.SliceLayout(0, V_L))
        row_k = ((place * 128 + w * 64 + o_k) * C.G + g).to(gl.int64)
        row_v = ((place * 128 + w * 64 + o_v) * C.G + g).to(gl.int64)
        p_dk = dk + gl.expand_dims(row_k * C.DK, 1) + gl.expand_dims(o_dk, 0)
        p_dv = dv + gl.expand_dims(row_v * C.DV, 1) + gl.expand_dims(o_dv, 0)
        gl.store(p_dk, b_dk * scale)
        gl.store(p_dv, b_dv)


@gluon.jit(
    do_not_specialize=["num_programs", "grid", "group_lines"],
    do_not_specialize_on_alignment=["work"],
)
def _hopper_dkv_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, gate_desc, dk, dv, work, num_programs,
    grid, group_lines, scale, scale2, C: gl.constexpr,
):  # fmt: skip
    """dk and dv [.., 128, G, D] in float32, of the first num_programs / G of the table.

    grid: how many programs run; group_lines: numbers of a line of all tiles of a KV head. Each is
    an argument, as what is read or computed before the warps part is spilled.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [C.Q_STAGES, C.BT, C.R, C.DK], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [C.Q_STAGES, C.BT, C.R, C.DV], do_desc.layout)
    lines_s = gl.allocate_shared_memory(gl.float32, [3 * C.Q_STAGES, 64], lse_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, C.DK], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, C.DV], v_desc.layout)
    STAGES: gl.constexpr = C.Q_STAGES
    ring = gl.allocate_shared_memory(gl.int64, [4 + 4 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ring.index(KV_FULL + i), count=1)
        mbarrier.init(ring.index(KV_EMPTY + i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.index(4 * i + Q_FULL), count=1)
        mbarrier.init(ring.index(4 * i + Q_EMPTY), count=2)
        mbarrier.init(ring.index(4 * i + DO_FULL), count=1)
        mbarrier.init(ring.index(4 * i + DO_EMPTY), count=2)
    gl.warp_specialize(
        [
            (_consumer, (
                0, dk, dv, q_s, do_s, lines_s, k_s, v_s, ring, work, num_programs, grid, scale,
                scale2, C,
            )),
            (_consumer, (
                1, dk, dv, q_s, do_s, lines_s, k_s, v_s, ring, work, num_programs, grid, scale,
                scale2, C,
            )),
            (_producer, (
                q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, gate_desc, q_s, do_s,
                lines_s, k_s, v_s, ring, work, num_programs, grid, group_lines, C,
            )),
        ],
        [4, 1],
        [C.REGISTERS, 24],
    )  # fmt: skip

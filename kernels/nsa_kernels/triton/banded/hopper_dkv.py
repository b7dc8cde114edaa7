"""dK and dV of attention to a band of keys, in Gluon for Hopper: see hopper_backward.py.

A program takes 128 keys, 64 for each warpgroup, through a run of query tiles, which a third
partition of one warp loads for both. Keys are the rows of all matrices, so P^T and dS^T come out of
one product as the next one takes them, in registers, and nothing passes through shared memory:

    issue dP^T - delta = V dO^T - delta    P^T = exp2(S^T - lse)    issue dV += P^T dO
    wait for dP^T - delta                  dS^T = P^T (dP^T - delta)
    issue dK += dS^T Q and the next S^T = K Q^T     free the queries when all are done

dK and dV take 96 and 64 registers of a thread at widths of 192 and 128, S^T and dP^T of 64 query
rows 32 each, which is all there are. So there a step takes half of a tile, 32 rows.

Runs are at most 256 tiles; their sums are added in float32, in order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from nsa_kernels.triton.shared.hopper import (
    add_products,
    advance,
    append,
    channel_parts,
    keep_rows,
    multiply_rows,
    part_width,
    parts_of,
    to_16_bits,
    wait_for_sums,
)

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


@gluon.constexpr_function
def _step_rows(width: int) -> int:
    """Query rows of a step, at this width of queries."""
    return 32 if width == 192 else 64


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
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
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
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    k_desc, [key_row + w * 64, g, part * PART], ring.index(KV_FULL + w),
                    k_s.index(w * PARTS + part),
                )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_desc, [key_row + w * 64, g, 0], ring.index(KV_FULL + w), v_s.index(w)
            )
        kv_ph ^= 1
        for i in range(count):
            line = g * group_lines + (tile + i) * 64
            mbarrier.wait(ring.index(4 * s + Q_EMPTY), ph)
            mbarrier.expect(ring.index(4 * s + Q_FULL), BYTES_Q)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    q_desc, [row + i * C.BT, g * C.R, part * PART], ring.index(4 * s + Q_FULL),
                    q_s.index(s * PARTS + part),
                )  # fmt: skip
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
def _rows_of_step(parts, step: gl.constexpr, ROWS: gl.constexpr):
    """Of parts [64, ..], or lines [64] of one number a row: the rows of a step of a tile."""
    if ROWS == 64:
        return parts
    found = ()
    for part in gl.static_range(len(parts)):
        found = append(found, parts[part].slice(step * ROWS, ROWS))
    return found


@gluon.jit
def _line(lines_s, i, step: gl.constexpr, ROWS: gl.constexpr, COL_L: gl.constexpr):
    """Line i, of the rows of a step."""
    return _rows_of_step((lines_s.index(i),), step, ROWS)[0].load(COL_L)


@gluon.jit
def _step(
    step: gl.constexpr, i, more, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j,
    position, end, scale2, MASKED: gl.constexpr, C: gl.constexpr, S_L: gl.constexpr,
    P_L: gl.constexpr,
):  # fmt: skip
    """Add what a step of query tile i gives to dk and dv. b_s: its scores; returns the next's."""
    PARTS: gl.constexpr = channel_parts(C.DK)
    ROWS: gl.constexpr = _step_rows(C.DK)
    LAST: gl.constexpr = (step + 1) * ROWS == 64
    COL_L: gl.constexpr = gl.SliceLayout(0, S_L)
    zero = gl.zeros([64, ROWS], gl.float32, S_L)
    if step == 0:
        mbarrier.wait(ring.index(4 * s + DO_FULL), ph)
    do = do_s.index(s).reshape((64, C.DV))
    q = parts_of(q_s, s, 64, C.DK)
    if MASKED:
        here = position + i * C.BT
        tokens = gl.minimum(end - here, C.BT)
        if step == 0 and tokens < C.BT:
            # The rows of another segment, or none: they are masked, but 0 dO must be 0.
            keep_rows(do, 0, tokens * C.R, 64, C.DV)
            for part in gl.static_range(PARTS):
                keep_rows(q[part], 0, tokens * C.R, 64, part_width(C.DK))
        # The tokens of the tile that see a key: [low, high).
        token = (step * ROWS + gl.arange(0, ROWS, layout=COL_L)) // C.R
        token = gl.expand_dims(token, 0)
        low = gl.expand_dims(o_j * C.STRIDE + C.OFFSET - here, 1)
        if C.WINDOW > 0:
            high = gl.expand_dims(gl.minimum(o_j + C.WINDOW - here, tokens), 1)
        else:
            high = tokens
        seen = (token >= low) & (token < high)
    do = _rows_of_step((do,), step, ROWS)
    # The sum starts with -delta, which then takes no registers beside it.
    b_delta = _line(lines_s, 3 * s + DELTA, step, ROWS, COL_L)
    b_dp, _ = gl.broadcast(gl.expand_dims(-b_delta, 0), zero)
    a_dp = multiply_rows((v,), do, b_dp, True)
    b_lse = _line(lines_s, 3 * s + LSE, step, ROWS, COL_L)
    b_p = gl.exp2(gl.fma(b_s, scale2, gl.expand_dims(-b_lse, 0)))
    if C.GATED:
        b_p = b_p * gl.expand_dims(_line(lines_s, 3 * s + GATE, step, ROWS, COL_L), 0)
    if MASKED:
        b_p = gl.where(seen, b_p, 0.0)
    b_p16 = gl.convert_layout(to_16_bits(b_p, do_s.dtype), P_L)
    a_dv = add_products(b_p16, do, (b_dv,))
    b_ds = b_p * warpgroup_mma_wait(1, deps=(a_dp,))
    if MASKED:
        # A query that sees one key gives it nothing. What is 0 stays 0, whatever dP is.
        if C.WINDOW == 1:
            b_ds = zero
        else:
            b_ds = gl.where((b_p == 0.0) | (token < C.STRIDE + C.OFFSET - here), 0.0, b_ds)
    b_ds = gl.convert_layout(to_16_bits(b_ds, do_s.dtype), P_L)
    a_dk = add_products(b_ds, _rows_of_step(q, step, ROWS), b_dk)
    ns, nph = s, ph
    if LAST:
        ns, nph = advance(s, ph, C.Q_STAGES)
        # The last tile has its own scores computed again, which nobody reads.
        ns = gl.where(more, ns, s)
        nph = gl.where(more, nph, ph)
        mbarrier.wait(ring.index(4 * ns + Q_FULL), nph)
    q = _rows_of_step(parts_of(q_s, ns, 64, C.DK), 0 if LAST else step + 1, ROWS)
    a_s = multiply_rows(k, q, zero, False)
    b_dv, b_p16 = wait_for_sums(2 * PARTS, a_dv, b_p16)
    if LAST:
        mbarrier.arrive(ring.index(4 * s + DO_EMPTY), count=1)
    b_dk, b_ds = wait_for_sums(PARTS, a_dk, b_ds)
    b_s = warpgroup_mma_wait(0, deps=(a_s,))
    if LAST:
        mbarrier.arrive(ring.index(4 * s + Q_EMPTY), count=1)
    return b_s, b_dk, b_dv[0], ns, nph


@gluon.jit
def _tile(
    i, more, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j, position, end, scale2,
    MASKED: gl.constexpr, C: gl.constexpr, S_L: gl.constexpr, P_L: gl.constexpr,
):  # fmt: skip
    """The steps of query tile i. b_s: the scores of the first; returns the next tile's."""
    STEPS: gl.constexpr = 64 // _step_rows(C.DK)
    for step in gl.static_range(STEPS):
        b_s, b_dk, b_dv, s, ph = _step(
            step, i, more, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j, position,
            end, scale2, MASKED, C, S_L, P_L,
        )  # fmt: skip
    return b_s, b_dk, b_dv, s, ph


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
    ROWS: gl.constexpr = _step_rows(C.DK)
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    DV: gl.constexpr = C.DV
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    V_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, K_L, 2)
    s = gl.to_tensor(0)
    ph = gl.to_tensor(0)
    k = parts_of(k_s, w, 64, C.DK)
    v = v_s.index(w).reshape((64, C.DV))
    for p in range(_program(), num_programs, grid):
        at = work + p // C.G * 10
        count = gl.load(at + 6)
        b_dk = ()
        for _part in gl.static_range(PARTS):
            b_dk = append(b_dk, gl.zeros([64, PART], gl.float32, K_L))
        b_dv = gl.zeros([64, DV], gl.float32, V_L)
        # The parity of how many programs came before: to count along takes a register.
        mbarrier.wait(ring.index(KV_FULL + w), p // grid & 1)
        mbarrier.wait(ring.index(4 * s + Q_FULL), ph)
        q = _rows_of_step(parts_of(q_s, s, 64, C.DK), 0, ROWS)
        a_s = multiply_rows(k, q, gl.zeros([64, ROWS], gl.float32, S_L), False)
        b_s = warpgroup_mma_wait(0, deps=(a_s,))
        o_j, position, end = _load_bounds(at, w, S_L)
        for i in range(gl.load(at + 7)):
            b_s, b_dk, b_dv, s, ph = _tile(
                i, i + 1 < count, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j,
                position, end, scale2, True, C,
                S_L, P_L,
            )  # fmt: skip
        for i in range(gl.load(at + 7), gl.load(at + 8)):
            b_s, b_dk, b_dv, s, ph = _tile(
                i, i + 1 < count, b_s, b_dk, b_dv, k, v, q_s, do_s, lines_s, ring, s, ph, o_j,
                position, end, scale2, False, C,
                S_L, P_L,
            )  # fmt: skip
        # Loaded again, as the loop before has no register for them.
        o_j, position, end = _load_bounds(at, w, S_L)
        for i in range(gl.load(at + 8), count):
            b_s, b_dk, b_dv, s, ph = _tile(
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
        o_dk = gl.arange(0, PART, layout=gl.SliceLayout(0, K_L))
        o_dv = gl.arange(0, C.DV, layout=gl.SliceLayout(0, V_L))
        row_k = ((place * 128 + w * 64 + o_k) * C.G + g).to(gl.int64)
        row_v = ((place * 128 + w * 64 + o_v) * C.G + g).to(gl.int64)
        p_dk = dk + gl.expand_dims(row_k * C.DK, 1) + gl.expand_dims(o_dk, 0)
        p_dv = dv + gl.expand_dims(row_v * C.DV, 1) + gl.expand_dims(o_dv, 0)
        for part in gl.static_range(PARTS):
            gl.store(p_dk + part * PART, b_dk[part] * scale)
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
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    q_s = gl.allocate_shared_memory(
        q_desc.dtype, [C.Q_STAGES * PARTS, C.BT, C.R, PART], q_desc.layout
    )
    do_s = gl.allocate_shared_memory(q_desc.dtype, [C.Q_STAGES, C.BT, C.R, C.DV], do_desc.layout)
    lines_s = gl.allocate_shared_memory(gl.float32, [3 * C.Q_STAGES, 64], lse_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [2 * PARTS, 64, 1, PART], k_desc.layout)
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

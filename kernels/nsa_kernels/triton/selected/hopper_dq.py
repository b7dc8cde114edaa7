"""dq of the selected branch on Hopper, in Gluon: see hopper_walk.py, and backward.py for the maths.

Shared memory at widths of 128, of which two programs of a multiprocessor have 112 KB each:

    do        16 KB                 of the tile
    keys      4 x 16 KB             also q, which comes as the first tile of keys
    values    2 x 16 KB             also o, which comes as the first tile of values

o is read once, for delta = sum of o do, and its stage is free for blocks again. At widths of 192
dQ takes the registers of q, which stays in shared memory:

    q         24 KB                 of the tile
    do        16 KB                 of the tile
    keys      2 x 24 KB
    values    1 x 16 KB             also o

Within a tile of queries the scores of the next block are computed beside dS K of this one:

    issue dP = dO V^T                              P = exp2(S - lse)
    wait for dP, free the values                   dS = P (dP - delta), masked
    issue dQ += dS K and the next S = Q K^T        free the keys when both are done
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.triton.selected.hopper_walk import (
    LAUNCH_REGISTERS,
    LOAD_REGISTERS,
    ROWS,
    Source,
    ask_for_block,
    ask_for_rows,
    first_seen,
    free_read_stage,
    load_entry,
    load_walk,
    query_rows,
    sees,
    store_rows,
    walk_launch,
)
from nsa_kernels.triton.selected.lists import BlockLists, entry_chosen_by, entry_length
from nsa_kernels.triton.shared.gates import gate_rows, load_gate
from nsa_kernels.triton.shared.hopper import (
    Ring,
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
from nsa_kernels.triton.shared.launch import launcher

STAGES, WIDE_STAGES = (4, 2), (2, 1)  # of keys and of values


@gluon.jit
def _load_warp(
    q_desc, do_desc, o_desc, k, v, num_own, tiles, blocks, num_tiles, q_s, o_s, queries, keys,
    values, do, C: gl.constexpr,
):  # fmt: skip
    """Ask for all tiles in the order in which they are needed. k, v: a `Source` each."""
    WIDE: gl.constexpr = C.DK == 192
    k_stage = gl.to_tensor(0)
    k_parity = gl.to_tensor(1)
    v_stage = gl.to_tensor(0)
    v_parity = gl.to_tensor(1)
    do_stage = gl.to_tensor(0)
    do_parity = gl.to_tensor(1)
    for p in range(gl.program_id(0), num_tiles * C.G, gl.num_programs(0)):
        walk = load_walk(p, tiles, blocks, num_tiles, C)
        entry = load_entry(walk, 0)
        if not WIDE:
            k_stage, k_parity = ask_for_rows(
                q_desc, walk, keys, q_s, k_stage, k_parity, C.K_STAGES, C.DK, C
            )
        v_stage, v_parity = ask_for_rows(
            o_desc, walk, values, o_s, v_stage, v_parity, C.V_STAGES, C.DV, C
        )
        for i in range(walk.whole + walk.edges):
            following = load_entry(walk, i + 1)
            k_stage, k_parity = ask_for_block(
                k, entry, walk.g, num_own, keys, k_stage, k_parity, C.K_STAGES, C.DK, C
            )
            if i == 0:
                # As late as may be: do of the tile of queries before is needed to its end.
                if WIDE:
                    ask_for_rows(q_desc, walk, queries, q_s, do_stage, do_parity, 1, C.DK, C)
                do_stage, do_parity = ask_for_rows(
                    do_desc, walk, do, do.tiles, do_stage, do_parity, 1, C.DV, C
                )
            v_stage, v_parity = ask_for_block(
                v, entry, walk.g, num_own, values, v_stage, v_parity, C.V_STAGES, C.DV, C
            )
            entry = following


@gluon.jit
def _delta(o, do, C: gl.constexpr, S_L: gl.constexpr):
    """The sum of o do over the channels of each row, from shared memory."""
    ROW_L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C.DV, C.DV // 8], [4, 1], [1, 0])
    b_o, b_do = o.load(ROW_L).to(gl.float32), do.load(ROW_L).to(gl.float32)
    return gl.convert_layout(gl.sum(b_o * b_do, 1), gl.SliceLayout(1, S_L))


@gluon.jit
def _step(
    entry, seen, more, b_s, b_dq, b_q, b_lse, b_delta, token, do, keys, values, k_stage, k_parity,
    v_stage, v_parity, logit_scale, EDGE: gl.constexpr, C: gl.constexpr, S_L: gl.constexpr,
    P_L: gl.constexpr,
):  # fmt: skip
    """Add dS K of one block to dq. b_s: its scores; returns those of the next one, if `more`.

    seen: see `first_seen`.
    """
    zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
    PARTS: gl.constexpr = channel_parts(C.DK)
    k, v = parts_of(keys.tiles, k_stage, ROWS, C.DK), values.tiles.index(v_stage)
    if EDGE:
        limit = entry_length(entry)
        if limit < ROWS:
            for part in gl.static_range(PARTS):
                keep_rows(k[part], 0, limit, ROWS, part_width(C.DK))
    mbarrier.wait(values.full.index(v_stage), v_parity)
    a_dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)  # [64, 64]
    b_p = gl.exp2(gl.fma(b_s, logit_scale, gl.expand_dims(-b_lse, 1)))
    b_dp = warpgroup_mma_wait(0, deps=(a_dp,))
    mbarrier.arrive(values.empty.index(v_stage), count=1)
    v_stage, v_parity = advance(v_stage, v_parity, C.V_STAGES)
    b_ds = b_p * (b_dp - gl.expand_dims(b_delta, 1))
    b_ds = gl.where(sees(entry, seen, token, EDGE, S_L), b_ds, 0.0)
    b_ds = gl.convert_layout(to_16_bits(b_ds, keys.tiles.dtype), P_L)
    a_dq = add_products(b_ds, k, b_dq)  # [64, DK]
    # The last block has its own scores computed again, which nobody reads.
    next_stage, next_parity = advance(k_stage, k_parity, C.K_STAGES)
    next_stage = gl.where(more, next_stage, k_stage)
    next_parity = gl.where(more, next_parity, k_parity)
    mbarrier.wait(keys.full.index(next_stage), next_parity)
    k = parts_of(keys.tiles, next_stage, ROWS, C.DK)
    a_s = multiply_rows(b_q, k, zero, False)  # [64, 64]
    b_dq, b_ds = wait_for_sums(PARTS, a_dq, b_ds)
    b_s = warpgroup_mma_wait(0, deps=(a_s,))
    mbarrier.arrive(keys.empty.index(k_stage), count=1)
    return b_s, b_dq, next_stage, next_parity, v_stage, v_parity


@gluon.jit
def _multiply(
    dq, log_sum, delta, gate, tiles, blocks, num_tiles, q_s, o_s, queries, keys, values, do, scale,
    logit_scale, C: gl.constexpr,
):  # fmt: skip
    """dq and delta of all tiles of queries of a program."""
    WIDE: gl.constexpr = C.DK == 192
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    Q_L: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    k_stage = gl.to_tensor(0)
    k_parity = gl.to_tensor(0)
    v_stage = gl.to_tensor(0)
    v_parity = gl.to_tensor(0)
    do_parity = gl.to_tensor(0)
    do_rows = do.tiles.index(0).reshape((ROWS, C.DV))
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L))
    token = o_m // C.R
    for p in range(gl.program_id(0), num_tiles * C.G, gl.num_programs(0)):
        walk = load_walk(p, tiles, blocks, num_tiles, C)
        count = walk.whole + walk.edges
        m_m = token < walk.tokens
        row, head = walk.row + token, walk.g * C.R + o_m % C.R
        row_head = row * (C.G * C.R) + head
        b_lse = gl.load(log_sum + row_head, mask=m_m, other=0.0)
        entry = load_entry(walk, 0)

        if WIDE:
            mbarrier.wait(queries.full.index(0), do_parity)
            b_q = parts_of(q_s, 0, ROWS, C.DK)
        else:
            mbarrier.wait(keys.full.index(k_stage), k_parity)
            b_q = (q_s.index(k_stage).reshape((ROWS, C.DK)).load(Q_L),)
            q_stage = k_stage
            k_stage, k_parity = advance(k_stage, k_parity, C.K_STAGES)
        mbarrier.wait(keys.full.index(k_stage), k_parity)
        zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
        a_s = multiply_rows(b_q, parts_of(keys.tiles, k_stage, ROWS, C.DK), zero, False)
        mbarrier.wait(values.full.index(v_stage), v_parity)
        mbarrier.wait(do.full.index(0), do_parity)
        b_delta = _delta(o_s.index(v_stage).reshape((ROWS, C.DV)), do_rows, C, S_L)
        gl.store(delta + row_head, b_delta, mask=m_m)
        # Stages that were read are freed only now: loads may still be under way when a barrier is
        # passed, products that took their results are not.
        if WIDE:
            b_s = warpgroup_mma_wait(0, deps=(a_s,))
        else:
            b_q, b_s = wait_for_sums(0, b_q, a_s)
            free_read_stage(keys.empty.index(q_stage))
        free_read_stage(values.empty.index(v_stage))
        v_stage, v_parity = advance(v_stage, v_parity, C.V_STAGES)

        b_dq = ()
        for _part in gl.static_range(PARTS):
            b_dq = append(b_dq, gl.full([ROWS, PART], 0.0, gl.float32, O_L))
        several = gl.to_tensor(0)  # Choosers of a whole block: they see more than one key.
        for i in range(walk.whole):
            following = load_entry(walk, i + 1)
            b_s, b_dq, k_stage, k_parity, v_stage, v_parity = _step(
                entry, 0, i + 1 < count, b_s, b_dq, b_q, b_lse, b_delta, token, do_rows, keys,
                values, k_stage, k_parity, v_stage, v_parity, logit_scale, False, C, S_L, P_L,
            )  # fmt: skip
            several |= entry.to(gl.int32)
            entry = following
        b_several = entry_chosen_by(several, token)
        for i in range(walk.whole, count):
            following = load_entry(walk, i + 1)
            seen = first_seen(walk, i)
            b_s, b_dq, k_stage, k_parity, v_stage, v_parity = _step(
                entry, seen, i + 1 < count, b_s, b_dq, b_q, b_lse, b_delta, token, do_rows, keys,
                values, k_stage, k_parity, v_stage, v_parity, logit_scale, True, C, S_L, P_L,
            )  # fmt: skip
            b_several = b_several | (entry_chosen_by(entry, token) & (seen + token > 1))
            entry = following
        k_stage, k_parity = advance(k_stage, k_parity, C.K_STAGES)
        if WIDE:
            mbarrier.arrive(queries.empty.index(0), count=1)
        mbarrier.arrive(do.empty.index(0), count=1)
        do_parity ^= 1

        if gate is not None:
            b_gate = gl.convert_layout(load_gate(gate, row, head, m_m), gl.SliceLayout(1, O_L))
        b_several = gl.expand_dims(gl.convert_layout(b_several, gl.SliceLayout(1, O_L)), 1)
        b_out = ()
        for part in gl.static_range(PARTS):
            b_part = b_dq[part] * scale
            if gate is not None:
                b_part = b_part * gl.expand_dims(b_gate, 1)
            b_out = append(b_out, gl.where(b_several, b_part, 0.0))
        store_rows(dq, b_out, walk, keys.tiles.dtype, C.DK, C)


@gluon.jit(do_not_specialize=["num_own", "num_tiles"])
def _hopper_block_dq_kernel(
    q_desc, do_desc, o_desc, k_own, v_own, k_fetched, v_fetched, k_column, v_column,
    k_fetched_column, v_fetched_column, num_own, dq, log_sum, delta, gate, tiles, blocks, num_tiles,
    scale, logit_scale, C: gl.constexpr,
):  # fmt: skip
    """dq [N, H, DK] and delta [N, H]."""
    TT: gl.constexpr = ROWS // C.R
    dtype: gl.constexpr = q_desc.dtype
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    k_s = gl.allocate_shared_memory(dtype, [C.K_STAGES * PARTS, ROWS, PART], k_own.layout)
    v_s = gl.allocate_shared_memory(dtype, [C.V_STAGES, ROWS, C.DV], v_own.layout)
    do_s = gl.allocate_shared_memory(dtype, [1, TT, C.R, C.DV], do_desc.layout)
    o_s = v_s._reinterpret(dtype, [C.V_STAGES, TT, C.R, C.DV], o_desc.layout)
    keys = Ring(k_s, new_barriers(C.K_STAGES, 1), new_barriers(C.K_STAGES, 1))
    values = Ring(v_s, new_barriers(C.V_STAGES, 1), new_barriers(C.V_STAGES, 1))
    do = Ring(do_s, new_barriers(1, 1), new_barriers(1, 1))
    if C.DK == 192:
        q_s = gl.allocate_shared_memory(dtype, [PARTS, TT, C.R, PART], q_desc.layout)
        queries = Ring(q_s, new_barriers(1, 1), new_barriers(1, 1))
    else:
        q_s = k_s._reinterpret(dtype, [C.K_STAGES, TT, C.R, C.DK], q_desc.layout)
        queries = keys
    k = Source(k_own, k_fetched, k_column, k_fetched_column)
    v = Source(v_own, v_fetched, v_column, v_fetched_column)
    gl.warp_specialize([
        (_multiply, (
            dq, log_sum, delta, gate, tiles, blocks, num_tiles, q_s, o_s, queries, keys, values, do,
            scale, logit_scale, C,
        )),
        (_load_warp, (
            q_desc, do_desc, o_desc, k, v, num_own, tiles, blocks, num_tiles, q_s, o_s, queries,
            keys, values, do, C,
        )),
    ], [1], [LOAD_REGISTERS])  # fmt: skip


def hopper_dq(
    q_NHD: Tensor,
    tensors: list[Tensor],
    o_NHD: Tensor,
    do_NHD: Tensor,
    gate_NH: Tensor | None,
    log_sum_NH: Tensor,
    delta_NH: Tensor,
    dq_NHD: Tensor,
    tiles: Tensor,
    lists: BlockLists,
    scale: float,
    logit_scale: float,
) -> None:
    """Write dq and delta, as `_dq_kernel` of backward.py. tensors, lists: see `walk_launch`."""
    stages = WIDE_STAGES if q_NHD.shape[2] > 128 else STAGES
    launch = walk_launch(q_NHD, tensors, tiles.shape[0], lists, stages)
    C = launch.constants
    q, do, o = (query_rows(x, C.R) for x in (q_NHD, do_NHD, o_NHD))
    launcher(_hopper_block_dq_kernel, (launch.programs,))(
        q, do, o, *launch.sources, launch.num_own, dq_NHD, log_sum_NH, delta_NH, gate_rows(gate_NH),
        tiles, lists, tiles.shape[0], scale, logit_scale, C=C, num_warps=4,
        maxnreg=LAUNCH_REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip

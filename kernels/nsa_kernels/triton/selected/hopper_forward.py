"""The selected branch's forward on Hopper, in Gluon: see hopper_walk.py, and forward.py.

Shared memory at widths of 128, of which two programs of a multiprocessor have 112 KB each:

    keys      3 x 16 KB             also q, which comes as the first tile of keys
    values    4 x 16 KB             one more, as P V comes a block later than S

At widths of 192 and 128 they are 3 x 24 KB and 2 x 16 KB.

The scores of a block are computed beside P V of the block before it:

    issue S = Q K^T and O += P V of the block before
    wait for S, free the keys                      maximum, P = exp2(S - maximum), sum
    wait for O, free the values                    O *= 2^(old maximum - new)

The order of sums is that of the plain kernel.
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
from nsa_kernels.triton.selected.lists import BlockLists, entry_length
from nsa_kernels.triton.shared.arithmetic import LN2
from nsa_kernels.triton.shared.hopper import (
    Ring,
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

STAGES, WIDE_STAGES = (3, 4), (3, 2)  # of keys and of values


@gluon.jit
def _load_warp(
    q_desc, k, v, num_own, tiles, blocks, num_tiles, q_s, keys, values, C: gl.constexpr
):  # fmt: skip
    """Ask for all tiles in the order in which they are needed. k, v: a `Source` each."""
    k_stage = gl.to_tensor(0)
    k_parity = gl.to_tensor(1)
    v_stage = gl.to_tensor(0)
    v_parity = gl.to_tensor(1)
    for p in range(gl.program_id(0), num_tiles * C.G, gl.num_programs(0)):
        walk = load_walk(p, tiles, blocks, num_tiles, C)
        entry = load_entry(walk, 0)
        k_stage, k_parity = ask_for_rows(
            q_desc, walk, keys, q_s, k_stage, k_parity, C.K_STAGES, C.DK, C
        )
        for i in range(walk.whole + walk.edges):
            following = load_entry(walk, i + 1)
            k_stage, k_parity = ask_for_block(
                k, entry, walk.g, num_own, keys, k_stage, k_parity, C.K_STAGES, C.DK, C
            )
            v_stage, v_parity = ask_for_block(
                v, entry, walk.g, num_own, values, v_stage, v_parity, C.V_STAGES, C.DV, C
            )
            entry = following


@gluon.jit
def _softmax(
    b_s, b_max, b_sum, entry, seen, token, logit_scale, EDGE: gl.constexpr, DTYPE: gl.constexpr,
    S_L: gl.constexpr, P_L: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over a block: P, the maximum, the sum, the old's scale."""
    b_s = gl.where(sees(entry, seen, token, EDGE, S_L), b_s, -float("inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * logit_scale)
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    b_safe = gl.where(b_new == -float("inf"), 0.0, b_new)
    b_scale = gl.exp2(b_max - b_safe)
    b_p = gl.exp2(gl.fma(b_s, logit_scale, gl.expand_dims(-b_safe, 1)))
    b_sum = gl.fma(b_sum, b_scale, gl.sum(b_p, 1))
    return gl.convert_layout(to_16_bits(b_p, DTYPE), P_L), b_new, b_sum, b_scale


@gluon.jit
def _clean(entry, v, C: gl.constexpr):
    """Zero the values of a block that nobody may see."""
    limit = entry_length(entry)
    if limit < ROWS:
        keep_rows(v, 0, limit, ROWS, C.DV)


@gluon.jit
def _step(
    entry, before, seen, b_acc, b_p, b_max, b_sum, b_q, token, keys, values, k_stage, k_parity,
    v_stage, v_parity, logit_scale, EDGE: gl.constexpr, C: gl.constexpr, S_L: gl.constexpr,
    O_L: gl.constexpr, P_L: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of a block, beside P V of the block `before`. seen: see `first_seen`."""
    zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
    mbarrier.wait(keys.full.index(k_stage), k_parity)
    a_s = multiply_rows(b_q, parts_of(keys.tiles, k_stage, ROWS, C.DK), zero, False)  # [64, 64]
    mbarrier.wait(values.full.index(v_stage), v_parity)
    v = values.tiles.index(v_stage)
    if EDGE:
        _clean(before, v, C)
    a_o = warpgroup_mma(b_p, v, b_acc, is_async=True)  # [64, DV]
    b_s = warpgroup_mma_wait(1, deps=(a_s,))
    mbarrier.arrive(keys.empty.index(k_stage), count=1)
    k_stage, k_parity = advance(k_stage, k_parity, C.K_STAGES)
    b_next, b_max, b_sum, b_scale = _softmax(
        b_s, b_max, b_sum, entry, seen, token, logit_scale, EDGE, keys.tiles.dtype, S_L, P_L
    )
    # An accumulator in flight over the loop's end would make every wgmma wait for the last.
    b_acc, b_p = warpgroup_mma_wait(0, deps=(a_o, b_p))
    mbarrier.arrive(values.empty.index(v_stage), count=1)
    v_stage, v_parity = advance(v_stage, v_parity, C.V_STAGES)
    b_scale = gl.convert_layout(b_scale, gl.SliceLayout(1, O_L))
    b_acc = b_acc * gl.expand_dims(b_scale, 1)
    return b_acc, b_next, b_max, b_sum, k_stage, k_parity, v_stage, v_parity


@gluon.jit
def _multiply(
    o, lse, log_sum, tiles, blocks, num_tiles, q_s, keys, values, logit_scale, C: gl.constexpr
):  # fmt: skip
    """o, lse and log_sum of all tiles of queries of a program."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    Q_L: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    PARTS: gl.constexpr = channel_parts(C.DK)
    dtype: gl.constexpr = keys.tiles.dtype
    k_stage = gl.to_tensor(0)
    k_parity = gl.to_tensor(0)
    v_stage = gl.to_tensor(0)
    v_parity = gl.to_tensor(0)
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L))
    token = o_m // C.R
    for p in range(gl.program_id(0), num_tiles * C.G, gl.num_programs(0)):
        walk = load_walk(p, tiles, blocks, num_tiles, C)
        count = walk.whole + walk.edges
        entry = load_entry(walk, 0)
        b_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_L))
        b_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_L))
        b_acc = gl.full([ROWS, C.DV], 0.0, gl.float32, O_L)

        mbarrier.wait(keys.full.index(k_stage), k_parity)
        q = parts_of(q_s, k_stage, ROWS, C.DK)
        b_q = ()
        for part in gl.static_range(PARTS):
            b_q = append(b_q, q[part].load(Q_L))
        q_stage = k_stage
        k_stage, k_parity = advance(k_stage, k_parity, C.K_STAGES)
        mbarrier.wait(keys.full.index(k_stage), k_parity)
        zero = gl.zeros([ROWS, ROWS], gl.float32, S_L)
        a_s = multiply_rows(b_q, parts_of(keys.tiles, k_stage, ROWS, C.DK), zero, False)
        b_q, b_s = wait_for_sums(0, b_q, a_s)
        # Only now: loads may still be under way when a barrier is passed, products that took their
        # results are not.
        free_read_stage(keys.empty.index(q_stage))
        mbarrier.arrive(keys.empty.index(k_stage), count=1)
        k_stage, k_parity = advance(k_stage, k_parity, C.K_STAGES)
        # The first block is taken for an edge, of which all see all where it is none.
        seen = gl.where(walk.whole > 0, ROWS, first_seen(walk, 0))
        b_p, b_max, b_sum, _scale = _softmax(
            b_s, b_max, b_sum, entry, seen, token, logit_scale, True, dtype, S_L, P_L
        )
        before = entry
        entry = load_entry(walk, 1)
        # From here on the values are those of the block before.
        inner = gl.maximum(walk.whole, 1)
        for i in range(1, inner):
            following = load_entry(walk, i + 1)
            b_acc, b_p, b_max, b_sum, k_stage, k_parity, v_stage, v_parity = _step(
                entry, before, 0, b_acc, b_p, b_max, b_sum, b_q, token, keys, values, k_stage,
                k_parity, v_stage, v_parity, logit_scale, False, C, S_L, O_L, P_L,
            )  # fmt: skip
            before = entry
            entry = following
        for i in range(inner, count):
            following = load_entry(walk, i + 1)
            b_acc, b_p, b_max, b_sum, k_stage, k_parity, v_stage, v_parity = _step(
                entry, before, first_seen(walk, i), b_acc, b_p, b_max, b_sum, b_q, token, keys,
                values, k_stage, k_parity, v_stage, v_parity, logit_scale, True, C, S_L, O_L, P_L,
            )  # fmt: skip
            before = entry
            entry = following
        mbarrier.wait(values.full.index(v_stage), v_parity)
        v = values.tiles.index(v_stage)
        _clean(before, v, C)
        a_o = warpgroup_mma(b_p, v, b_acc, is_async=True)  # [64, DV]
        b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)  # With nothing seen the maximum is -inf.
        b_log_sum = b_max + gl.log2(b_sum)
        m_m = token < walk.tokens
        row_head = (walk.row + token) * (C.G * C.R) + walk.g * C.R + o_m % C.R
        gl.store(log_sum + row_head, b_log_sum, mask=m_m)
        gl.store(lse + row_head, b_log_sum * LN2, mask=m_m)
        b_acc, b_p = warpgroup_mma_wait(0, deps=(a_o, b_p))
        mbarrier.arrive(values.empty.index(v_stage), count=1)
        v_stage, v_parity = advance(v_stage, v_parity, C.V_STAGES)
        b_sum = gl.expand_dims(gl.convert_layout(b_sum, gl.SliceLayout(1, O_L)), 1)
        store_rows(o, (b_acc / b_sum,), walk, dtype, C.DV, C)


@gluon.jit(do_not_specialize=["num_own", "num_tiles"])
def _hopper_block_forward_kernel(
    q_desc, k_own, v_own, k_fetched, v_fetched, k_column, v_column, k_fetched_column,
    v_fetched_column, num_own, o, lse, log_sum, tiles, blocks, num_tiles, logit_scale,
    C: gl.constexpr,
):  # fmt: skip
    """o [N, H, DV], lse and log_sum [N, H]."""
    dtype: gl.constexpr = q_desc.dtype
    PARTS: gl.constexpr = channel_parts(C.DK)
    PART: gl.constexpr = part_width(C.DK)
    k_s = gl.allocate_shared_memory(dtype, [C.K_STAGES * PARTS, ROWS, PART], k_own.layout)
    v_s = gl.allocate_shared_memory(dtype, [C.V_STAGES, ROWS, C.DV], v_own.layout)
    q_s = k_s._reinterpret(dtype, [C.K_STAGES * PARTS, ROWS // C.R, C.R, PART], q_desc.layout)
    keys = Ring(k_s, new_barriers(C.K_STAGES, 1), new_barriers(C.K_STAGES, 1))
    values = Ring(v_s, new_barriers(C.V_STAGES, 1), new_barriers(C.V_STAGES, 1))
    k = Source(k_own, k_fetched, k_column, k_fetched_column)
    v = Source(v_own, v_fetched, v_column, v_fetched_column)
    gl.warp_specialize([
        (_multiply, (o, lse, log_sum, tiles, blocks, num_tiles, q_s, keys, values, logit_scale, C)),
        (_load_warp, (q_desc, k, v, num_own, tiles, blocks, num_tiles, q_s, keys, values, C)),
    ], [1], [LOAD_REGISTERS])  # fmt: skip


def hopper_forward(
    q_NHD: Tensor,
    tensors: list[Tensor],
    o_NHD: Tensor,
    lse_NH: Tensor,
    log_sum_NH: Tensor,
    tiles: Tensor,
    lists: BlockLists,
    logit_scale: float,
) -> None:
    """Write o, lse and log_sum, as `_forward_kernel`. tensors, lists: see `walk_launch`."""
    stages = WIDE_STAGES if q_NHD.shape[2] > 128 else STAGES
    launch = walk_launch(q_NHD, tensors, tiles.shape[0], lists, stages)
    launcher(_hopper_block_forward_kernel, (launch.programs,))(
        query_rows(q_NHD, launch.constants.R), *launch.sources, launch.num_own, o_NHD, lse_NH,
        log_sum_NH, tiles, lists, tiles.shape[0], logit_scale, C=launch.constants, num_warps=4,
        maxnreg=LAUNCH_REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip

"""Attention to a band of consecutive keys on Hopper GPUs: what forward.py says, by TMA and wgmma.

The maths and the tiles of keys are those of forward.py. What differs is who does what:

- A program stays on its multiprocessor and takes one tile of queries after another. One producer
  warp loads tiles of queries, keys and values into rings of shared memory. Each of the consumers, a
  warpgroup with 64 rows of queries, multiplies them; they share the tiles of keys and values.
- A consumer issues S = q k^T of tile j, then O += P v of tile j - 1, and takes the exponentials of
  tile j as soon as S is there, beside P v. Consumers take turns in issuing, so that exponentials of
  one stand beside products of the others.
- O stays in registers, P goes there from S without a detour, so a consumer owns all of its sums.

TMA takes no mask. What it brings of other documents' queries is computed with and never stored;
their keys are masked as late ones are. Their values are set to zero in shared memory, in the first
and the last tile alone: others hold only keys that some query of the tile sees.

Tensor cores cut off what an accumulator cannot hold instead of rounding it. Over 1024 tiles, which
are 65,536 compressed keys, that makes O too small by 2e-4: nothing beside its rounding to 16 bits,
but delta, which backward makes of O and dO, is then off by the same share of a large sum, and dQ
with it. So after PIECE tiles O is put aside and starts from 0. There are no registers for a second
one: it goes to memory that each consumer has for itself, and that stays in the L2 cache. A piece
ends at a multiple of PIECE, whatever tokens are in the tile of queries, and a key that a query does
not see adds 0 to what was put aside: the bits of o do not depend on the tile.

Letters are those of forward.py. NC consumers of TW = 64/R tokens each, a tile of BT = NC*TW tokens.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.band import Band, constants, num_seen
from nsa_kernels.triton.shared.arithmetic import LN2, logit_scale
from nsa_kernels.triton.shared.hopper import (
    WARPGROUP_ROWS,
    Ring,
    advance,
    for_tma,
    head_tiles,
    keep_rows,
    new_barriers,
    persistent_programs,
    retreat,
    row_tiles,
    to_16_bits,
)
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import HopperTile
from nsa_kernels.triton.shared.tables import load_query_tile, query_tiles

ROWS = gl.constexpr(WARPGROUP_ROWS)
# Tiles of keys that one accumulator adds up: a quarter of those with which O is off by 2e-4.
PIECE = gl.constexpr(256)


@gluon.jit
def _query_tile(work, tiles, num_tiles, C: gl.constexpr):
    """First row, tokens, position of the first and row of key 0 of a program's piece of work.

    Late tokens see most: starting with them leaves the short tiles for the end.
    """
    return load_query_tile(tiles, gl.maximum(num_tiles - 1 - work // C.G, 0))


@gluon.jit
def _key_range(position, num_tokens, C: gl.constexpr):
    """What a tile of queries sees: keys [first, limit) in tiles of keys [begin, end), at least one.

    From tile `inner` on no tile begins before a query's window; all queries see all keys of the
    tiles from `inner` to `shared`. The first tile counts as one that needs masks.
    """
    last = position + num_tokens - 1
    limit = num_seen(last, C)
    first = gl.to_tensor(0)
    begin = gl.to_tensor(0)
    if C.WINDOW > 0:
        first = gl.maximum(position - C.WINDOW + 1, 0)
        begin = first // C.BN
    end = gl.maximum((limit + C.BN - 1) // C.BN, begin + 1)
    inner = begin + 1
    if C.WINDOW > 0:
        left = (gl.maximum(last - C.WINDOW + 1, 0) + C.BN - 1) // C.BN
        inner = gl.minimum(gl.maximum(left, inner), end)
    shared = gl.maximum(num_seen(position, C) // C.BN, inner)
    return first, limit, begin, inner, shared, end


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    q_rest_desc,
    k_rest_desc,
    q,
    k,
    v,
    q_rest,
    k_rest,
    tiles,
    num_tiles,
    k_head,
    v_head,
    NC: gl.constexpr,
    STAGES: gl.constexpr,
    C: gl.constexpr,
):
    """Load all tiles of a program in the order in which the consumers take them.

    k_head, v_head: columns between two heads. The rest of q and k: see `_kernel`.
    """
    TW: gl.constexpr = ROWS // C.R
    WIDE: gl.constexpr = C.DK == 192
    stage = gl.to_tensor(0)
    parity = gl.to_tensor(1)
    q_parity = gl.to_tensor(1)
    for work in range(gl.program_id(0), num_tiles * C.G, gl.num_programs(0)):
        g = work % C.G
        first_row, num_tokens, position, base = _query_tile(work, tiles, num_tiles, C)
        _, _, begin, _, _, end = _key_range(position, num_tokens, C)
        for j in range(begin, end):
            row = base.to(gl.int32) + j * C.BN
            full = k.full.index(stage)
            mbarrier.wait(k.empty.index(stage), parity)
            mbarrier.expect(full, C.BN * C.DK * 2)
            tma.async_copy_global_to_shared(k_desc, [row, g * k_head], full, k.tiles.index(stage))
            if WIDE:
                tma.async_copy_global_to_shared(
                    k_rest_desc, [row, g * k_head], full, k_rest.index(stage)
                )
            if j == begin:
                for w in gl.static_range(NC):
                    at = [first_row.to(gl.int32) + w * TW, g * C.R, 0]
                    q_full = q.full.index(w)
                    mbarrier.wait(q.empty.index(w), q_parity)
                    mbarrier.expect(q_full, ROWS * C.DK * 2)
                    tma.async_copy_global_to_shared(q_desc, at, q_full, q.tiles.index(w))
                    if WIDE:
                        tma.async_copy_global_to_shared(q_rest_desc, at, q_full, q_rest.index(w))
            full = v.full.index(stage)
            mbarrier.wait(v.empty.index(stage), parity)
            mbarrier.expect(full, C.BN * C.DV * 2)
            tma.async_copy_global_to_shared(v_desc, [row, g * v_head], full, v.tiles.index(stage))
            stage, parity = advance(stage, parity, STAGES)
        q_parity ^= 1


@gluon.jit
def _multiply_keys(q, q_rest, k, k_rest, stage, S_L: gl.constexpr, C: gl.constexpr):
    """Issue S = q k^T [64, BN] with the keys of a stage."""
    zero = gl.full([ROWS, C.BN], 0.0, gl.float32, S_L)
    b_s = warpgroup_mma(q, k.tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if C.DK == 192:
        b_s = warpgroup_mma(q_rest, k_rest.index(stage).permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def _change(b_old, b_new):
    """What sums relative to the maximum b_old are multiplied by, to be relative to b_new."""
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    return gl.exp2(b_old - gl.where(b_new == -float("inf"), 0.0, b_new))


@gluon.jit
def _softmax(
    b_s,
    b_max,
    b_sum,
    scale,
    t,
    until,
    j,
    MASKED: gl.constexpr,
    DTYPE: gl.constexpr,
    S_L: gl.constexpr,
    P_L: gl.constexpr,
    C: gl.constexpr,
):
    """One step of the online softmax over S of tile j: P, the maximum, the sum, the old's scale."""
    if MASKED:
        o_j = j * C.BN + gl.arange(0, C.BN, layout=gl.SliceLayout(0, S_L))
        # As `sees`, with the division out of the loop: a comparison for each score.
        seen = gl.expand_dims(o_j, 0) < gl.expand_dims(until, 1)
        if C.WINDOW > 0:
            seen = seen & (gl.expand_dims(o_j, 0) > gl.expand_dims(t - C.WINDOW, 1))
        b_s = gl.where(seen, b_s, -float("inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale)
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    b_safe = gl.where(b_new == -float("inf"), 0.0, b_new)
    b_scale = gl.exp2(b_max - b_safe)
    # Fused by hand: a tile that is masked for some must round as one that is not.
    b_p = gl.exp2(gl.fma(b_s, scale, gl.expand_dims(-b_safe, 1)))
    b_sum = gl.fma(b_sum, b_scale, gl.sum(b_p, 1))
    return gl.convert_layout(to_16_bits(b_p, DTYPE), P_L), b_new, b_sum, b_scale


@gluon.jit
def _steps(
    low,
    high,
    b_acc,
    b_p,
    b_max,
    b_sum,
    b_max_aside,
    aside,
    q,
    q_rest,
    k,
    v,
    k_rest,
    stage,
    parity,
    my_turn,
    next_turn,
    turn,
    scale,
    t,
    until,
    MASKED: gl.constexpr,
    APART: gl.constexpr,
    STAGES: gl.constexpr,
    S_L: gl.constexpr,
    P_L: gl.constexpr,
    O_L: gl.constexpr,
    C: gl.constexpr,
):
    """Scores and softmax of the tiles [low, high), each beside P v of the tile before it."""
    for j in range(low, high):
        mbarrier.wait(k.full.index(stage), parity)
        mbarrier.wait(my_turn, turn)
        b_s = _multiply_keys(q, q_rest, k, k_rest, stage, S_L, C)  # [64, BN]
        v_stage, v_parity = retreat(stage, parity, STAGES)
        mbarrier.wait(v.full.index(v_stage), v_parity)
        b_o = warpgroup_mma(b_p, v.tiles.index(v_stage), b_acc, is_async=True)  # [64, DV]
        mbarrier.arrive(next_turn, count=1)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        mbarrier.arrive(k.empty.index(stage), count=1)
        b_next, b_max, b_sum, b_scale = _softmax(
            b_s, b_max, b_sum, scale, t, until, j, MASKED, v.tiles.dtype, S_L, P_L, C
        )
        # An accumulator in flight over the loop's end would make every wgmma wait for the last.
        b_o, b_p = warpgroup_mma_wait(0, deps=(b_o, b_p))
        mbarrier.arrive(v.empty.index(v_stage), count=1)
        b_scale = gl.convert_layout(b_scale, gl.SliceLayout(1, O_L))
        b_acc = b_o * gl.expand_dims(b_scale, 1)
        b_p = b_next
        stage, parity = advance(stage, parity, STAGES)
        turn ^= 1
        if APART:  # noqa: SIM102 (known when this is compiled)
            if (j + 1) % PIECE == 0:
                b_change = _change(b_max_aside, b_max)
                b_acc = _put_aside(b_acc, aside, j + 1 == PIECE, b_change, O_L, C)
                b_max_aside = b_max
    return b_acc, b_p, b_max, b_sum, b_max_aside, stage, parity, turn


@gluon.jit
def _at(p, first_column: gl.constexpr, L: gl.constexpr, WIDTH: gl.constexpr, C: gl.constexpr):
    """Columns of p [64, DV]. Every thread has the same of them as in an accumulator."""
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L)) + first_column
    return p + gl.expand_dims(o_m * C.DV, 1) + gl.expand_dims(o_d, 0)


@gluon.jit
def _put_aside(b_acc, aside, first, b_scale, O_L: gl.constexpr, C: gl.constexpr):
    """aside [64, DV] becomes aside * b_scale + b_acc, or b_acc if that is the first; returns 0.

    b_acc is written behind aside first, and added some columns at a time: there are no registers
    for both.
    """
    if first:
        gl.store(_at(aside, 0, O_L, C.DV, C), b_acc)
    else:
        p_new = aside + ROWS * C.DV
        gl.store(_at(p_new, 0, O_L, C.DV, C), b_acc)
        L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
        DV: gl.constexpr = C.DV
        b_factor = gl.expand_dims(gl.convert_layout(b_scale, gl.SliceLayout(1, L)), 1)
        for column in gl.static_range(0, DV, 16):
            b_old = gl.load(_at(aside, column, L, 16, C))
            b_new = gl.load(_at(p_new, column, L, 16, C))
            gl.store(_at(aside, column, L, 16, C), gl.fma(b_old, b_factor, b_new))
    return gl.full([ROWS, C.DV], 0.0, gl.float32, O_L)


@gluon.jit
def _keep_values(v, stage, low, high, clean, parities, w: gl.constexpr, C: gl.constexpr):
    """Zero the values of a stage outside [low, high), the first consumer for all of them.

    A stage has a barrier of its own for this, which is used at most once before the stage is loaded
    anew: so no consumer can be a phase behind. parities: a bit for each stage.
    """
    if w == 0:
        keep_rows(v.tiles.index(stage), low, high, C.BN, C.DV)
        mbarrier.arrive(clean.index(stage), count=1)
    mbarrier.wait(clean.index(stage), (parities >> stage) & 1)
    return parities ^ (1 << stage)


@gluon.jit
def _store(
    b_o,
    b_lse,
    o_desc,
    o,
    lse,
    o_s,
    row,
    tokens,
    g,
    S_L: gl.constexpr,
    O_L: gl.constexpr,
    C: gl.constexpr,
):
    """o [64, DV] and lse [64] of the rows of `tokens` tokens from `row` on, none if below 1."""
    TW: gl.constexpr = ROWS // C.R
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L))
    row_head = (row + o_m // C.R) * (C.G * C.R) + g * C.R + o_m % C.R
    gl.store(lse + row_head, b_lse, mask=o_m // C.R < tokens)
    tma.store_wait(0)  # Of the tile before.
    if tokens >= TW:
        o_s.reshape((ROWS, C.DV)).store(b_o)
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [row.to(gl.int32), g * C.R, 0], o_s)
    else:
        o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O_L))
        o_dv = gl.arange(0, C.DV, layout=gl.SliceLayout(0, O_L))
        o_head = (row + o_row // C.R) * (C.G * C.R) + g * C.R + o_row % C.R
        p_o = o + gl.expand_dims(o_head * C.DV, 1) + gl.expand_dims(o_dv, 0)
        gl.store(p_o, b_o, mask=gl.expand_dims(o_row // C.R < tokens, 1))


@gluon.jit
def _consume(
    w: gl.constexpr,
    o_desc,
    o,
    lse,
    aside,
    q,
    k,
    v,
    q_rest,
    k_rest,
    o_s,
    turns,
    clean,
    tiles,
    num_tiles,
    scale,
    NC: gl.constexpr,
    APART: gl.constexpr,
    STAGES: gl.constexpr,
    C: gl.constexpr,
):
    """o and lse of rows [64w, 64w + 64) of all query tiles of a program."""
    TW: gl.constexpr = ROWS // C.R
    WIDE: gl.constexpr = C.DK == 192
    DTYPE: gl.constexpr = v.tiles.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    stage = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    q_parity = gl.to_tensor(0)
    clean_parities = gl.to_tensor(0)
    turn = gl.to_tensor(1 if w == 0 else 0)
    my_turn = turns.index(w)
    next_turn = turns.index((w + 1) % NC)
    q_w = q.tiles.index(w).reshape((ROWS, 128 if WIDE else C.DK))
    q_rest_w = q_rest.index(w).reshape((ROWS, 64)) if WIDE else q_w
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L))
    aside += (gl.program_id(0) * NC + w) * (2 * ROWS * C.DV)
    first_row, num_tokens, position, _base = _query_tile(gl.program_id(0), tiles, num_tiles, C)
    for work in range(gl.program_id(0), num_tiles * C.G, gl.num_programs(0)):
        first, limit, begin, inner, shared, end = _key_range(position, num_tokens, C)
        t = position + w * TW + o_m // C.R
        until = num_seen(t, C)
        b_max = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_L))
        b_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_L))
        b_acc = gl.full([ROWS, C.DV], 0.0, gl.float32, O_L)

        mbarrier.wait(q.full.index(w), q_parity)
        mbarrier.wait(k.full.index(stage), parity)
        mbarrier.wait(my_turn, turn)
        b_s = _multiply_keys(q_w, q_rest_w, k, k_rest, stage, S_L, C)  # [64, BN]
        mbarrier.arrive(next_turn, count=1)
        turn ^= 1
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k.empty.index(stage), count=1)
        b_p, b_max, b_sum, b_scale = _softmax(
            b_s, b_max, b_sum, scale, t, until, begin, True, DTYPE, S_L, P_L, C
        )
        if (first > begin * C.BN) & (end > begin + 1):
            mbarrier.wait(v.full.index(stage), parity)
            low = first - begin * C.BN
            clean_parities = _keep_values(v, stage, low, C.BN, clean, clean_parities, w, C)
        # From here on the values are those of the stage before.
        stage, parity = advance(stage, parity, STAGES)
        b_max_aside = b_max
        if C.WINDOW > 0:
            b_acc, b_p, b_max, b_sum, b_max_aside, stage, parity, turn = _steps(
                begin + 1, inner, b_acc, b_p, b_max, b_sum, b_max_aside, aside, q_w, q_rest_w, k,
                v, k_rest, stage, parity, my_turn, next_turn, turn, scale, t, until, True,
                APART, STAGES, S_L, P_L, O_L, C,
            )  # fmt: skip
        b_acc, b_p, b_max, b_sum, b_max_aside, stage, parity, turn = _steps(
            inner, shared, b_acc, b_p, b_max, b_sum, b_max_aside, aside, q_w, q_rest_w, k, v,
            k_rest, stage, parity, my_turn, next_turn, turn, scale, t, until, False,
            APART, STAGES, S_L, P_L, O_L, C,
        )  # fmt: skip
        b_acc, b_p, b_max, b_sum, b_max_aside, stage, parity, turn = _steps(
            shared, end, b_acc, b_p, b_max, b_sum, b_max_aside, aside, q_w, q_rest_w, k, v,
            k_rest, stage, parity, my_turn, next_turn, turn, scale, t, until, True,
            APART, STAGES, S_L, P_L, O_L, C,
        )  # fmt: skip
        mbarrier.arrive(q.empty.index(w), count=1)
        q_parity ^= 1

        v_stage, v_parity = retreat(stage, parity, STAGES)
        mbarrier.wait(v.full.index(v_stage), v_parity)
        low, high = first - (end - 1) * C.BN, limit - (end - 1) * C.BN
        if (low > 0) | (high < C.BN):
            clean_parities = _keep_values(v, v_stage, low, high, clean, clean_parities, w, C)
        b_o = warpgroup_mma(b_p, v.tiles.index(v_stage), b_acc, is_async=True)  # [64, DV]
        row, tokens = first_row + w * TW, num_tokens - w * TW
        # Asked for here, the next tile's numbers come beside the last product.
        first_row, num_tokens, position, _base = _query_tile(
            work + gl.num_programs(0), tiles, num_tiles, C
        )
        b_sum = gl.where(b_sum == 0.0, 1.0, b_sum)  # With nothing seen the maximum is -inf.
        b_lse = (b_max + gl.log2(b_sum)) * LN2
        b_scale = gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, O_L))
        b_change = _change(b_max_aside, b_max)
        b_o, b_p = warpgroup_mma_wait(0, deps=(b_o, b_p))
        mbarrier.arrive(v.empty.index(v_stage), count=1)
        if APART:  # noqa: SIM102 (known when this is compiled)
            if end >= PIECE:
                _put_aside(b_o, aside, False, b_change, O_L, C)
                b_o = gl.load(_at(aside, 0, O_L, C.DV, C))
        b_o = (b_o * gl.expand_dims(b_scale, 1)).to(DTYPE)
        _store(b_o, b_lse, o_desc, o, lse, o_s.index(w), row, tokens, work % C.G, S_L, O_L, C)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles"])
def _hopper_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    q_rest_desc,
    k_rest_desc,
    o_desc,
    o,
    lse,
    aside,
    tiles,
    num_tiles,
    k_head,
    v_head,
    scale,
    APART: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    C: gl.constexpr,
):
    """o and lse of all tiles of queries.

    APART: whether a tile may see PIECE tiles of keys. aside: float32 [programs of the grid,
    consumers, 2, 64, DV] then, else not used.
    Widths of tiles are powers of two: 192 channels of q and k are 128 and the rest of 64.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    NC: gl.constexpr = C.BM // ROWS
    gl.static_assert(NC == 3)
    TW: gl.constexpr = ROWS // C.R
    WIDE: gl.constexpr = C.DK == 192
    DK: gl.constexpr = 128 if WIDE else C.DK
    q_s = gl.allocate_shared_memory(DTYPE, [NC, TW, C.R, DK], q_desc.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, C.BN, DK], k_desc.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, C.BN, C.DV], v_desc.layout)
    o_s = gl.allocate_shared_memory(DTYPE, [NC, TW, C.R, C.DV], o_desc.layout)
    q_rest = q_s
    k_rest = k_s
    if WIDE:
        q_rest = gl.allocate_shared_memory(DTYPE, [NC, TW, C.R, 64], q_rest_desc.layout)
        k_rest = gl.allocate_shared_memory(DTYPE, [STAGES, C.BN, 64], k_rest_desc.layout)
    q = Ring(q_s, new_barriers(NC, 1), new_barriers(NC, 1))
    k = Ring(k_s, new_barriers(STAGES, 1), new_barriers(STAGES, NC))
    v = Ring(v_s, new_barriers(STAGES, 1), new_barriers(STAGES, NC))
    turns = new_barriers(NC, 1)
    clean = new_barriers(STAGES, 1)
    # Arguments are written out: constants of a tuple that has a name would become tensors.
    gl.warp_specialize([
        (_consume, (0, o_desc, o, lse, aside, q, k, v, q_rest, k_rest, o_s, turns, clean, tiles,
                    num_tiles, scale, NC, APART, STAGES, C)),
        (_consume, (1, o_desc, o, lse, aside, q, k, v, q_rest, k_rest, o_s, turns, clean, tiles,
                    num_tiles, scale, NC, APART, STAGES, C)),
        (_consume, (2, o_desc, o, lse, aside, q, k, v, q_rest, k_rest, o_s, turns, clean, tiles,
                    num_tiles, scale, NC, APART, STAGES, C)),
        (_produce, (q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc, q, k, v, q_rest, k_rest,
                    tiles, num_tiles, k_head, v_head, NC, STAGES, C)),
    ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


def hopper_forward(
    q_NHD: Tensor,
    k_EGD: Tensor,
    v_EGD: Tensor,
    o_NHD: Tensor,
    lse_NH: Tensor,
    segments: QuerySegments,
    band: Band,
    scale: float,
    tile: HopperTile,
) -> None:
    """Write o and lse of q [N, H, Dk], k [E, G, Dk] and v [E, G, Dv], N at least 1."""
    if not k_EGD.shape[0]:  # A descriptor has at least one row; nobody sees this one.
        k_EGD, v_EGD = (x.new_empty(1, *x.shape[1:]) for x in (k_EGD, v_EGD))
    q_NHD, k_EGD, v_EGD = (for_tma(x) for x in (q_NHD, k_EGD, v_EGD))
    C = constants(q_NHD, v_EGD, band, tile)
    tiles = query_tiles(segments, C.BT, band.column)
    tokens, num_tiles = WARPGROUP_ROWS // C.R, tiles.host.shape[0]
    first, rest = (128, 64) if C.DK == 192 else (C.DK, 0)
    programs = persistent_programs(q_NHD, num_tiles * C.G)
    # Nothing is put aside within fewer keys: the same bits, with more registers.
    apart = not band.window and k_EGD.shape[0] >= PIECE.value * C.BN
    shape = (programs, C.BM // WARPGROUP_ROWS, 2, WARPGROUP_ROWS, C.DV)
    aside = lse_NH.new_empty(shape) if apart else lse_NH
    launcher(_hopper_forward_kernel, (programs,))(
        head_tiles(q_NHD, tokens, C.R, first),
        row_tiles(k_EGD, C.BN, first),
        row_tiles(v_EGD, C.BN, C.DV),
        head_tiles(q_NHD, tokens, C.R, rest, first) if rest else None,
        row_tiles(k_EGD, C.BN, rest, first) if rest else None,
        head_tiles(o_NHD, tokens, C.R, C.DV),
        o_NHD,
        lse_NH,
        aside,
        tiles.table,
        num_tiles,
        k_EGD.stride(1),
        v_EGD.stride(1),
        logit_scale(q_NHD, scale),
        APART=apart,
        STAGES=tile.stages,
        REGISTERS=tile.consumer_registers,
        C=C,
        num_warps=4,
        maxnreg=tile.registers,
        enable_fp_fusion=False,
    )

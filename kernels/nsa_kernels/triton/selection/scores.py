"""The choice of blocks from the compressed attention's probabilities (Eq. 9 to 12, 2502.11089).

Two kernels take turns over chunks of the query rows, so that the scores between them need no more
than WORKSPACE_BYTES at any length:

    score    p = exp(scale q.k - lse) of every visible key, summed over the heads of a group and,
             weighted, over the keys of each selection block;
    choose   the highest of a query's scores, by bisection over their bits.

Scores of different blocks do not depend on each other, so that long rows of keys are shared among
programs. A tile of scores is computed with keys as its rows and (head, token) as its columns: then
all heads of a token are in the registers of one thread, and their sum costs additions alone. Every
block is summed by the same additions in the same order, wherever it stands, so that equal
probabilities give equal scores and ties fall as the definition says. Bits depend neither on the
chunks nor on which queries share a program: the one multiply-add is written out, and the compiler
may make no other, since keys that only some of a tile's queries see take another loop.

A key counts for the selection block where it begins and, where compression blocks overlap, for the
one after it. So a score is made of one or two parts: score[j] = own[j] + passed_on[j - 1].

Letters: N local rows, H query heads, G KV heads, R = H/G, PR = R padded to a power of two, C keys,
B selection blocks, n chosen blocks, l compress_block, d compress_stride, l' select_block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.selection.chunks import Chunk
from nsa_kernels.triton.shared.arithmetic import precision
from nsa_kernels.triton.shared.shapes import ScoreTile, score_widths
from nsa_kernels.triton.shared.tables import QueryTiles

# Key tiles of one program of the score kernel; more are shared out.
SPAN_TILES = 64


@triton.jit
def _load(p_row, m_row, BEGIN: tl.constexpr, END: tl.constexpr, PADDED: tl.constexpr):
    """Channels [BEGIN, END) of rows that start at p_row [X] in a tile [X, PADDED]."""
    o_d = BEGIN + tl.arange(0, PADDED)
    mask = m_row[:, None]
    if BEGIN + PADDED != END:
        mask = mask & (o_d < END)[None, :]
    return tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _score_tiles(
    scores,
    o_scores,
    m_store,
    b_q,
    b_q_rest,
    b_lse,
    b_t,
    k,
    base,
    begin,
    end,
    limit,
    stride_kt,
    pitch,
    scale,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
    MASKED: tl.constexpr,
    PR: tl.constexpr,
    BT: tl.constexpr,
    NEAR: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums of each key tile in [begin, end), stored at o_scores [NEAR, 1, BT / NEAR]."""
    o_in = tl.arange(0, PER_BLOCK)
    # How many of the l/d strides of a key fall into the block it begins in, and into the next.
    b_own = tl.minimum(PER_BLOCK - o_in, OVERLAP).to(tl.float32)
    b_next = tl.maximum(OVERLAP - PER_BLOCK + o_in, 0).to(tl.float32)
    for start in tl.range(begin, end, BN):
        o_j = start + tl.arange(0, BN)
        p_k = k + (base + o_j.to(tl.int64)) * stride_kt
        m_j = o_j < limit if MASKED else tl.full([BN], True, tl.int1)
        b_k = _load(p_k, m_j, 0, min(DK, D), D)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        if D_REST > 0:
            b_k = _load(p_k, m_j, D, DK, D_REST)
            b_s = tl.dot(b_k, tl.trans(b_q_rest), b_s, input_precision=PRECISION)
        # The difference before log2(e): the largest logit is near lse, where it loses nothing.
        b_p = tl.exp2(tl.fma(b_s, scale, -b_lse[None, :]) * 1.4426950408889634)
        if MASKED:
            b_p = tl.where(o_j[:, None] * STRIDE + OFFSET <= b_t[None, :], b_p, 0.0)
        b_h = tl.sum(tl.reshape(b_p, [BN, BT // NEAR, PR, NEAR]), 2)
        b_h = tl.reshape(b_h, [BN // PER_BLOCK, PER_BLOCK, BT // NEAR, NEAR])
        b_sum = tl.sum(b_h * b_own[None, :, None, None], 1)
        # This order of dimensions is that of the threads, which spares an exchange between warps.
        b_sum = tl.permute(b_sum, (2, 0, 1))  # [NEAR, BN / PER_BLOCK, BT / NEAR]
        o_b = (start // PER_BLOCK + tl.arange(0, BN // PER_BLOCK))[None, :, None]
        p_out = scores + (o_scores + o_b * (1 if OVERLAP == 1 else 2))
        if OVERLAP == 1:
            tl.store(p_out, b_sum, mask=m_store)
        else:
            b_passed = tl.permute(tl.sum(b_h * b_next[None, :, None, None], 1), (2, 0, 1))
            tl.store(p_out, b_sum, mask=m_store)
            tl.store(p_out + 3, b_passed, mask=m_store & (o_b + 1 < pitch))


@triton.jit(do_not_specialize=["end_tile", "begin_row", "end_row"])
def _score_kernel(
    q,
    k,
    lse,
    scores,
    tiles,
    end_tile,
    begin_row,
    end_row,
    pitch,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    scale,
    G: tl.constexpr,
    R: tl.constexpr,
    PR: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    NEAR: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    D: tl.constexpr,
    D_REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scores [end_row - begin_row, G, pitch, PARTS] of a query tile's rows and a span of keys."""
    # Late tokens see most: starting with them leaves the short programs for the end.
    i_tile = end_tile - 1 - tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    first_row = tl.load(tiles + i_tile * 4)
    num_tokens = tl.load(tiles + i_tile * 4 + 1).to(tl.int32)
    position = tl.load(tiles + i_tile * 4 + 2).to(tl.int32)
    base = tl.load(tiles + i_tile * 4 + 3)

    last = position + num_tokens - 1
    limit = tl.maximum(last - OFFSET + STRIDE, 0) // STRIDE  # Keys that the last query sees.
    shared = tl.maximum(position - OFFSET + STRIDE, 0) // STRIDE // BN * BN
    begin = tl.program_id(2) * SPAN
    # A tile that the chunk's end cuts may hold later tokens, which see blocks past the pitch.
    end = tl.minimum(tl.minimum(begin + SPAN, limit), pitch * PER_BLOCK)
    if begin >= end:
        return
    shared = tl.minimum(tl.maximum(shared, begin), end)  # Before: all tiles seen by all.

    # Columns are (token // NEAR, head, token % NEAR), see above.
    o_m = tl.arange(0, PR * BT)
    token = o_m // (PR * NEAR) * NEAR + o_m % NEAR
    head = o_m // NEAR % PR
    m_m = (token < num_tokens) & (head < R)
    row = first_row + token
    p_q = q + row * stride_qt + (i_g * R + head) * stride_qh
    b_q = _load(p_q, m_m, 0, min(DK, D), D)  # [BM, D]
    b_q_rest = b_q
    if D_REST > 0:
        b_q_rest = _load(p_q, m_m, D, DK, D_REST)
    # Infinity makes the probabilities of columns that are no head's zero.
    b_lse = tl.load(lse + row * (G * R) + i_g * R + head, mask=m_m, other=float("inf"))
    o_t = tl.arange(0, BT // NEAR)[None, None, :] * NEAR + tl.arange(0, NEAR)[:, None, None]
    row_t = first_row + o_t
    m_store = (o_t < num_tokens) & (row_t >= begin_row) & (row_t < end_row)
    # In 32 bits, as the workspace is small.
    o_scores = ((row_t - begin_row).to(tl.int32) * G + i_g.to(tl.int32)) * PARTS * pitch
    k += i_g * stride_kh
    _score_tiles(
        scores, o_scores, m_store, b_q, b_q_rest, b_lse, position + token, k, base, begin, shared,
        limit, stride_kt, pitch, scale, OFFSET, STRIDE, PER_BLOCK, OVERLAP, False,
        PR, BT, NEAR, BN, DK, D, D_REST, PRECISION,
    )  # fmt: skip
    _score_tiles(
        scores, o_scores, m_store, b_q, b_q_rest, b_lse, position + token, k, base, shared, end,
        limit, stride_kt, pitch, scale, OFFSET, STRIDE, PER_BLOCK, OVERLAP, True,
        PR, BT, NEAR, BN, DK, D, D_REST, PRECISION,
    )  # fmt: skip


def pitch(blocks: int) -> int:
    """Scores of a row: whole tiles of any shape."""
    return triton.cdiv(blocks, 64) * 64


def score_parts(block: int, stride: int) -> int:
    """Parts of a score: what begins in the block and, where blocks overlap, what is passed on."""
    return 1 if block == stride else 2


def score_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scores: Tensor,
    tiles: QueryTiles,
    chunk: Chunk,
    shape: ScoreTile,
    *,
    block: int,
    stride: int,
    select_block: int,
    scale: float,
) -> None:
    """Write the chunk's scores [rows, G, pitch, parts] to the workspace `scores`."""
    groups, width = k.shape[1:]
    ratio = q.shape[1] // groups
    head_columns = triton.next_power_of_2(ratio)
    tokens = shape.columns // head_columns
    # 128 columns of a warp: their heads are summed in one thread, or in few.
    near = min(tokens, 8, 128 // head_columns)
    per_block = select_block // stride
    blocks = chunk.last // select_block + 1
    spans = triton.cdiv(blocks * per_block, SPAN_TILES * shape.keys)
    first, rest = score_widths(width)
    _score_kernel[(chunk.end_tile - chunk.first_tile, groups, spans)](
        q, k, lse, scores, tiles.table, chunk.end_tile, chunk.begin, chunk.end,
        pitch(blocks), *q.stride()[:2], *k.stride()[:2], scale, G=groups,
        R=ratio, PR=head_columns, OFFSET=block - 1, STRIDE=stride,
        PER_BLOCK=per_block, OVERLAP=block // stride, PARTS=score_parts(block, stride),
        SPAN=SPAN_TILES * shape.keys, BT=tokens, NEAR=near, BN=shape.keys, DK=width,
        D=first, D_REST=rest, PRECISION=precision(q), num_warps=shape.warps,
        num_stages=shape.stages, maxnreg=shape.registers, enable_fp_fusion=False,
    )  # fmt: skip

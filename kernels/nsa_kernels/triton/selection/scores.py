"""The choice of blocks from the compressed attention's probabilities (Eq. 9 to 11, 2502.11089).

Two kernels take turns over chunks of the query rows, so that the scores between them need no more
than WORKSPACE_BYTES at any length:

    score    p = exp(scale q.k - lse) of every visible key, summed over the heads of a group and,
             weighted, over the keys of each selection block;
    choose   the highest of a query's scores, by bisection over their bits.

Scores of different blocks do not depend on each other, so that long rows of keys are shared among
programs. A tile of scores is computed with keys as its rows and (head, token) as its columns: then
all heads of a token are in the registers of one thread, and their sum costs additions alone. A
thread also has rows i and i + 8 of every 16. On Hopper, with 16 heads and more, the keys of a block
stand there: one half of them in rows 0 to 7, the other in rows 8 to 15, and each addition of two
halves is a thread's own.

In 16 bits p is one multiply-add and one power of 2: log2(e) is part of scale and of lse. It is
rounded to 16 bits, so that its product with a log-sum-exp of up to 8 bits has no error: where
logits are that simple, as in a row with one key far above all others, p is exact. In float32 the
difference comes before log2(e): the largest logit is near lse, where it loses nothing.

Every block is summed by the same additions in the same order, wherever it stands, so that equal
probabilities give equal scores and ties fall as the definition says. Bits depend neither on the
chunks nor on which queries share a program: the one multiply-add is written out, and the compiler
may make no other, since keys that only some of a tile's queries see take another loop.

A key counts for the selection block where it begins and, where compression blocks overlap, for the
one after it. So a score is made of one or two parts: score[j] = own[j] + passed_on[j - 1].

Letters: N local rows, H query heads, G KV heads, R = H/G, PR = R padded to a power of two, C keys,
B selection blocks, n chosen blocks, l compress_block, d compress_stride, l' select_block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.selection.chunks import Chunk
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.arithmetic import LOG2E as _LOG2E
from nsa_kernels.triton.shared.arithmetic import precision
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import ScoreTile, cdiv, power_of_two, score_widths
from nsa_kernels.triton.shared.tables import QueryTiles, load_query_tile

# Key tiles of one program of the score kernel; more are shared out.
SPAN_TILES = 64
# Rounded to 16 bits: see the top.
SHORT_LOG2E = tl.constexpr(round(_LOG2E * 2**15) / 2**15)
LOG2E = tl.constexpr(_LOG2E)


class Constants(NamedTuple):
    """What the kernel is compiled for.

    G KV heads with R query heads each, padded to PR. OFFSET, STRIDE: key i ends at position
    i*STRIDE + OFFSET. PER_BLOCK keys begin in a selection block; a key has OVERLAP strides. PARTS:
    of a score. SPAN: keys of a program. A tile has BT tokens and BN keys; ADJACENT tokens are
    neighbours among its columns. Its rows are SLABS of BN / SLABS; HALVES: in how many parts of a
    slab the keys of a block stand. D and D_REST channels make the DK of a key.
    """

    G: int
    R: int
    PR: int
    OFFSET: int
    STRIDE: int
    PER_BLOCK: int
    OVERLAP: int
    PARTS: int
    SPAN: int
    BT: int
    ADJACENT: int
    BN: int
    SLABS: int
    HALVES: int
    DK: int
    D: int
    D_REST: int
    PRECISION: str


class TileQueries(NamedTuple):
    """The columns of a tile, in a kernel: q [BM, D] and [BM, D_REST], lse and positions [BM].

    lse in 16 bits: times log2(e), as scale is.
    """

    b_q: Any
    b_q_rest: Any
    b_lse: Any
    b_t: Any


class TileKeys(NamedTuple):
    """The keys that the last query of a tile sees: pointer to row 0, stride, row of key 0, end."""

    p: Any
    stride_row: Any
    base: Any
    limit: Any


class TileScores(NamedTuple):
    """Where a tile's scores go: pointer, offsets and mask [ADJACENT, 1, BT / ADJACENT], pitch."""

    p: Any
    o_scores: Any
    m_store: Any
    pitch: Any


@triton.jit
def _load(p_row, m_row, BEGIN: tl.constexpr, END: tl.constexpr, PADDED: tl.constexpr):
    """Channels [BEGIN, END) of rows that start at p_row [X] in a tile [X, PADDED]."""
    o_d = BEGIN + tl.arange(0, PADDED)
    mask = m_row[:, None]
    if BEGIN + PADDED != END:
        mask = mask & (o_d < END)[None, :]
    return tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _key_order(C: tl.constexpr):
    """Which key [BN] of a tile stands in each of its rows: see the top."""
    TOGETHER: tl.constexpr = C.PER_BLOCK // C.HALVES  # Keys of a block in neighbouring rows.
    HALF: tl.constexpr = C.BN // C.SLABS // C.HALVES  # Rows of a part of a slab.
    o_row = tl.arange(0, C.BN)
    i_block = o_row // (HALF * C.HALVES) * (HALF // TOGETHER) + o_row % HALF // TOGETHER
    return i_block * C.PER_BLOCK + o_row // HALF % C.HALVES * TOGETHER + o_row % TOGETHER


@triton.jit
def _sum_keys(b_h, b_weight, C: tl.constexpr):
    """Weighted sums over the keys of each block: [BN, X, Y] -> [BN / PER_BLOCK, X, Y].

    b_weight: of each key of a block, [HALVES, PER_BLOCK / HALVES].
    """
    TOGETHER: tl.constexpr = C.PER_BLOCK // C.HALVES
    BLOCKS: tl.constexpr = C.BN // C.PER_BLOCK
    X: tl.constexpr = b_h.shape[1]
    Y: tl.constexpr = b_h.shape[2]
    if C.HALVES == 1:
        b_h = tl.reshape(b_h, [BLOCKS, TOGETHER, X, Y])
        return tl.sum(b_h * tl.reshape(b_weight, [1, TOGETHER, 1, 1]), 1)
    else:
        b_h = tl.reshape(b_h, [C.SLABS, C.HALVES, BLOCKS // C.SLABS, TOGETHER, X, Y])
        b_h = tl.sum(b_h * b_weight[None, :, None, :, None, None], 1)
        return tl.reshape(tl.sum(b_h, 2), [BLOCKS, X, Y])


@triton.jit
def _score_tiles(out, queries, keys, begin, end, scale, MASKED: tl.constexpr, C: tl.constexpr):
    """The sums of each key tile in [begin, end)."""
    BN: tl.constexpr = C.BN
    PER_BLOCK: tl.constexpr = C.PER_BLOCK
    ADJACENT: tl.constexpr = C.ADJACENT
    RUNS: tl.constexpr = C.BT // ADJACENT
    PR: tl.constexpr = C.PR
    TOGETHER: tl.constexpr = PER_BLOCK // C.HALVES
    # [HALVES, TOGETHER]
    o_in = tl.arange(0, C.HALVES)[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    # How many of the l/d strides of a key fall into the block it begins in, and into the next.
    b_own = tl.minimum(PER_BLOCK - o_in, C.OVERLAP).to(tl.float32)
    b_next = tl.maximum(C.OVERLAP - PER_BLOCK + o_in, 0).to(tl.float32)
    for start in tl.range(begin, end, BN):
        o_j = start + (_key_order(C) if C.HALVES > 1 else tl.arange(0, BN))
        p_k = keys.p + (keys.base + o_j.to(tl.int64)) * keys.stride_row
        m_j = o_j < keys.limit if MASKED else tl.full([BN], True, tl.int1)
        b_k = _load(p_k, m_j, 0, min(C.DK, C.D), C.D)  # [BN, D]
        b_s = tl.dot(b_k, tl.trans(queries.b_q), input_precision=C.PRECISION)  # [BN, BM]
        if C.D_REST > 0:
            b_k = _load(p_k, m_j, C.D, C.DK, C.D_REST)  # [BN, D_REST]
            b_s = tl.dot(b_k, tl.trans(queries.b_q_rest), b_s, input_precision=C.PRECISION)
        b_p = tl.fma(b_s, scale, -queries.b_lse[None, :])
        if C.PRECISION == "ieee":
            b_p = b_p * LOG2E
        b_p = tl.exp2(b_p)
        if MASKED:
            b_p = tl.where(o_j[:, None] * C.STRIDE + C.OFFSET <= queries.b_t[None, :], b_p, 0.0)
        b_h = tl.sum(tl.reshape(b_p, [BN, RUNS, PR, ADJACENT]), 2)
        # This order of dimensions is that of the threads, which spares an exchange between warps.
        b_sum = tl.permute(_sum_keys(b_h, b_own, C), (2, 0, 1))  # [ADJACENT, BN / PER_BLOCK, RUNS]
        o_b = (start // PER_BLOCK + tl.arange(0, BN // PER_BLOCK))[None, :, None]
        p_out = out.p + (out.o_scores + o_b * (1 if C.OVERLAP == 1 else 2))
        if C.OVERLAP == 1:
            tl.store(p_out, b_sum, mask=out.m_store)
        else:
            b_passed = tl.permute(_sum_keys(b_h, b_next, C), (2, 0, 1))
            tl.store(p_out, b_sum, mask=out.m_store)
            tl.store(p_out + 3, b_passed, mask=out.m_store & (o_b + 1 < out.pitch))


@triton.jit(do_not_specialize=["end_tile", "begin_row", "end_row"])
def _score_kernel(
    q, k, lse, scores, tiles, end_tile, begin_row, end_row, pitch, scale, C: tl.constexpr
):
    """scores [end_row - begin_row, G, pitch, PARTS] of a query tile's rows and a span of keys."""
    # Late tokens see most: starting with them leaves the short programs for the end.
    i_tile = end_tile - 1 - tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    first_row, num_tokens, position, base = load_query_tile(tiles, i_tile)

    last = position + num_tokens - 1
    limit = tl.maximum(last - C.OFFSET + C.STRIDE, 0) // C.STRIDE  # Keys that the last query sees.
    shared = tl.maximum(position - C.OFFSET + C.STRIDE, 0) // C.STRIDE // C.BN * C.BN
    begin = tl.program_id(2) * C.SPAN
    # A tile that the chunk's end cuts may hold later tokens, which see blocks past the pitch.
    end = tl.minimum(tl.minimum(begin + C.SPAN, limit), pitch * C.PER_BLOCK)
    if begin >= end:
        return
    shared = tl.minimum(tl.maximum(shared, begin), end)  # Before: all tiles seen by all.

    # Columns are (token // ADJACENT, head, token % ADJACENT), see above.
    ADJACENT: tl.constexpr = C.ADJACENT
    o_m = tl.arange(0, C.PR * C.BT)
    token = o_m // (C.PR * ADJACENT) * ADJACENT + o_m % ADJACENT
    head = o_m // ADJACENT % C.PR
    m_m = (token < num_tokens) & (head < C.R)
    row = first_row + token
    p_q = q.p + row * q.stride_row + (i_g * C.R + head) * q.stride_head
    b_q = _load(p_q, m_m, 0, min(C.DK, C.D), C.D)  # [BM, D]
    b_q_rest = b_q
    if C.D_REST > 0:
        b_q_rest = _load(p_q, m_m, C.D, C.DK, C.D_REST)  # [BM, D_REST]
    # Infinity makes the probabilities of columns that are no head's zero.
    b_lse = tl.load(lse + row * (C.G * C.R) + i_g * C.R + head, mask=m_m, other=float("inf"))
    if C.PRECISION != "ieee":
        b_lse = b_lse * SHORT_LOG2E
    queries = TileQueries(b_q, b_q_rest, b_lse, position + token)
    keys = TileKeys(k.p + i_g * k.stride_head, k.stride_row, base, limit)
    o_t = tl.arange(0, C.BT // ADJACENT)[None, None, :] * ADJACENT
    o_t = o_t + tl.arange(0, ADJACENT)[:, None, None]
    row_t = first_row + o_t
    m_store = (o_t < num_tokens) & (row_t >= begin_row) & (row_t < end_row)
    # In 32 bits, as the workspace is small.
    o_scores = ((row_t - begin_row).to(tl.int32) * C.G + i_g.to(tl.int32)) * C.PARTS * pitch
    out = TileScores(scores, o_scores, m_store, pitch)
    _score_tiles(out, queries, keys, begin, shared, scale, False, C)
    _score_tiles(out, queries, keys, shared, end, scale, True, C)


def pitch(blocks: int) -> int:
    """Scores of a row: whole tiles of any shape."""
    return cdiv(blocks, 64) * 64


def score_parts(block: int, stride: int) -> int:
    """Parts of a score: what begins in the block and, where blocks overlap, what is passed on."""
    return 1 if block == stride else 2


def score_blocks(
    q_NHD: Tensor,
    k_CGD: Tensor,
    lse_NH: Tensor,
    scores: Tensor,
    tiles: QueryTiles,
    chunk: Chunk,
    tile: ScoreTile,
    *,
    block: int,
    stride: int,
    select_block: int,
    scale: float,
) -> None:
    """Write the chunk's scores [rows, G, pitch, parts] to the workspace `scores`."""
    groups, width = k_CGD.shape[1:]
    ratio = q_NHD.shape[1] // groups
    head_columns = power_of_two(ratio)
    tokens = tile.columns // head_columns
    # 128 columns of a warp: their heads are summed in one thread, or in few.
    adjacent = min(tokens, 8, 128 // head_columns)
    per_block, span = select_block // stride, SPAN_TILES * tile.keys
    num_blocks = chunk.last // select_block + 1
    slabs = tile.keys // 16 if tile.halves > 1 else 1
    if q_NHD.dtype != torch.float32:
        scale *= SHORT_LOG2E.value
    C = Constants(
        groups, ratio, head_columns, block - 1, stride, per_block, block // stride,
        score_parts(block, stride), span, tokens, adjacent, tile.keys, slabs, tile.halves, width,
        *score_widths(width), precision(q_NHD),
    )  # fmt: skip
    spans = cdiv(num_blocks * per_block, span)
    launcher(_score_kernel, (chunk.end_tile - chunk.first_tile, groups, spans))(
        head_rows(q_NHD), head_rows(k_CGD), lse_NH, scores, tiles.table, chunk.end_tile,
        chunk.begin, chunk.end, pitch(num_blocks), scale, C=C, num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=tile.registers, enable_fp_fusion=False,
    )  # fmt: skip

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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.highest import highest
from nsa_kernels.triton.library import operator
from nsa_kernels.triton.tiles import (
    MOST_REGISTERS,
    Chunk,
    chunks,
    compute_capability,
    padded,
    positions,
    precision,
    query_tiles,
    segments_of,
)

# Most bytes of the scores and candidates that are kept between kernels. Bits do not depend on it.
WORKSPACE_BYTES = 256 << 20
# Key tiles of one program of the score kernel; more are shared out.
SPAN_TILES = 64
# Most scores that one program of the choose kernel ranks; more are ranked in parts, whose best are
# ranked again. At least twice the places to fill.
MOST_COLUMNS = 4096
# Scores that a warp ranks at once: several short lines.
LINE_ELEMENTS = 1024


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


@triton.jit(do_not_specialize=["begin_row", "num_lines", "num_found"])
def _choose_kernel(
    scores,
    found,
    out,
    positions,
    begin_row,
    num_lines,
    num_found,
    pitch,
    G: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    PN: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    WORDS: tl.constexpr,
    NEAR: tl.constexpr,
):
    """The best blocks of L lines among W blocks each, or among W of those found before.

    A line is a query and KV head, and has scores [lines, pitch, PARTS]. FIRST: among all blocks;
    else among found int32 [lines, num_found], ascending, with -1 for none. LAST: writes out
    [N, G, n], with the forced blocks; else out is what another launch finds there, n for each
    program.
    """
    i_part = tl.program_id(1)
    o_w = i_part * W + tl.arange(0, W)
    o_n = tl.arange(0, PN)
    line = tl.program_id(0) * L + tl.arange(0, L)
    m_l = line < num_lines
    t = tl.load(positions + begin_row + line // G, mask=m_l, other=0).to(tl.int32)
    num_blocks = t // SELECT_BLOCK + 1
    # Eligible blocks: forced [0, first), free [first, end), forced [end, num_blocks).
    first = tl.minimum(num_blocks, INIT)
    end = tl.maximum(num_blocks - LOCAL, first)
    want = tl.maximum(NUM_SELECTED - first - (num_blocks - end), 0)
    o_line = line.to(tl.int64)

    # The bound of the wide load is coarse, which lets it be wide.
    bound = (tl.cdiv(num_blocks, 64) * 64)[:, None]
    p_s = scores + (o_line * PARTS * pitch)[:, None]
    b_own = tl.zeros([L, W], tl.float32)
    b_passed = tl.zeros([L, W], tl.float32)
    if FIRST:
        b_block = tl.broadcast_to(o_w[None, :], [L, W])
        if PARTS == 1:
            b_own = tl.load(p_s + o_w, mask=m_l[:, None] & (o_w < bound), other=0.0)
        else:
            o_p = i_part * W * 2 + tl.arange(0, W * 2)
            b_both = tl.load(p_s + o_p, mask=m_l[:, None] & (o_p < bound * 2), other=0.0)
            b_own, b_passed = tl.split(tl.reshape(b_both, [L, W, 2]))
    else:
        p_found = found + (o_line * num_found)[:, None]
        b_block = tl.load(p_found + o_w, mask=m_l[:, None] & (o_w < num_found), other=-1)
        b_own = tl.load(p_s + b_block * PARTS, mask=b_block >= 0, other=0.0)
        if PARTS == 2:
            b_passed = tl.load(p_s + b_block * 2 + 1, mask=b_block >= 0, other=0.0)
    # Nothing was written where no visible key begins: in front of block 0, and, as l <= l', in the
    # query's own block and after, of which none is free.
    b_score = b_own
    if PARTS == 2:
        b_score += tl.where(b_block > 0, b_passed, 0.0)
    # Bits of floats that are not negative are in the order of the floats; NaN scores 0.
    b_key = tl.where(b_score > 0.0, b_score, 0.0).to(tl.int32, bitcast=True)
    m_free = (b_block >= first[:, None]) & (b_block < end[:, None]) & (want[:, None] > 0)
    b_key = tl.where(m_free, b_key, -1)

    b_column, count = highest(b_key, want, PN, WORDS, NEAR)
    m_n = m_l[:, None] & (o_n < count[:, None])
    if FIRST:
        b_chosen = i_part * W + b_column
    else:
        b_chosen = tl.load(p_found + i_part * W + b_column, mask=m_n, other=-1)
    if LAST:
        # Ascending: the free blocks are those between the forced ones.
        p_out = out + ((begin_row * G + o_line) * NUM_SELECTED)[:, None] + o_n
        tl.store(p_out + first[:, None], b_chosen, mask=m_n)
        m_first = o_n < first[:, None]
        b_local = (end - first - count)[:, None] + o_n
        b_rest = tl.where(m_first, o_n, tl.where(b_local < num_blocks[:, None], b_local, -1))
        m_rest = (m_first | (o_n >= (first + count)[:, None])) & (o_n < NUM_SELECTED)
        tl.store(p_out, b_rest, mask=m_rest & m_l[:, None])
    else:
        p_out = out + (o_line * tl.num_programs(1) * NUM_SELECTED + i_part * NUM_SELECTED)[:, None]
        b_chosen = tl.where(o_n < count[:, None], b_chosen, -1)
        tl.store(p_out + o_n, b_chosen, mask=m_l[:, None] & (o_n < NUM_SELECTED))


class _Shape(NamedTuple):
    """columns: (head, token) pairs of a tile of scores; keys: its rows; registers: of a thread."""

    columns: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def _widths(width: int) -> tuple[int, int]:
    """A power of two and another one or 0, of which tiles of `width` channels are made."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = padded(width - first) if width > first else 0
    return (2 * first, 0) if rest == first else (first, rest)


def _shape(
    dtype: torch.dtype,
    widths: tuple[int, int],
    heads: int,
    per_block: int,
    capability: tuple[int, int],
) -> _Shape:
    if dtype == torch.float32:
        return _Shape(columns=32, keys=64, warps=8, stages=2)
    # A head and a key by themselves are summed with no other: a thread keeps all scores of a tile.
    few = 2 if heads * per_block == 1 and capability[0] == 10 else 1
    registers = MOST_REGISTERS if capability[0] in (8, 10) else None
    if widths[1]:
        # With more warps the compiler would lay out the results of the two products differently.
        stages = 3 if sum(widths) <= 128 else 2
        return _Shape((128 if heads >= 8 else 64) // few, 64, 4, stages, registers)
    # Few heads or short blocks leave many sums of a tile for a thread.
    if heads < 8 or heads * per_block < 16 or capability[0] not in (9, 10):
        return _Shape(columns=128 // few, keys=64, warps=8, stages=2, registers=registers)
    shape = _Shape(columns=256, keys=64, warps=8, stages=2)
    if widths[0] <= 128 and capability == (9, 0):
        # Two programs fill the registers of a multiprocessor, and with three stages its shared
        # memory, when exchanging a tile's scores between threads takes no more than 1 KiB of it.
        scores = shape.columns // heads * (shape.keys // per_block)
        shape = shape._replace(registers=128, stages=3 if 4 * scores <= 1024 else 2)
    return shape


def _pitch(blocks: int) -> int:
    """Scores of a row: whole tiles of any shape."""
    return triton.cdiv(blocks, 64) * 64


def _row_bytes(blocks: int, groups: int, score_parts: int, num_selected: int) -> int:
    """Workspace of a query row: scores and, where they are ranked in parts, what these hand on."""
    parts = triton.cdiv(blocks, MOST_COLUMNS)
    # 4 bytes for each block found; what later launches find of these is less than as much again.
    found = 8 * parts * num_selected if parts > 1 else 0
    return groups * (4 * score_parts * _pitch(blocks) + found)


def _chunk_rows(blocks: int, groups: int, score_parts: int, num_selected: int) -> int:
    size = WORKSPACE_BYTES // _row_bytes(blocks, groups, score_parts, num_selected)
    # Whole tiles where that is possible: one that is cut by a chunk's end is computed twice.
    return max(1, size // 64 * 64 if size > 64 else size)


@operator(
    "select_blocks(Tensor q, Tensor k, Tensor lse, Tensor segments, int block, int stride, "
    "int select_block, int num_selected, int num_init_blocks, int num_local_blocks, float scale)"
    " -> Tensor"
)
def _select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: Tensor,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Tensor:
    groups, at = k.shape[1], segments_of(segments, q.device)
    selected = torch.empty((q.shape[0], groups, num_selected), dtype=torch.int32, device=q.device)
    if not selected.numel():
        return selected
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lse = lse.contiguous()
    score_parts = 1 if block == stride else 2
    per_block = select_block // stride
    head_columns = triton.next_power_of_2(q.shape[1] // groups)
    widths = _widths(q.shape[-1])
    shape = _shape(q.dtype, widths, head_columns, per_block, compute_capability(q))
    tokens = shape.columns // head_columns
    # 128 columns of a warp: their heads are summed in one thread, or in few.
    near = min(tokens, 8, 128 // head_columns)
    tiles = query_tiles(at, tokens, "compressed_base")
    blocks = tiles.last // select_block + 1
    size = min(_chunk_rows(blocks, groups, score_parts, num_selected), q.shape[0])
    workspace = torch.empty(
        size * groups * score_parts * _pitch(blocks), dtype=torch.float32, device=q.device
    )
    for chunk in chunks(at, size, tokens, "compressed_base"):
        blocks = chunk.last // select_block + 1
        spans = triton.cdiv(blocks * per_block, SPAN_TILES * shape.keys)
        _score_kernel[(chunk.end_tile - chunk.first_tile, groups, spans)](
            q, k, lse, workspace, tiles.table, chunk.end_tile, chunk.begin, chunk.end,
            _pitch(blocks), *q.stride()[:2], *k.stride()[:2], scale, G=groups,
            R=q.shape[1] // groups, PR=head_columns, OFFSET=block - 1, STRIDE=stride,
            PER_BLOCK=per_block, OVERLAP=block // stride, PARTS=score_parts,
            SPAN=SPAN_TILES * shape.keys, BT=tokens, NEAR=near, BN=shape.keys, DK=q.shape[-1],
            D=widths[0], D_REST=widths[1], PRECISION=precision(q), num_warps=shape.warps,
            num_stages=shape.stages, maxnreg=shape.registers, enable_fp_fusion=False,
        )  # fmt: skip
        _choose(workspace, selected, positions(at), chunk, score_parts, select_block,
                num_init_blocks, num_local_blocks)  # fmt: skip
    return selected


@_select_blocks.register_fake
def _(q: Tensor, k: Tensor, *arguments: Any) -> Tensor:
    num_selected = arguments[5]
    return q.new_empty(q.shape[0], k.shape[1], num_selected, dtype=torch.int32)


def _choose(
    scores: Tensor,
    selected: Tensor,
    positions: Tensor,
    chunk: Chunk,
    score_parts: int,
    select_block: int,
    num_init_blocks: int,
    num_local_blocks: int,
) -> None:
    """Ranks the scores of a chunk, and what their parts hand on until there is one part."""
    _, groups, num_selected = selected.shape
    rows = chunk.end - chunk.begin
    blocks = chunk.last // select_block + 1
    found, count = selected, blocks
    while True:
        first = found is selected
        parts = triton.cdiv(count, MOST_COLUMNS)
        # Powers of 4: few kernels to compile.
        width = min(1 << max(6, -(-(count - 1).bit_length() // 2) * 2), MOST_COLUMNS)
        out = selected
        if parts > 1:
            out = selected.new_empty(rows * groups * parts * num_selected)
        lines = max(1, LINE_ELEMENTS // width)
        near = 4 // score_parts  # Blocks in the 16 bytes that a thread loads at once.
        _choose_kernel[(triton.cdiv(rows * groups, lines), parts)](
            scores, found, out, positions, chunk.begin, rows * groups, count, _pitch(blocks),
            G=groups, SELECT_BLOCK=select_block, PARTS=score_parts, INIT=num_init_blocks,
            LOCAL=num_local_blocks, NUM_SELECTED=num_selected,
            PN=triton.next_power_of_2(num_selected), FIRST=first, LAST=parts == 1, L=lines, W=width,
            WORDS=min(max(32, width // 32), width // near), NEAR=near,
            num_warps=max(1, width // LINE_ELEMENTS),
            maxnreg=None if first and compute_capability(scores)[0] != 10 else MOST_REGISTERS,
        )  # fmt: skip
        if parts == 1:
            return
        found, count = out, parts * num_selected


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Tensor:
    """See `Backend.select_blocks`.

    Its workspace is rows x G x (4 p ceil64(B) + 8 ceil(B / 4096) n) bytes, the second term only
    where B > 4096. B are the blocks up to the last query's, p is 1 where l = d and else 2, and rows
    are as many as make at most WORKSPACE_BYTES, and at least one.
    """
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    options = (block, stride, select_block, num_selected, num_init_blocks, num_local_blocks)
    return _select_blocks(q, k, lse, segments.host, *options, scale)

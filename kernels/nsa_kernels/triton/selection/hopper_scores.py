"""Scores of selection blocks on Hopper GPUs: what scores.py says, by TMA and wgmma.

The maths, the order of sums, the bits and the workspace are those of scores.py. What differs is who
does what:

- A program stays on its multiprocessor. One producer warp loads queries and tiles of 64 keys into
  shared memory. Each of three consumers, a warpgroup with 8 tokens' 16 heads as its 128 columns,
  multiplies the same keys and takes exponentials of its own scores. Nothing ties consumers to each
  other but the ring of keys, so products of one stand beside exponentials of another.
- All programs get the same work, whatever the lengths of documents: see pieces.py.

Columns are (head, token), as TMA brings them from the view [heads, tokens, channels]; so a thread
has all heads of its tokens, and rows i and i + 8 of a warp's 16, which are keys. The keys of a
block stand in neighbouring rows of one warp. Compression blocks overlap by half here, so what a
block passes on is its last key's, which needs no sum; it and the sum of the block leave by one
store, from the threads of the block's last and first key.

TMA takes no mask. What it brings of other documents' queries is computed with and never stored;
their keys are masked as late ones are.

Letters are those of scores.py. Channels are in parts of 64, PARTS in all.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selection.chunks import Chunk
from nsa_kernels.triton.selection.pieces import KEYS, Share, pieces
from nsa_kernels.triton.selection.scores import SHORT_LOG2E, pitch
from nsa_kernels.triton.shared.hopper import (
    Ring,
    advance,
    head_tiles,
    new_barriers,
    persistent_programs,
    row_tiles,
)
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import HopperTile
from nsa_kernels.triton.shared.tables import QueryTiles

ROWS = gl.constexpr(KEYS)
# Channels of a part of a product, a row of shared memory.
PART = 64
WIDTH = gl.constexpr(PART)


class Constants(NamedTuple):
    """What the kernel is compiled for.

    G KV heads with R query heads each. OFFSET, STRIDE: key i ends at position i*STRIDE + OFFSET.
    PER_BLOCK keys begin in a selection block, each two strides long. TOKENS of a consumer, PARTS of
    the channels.
    """

    G: int
    R: int
    OFFSET: int
    STRIDE: int
    PER_BLOCK: int
    TOKENS: int
    PARTS: int


@gluon.jit
def _load_piece(table, i):
    """First row, rows, position, row of key 0, KV head and key tiles [begin, end) of a piece."""
    p = table + i * 8
    return (
        gl.load(p),
        gl.load(p + 1),
        gl.load(p + 2),
        gl.load(p + 3),
        gl.load(p + 4),
        gl.load(p + 5),
        gl.load(p + 6),
    )


@gluon.jit
def _pieces_of_program(starts):
    p = starts + gl.program_id(0)
    return gl.load(p), gl.load(p + 1)


@gluon.jit
def _num_seen(t, C: gl.constexpr):
    """Keys that a query at position t sees."""
    return gl.maximum(t - C.OFFSET + C.STRIDE, 0) // C.STRIDE


@gluon.jit
def _produce(
    q_desc, k_desc, q, k, table, starts, k_head, NC: gl.constexpr, STAGES: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """Load the queries and keys of a program's pieces in the order in which consumers take them.

    k_head: columns between two heads of k.
    """
    PARTS: gl.constexpr = C.PARTS
    stage = gl.to_tensor(0)
    parity = gl.to_tensor(1)
    q_parity = gl.to_tensor(1)
    first, last = _pieces_of_program(starts)
    for i in range(first, last):
        first_row, _, _, base, g, begin, end = _load_piece(table, i)
        for w in gl.static_range(NC):
            q_full = q.full.index(w)
            mbarrier.wait(q.empty.index(w), q_parity)
            mbarrier.expect(q_full, C.R * C.TOKENS * C.PARTS * WIDTH * 2)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    q_desc, [g * C.R, first_row + w * C.TOKENS, part * WIDTH], q_full,
                    q.tiles.index(w * PARTS + part),
                )  # fmt: skip
        q_parity ^= 1
        for j in range(begin, end):
            full = k.full.index(stage)
            mbarrier.wait(k.empty.index(stage), parity)
            mbarrier.expect(full, ROWS * C.PARTS * WIDTH * 2)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    k_desc, [base + j * ROWS, g * k_head + part * WIDTH], full,
                    k.tiles.index(stage * PARTS + part),
                )  # fmt: skip
            stage, parity = advance(stage, parity, STAGES)


@gluon.jit
def _multiply(w: gl.constexpr, q, k, stage, S_L: gl.constexpr, C: gl.constexpr):
    """Issue S [64, columns] = k q^T of a stage, part by part of the channels."""
    COLUMNS: gl.constexpr = C.R * C.TOKENS
    PARTS: gl.constexpr = C.PARTS
    b_s = gl.full([ROWS, COLUMNS], 0.0, gl.float32, S_L)
    for part in gl.static_range(PARTS):
        q_part = q.tiles.index(w * PARTS + part).reshape((COLUMNS, WIDTH)).permute((1, 0))
        k_part = k.tiles.index(stage * PARTS + part)
        b_s = warpgroup_mma(k_part, q_part, b_s, use_acc=part > 0, is_async=True)
    return b_s


@gluon.jit
def _sum_heads(b_p, C: gl.constexpr):
    """[64, columns] -> [blocks, keys of a block, TOKENS]."""
    b_h = gl.sum(gl.reshape(b_p, [ROWS, C.R, C.TOKENS]), 1)
    return gl.reshape(b_h, [ROWS // C.PER_BLOCK, C.PER_BLOCK, C.TOKENS])


@gluon.jit
def _store_scores(b_h, j, p_out, m_out, pitch, C: gl.constexpr):
    """The sums of the blocks of tile j from those over heads, [blocks, keys of a block, TOKENS].

    p_out, m_out: where scores of each token begin and whether they are kept, [1, 1, TOKENS].
    """
    B_L: gl.constexpr = b_h.type.layout
    BLOCKS: gl.constexpr = ROWS // C.PER_BLOCK
    o_in = gl.arange(0, C.PER_BLOCK, layout=gl.SliceLayout(0, gl.SliceLayout(2, B_L)))
    o_in = gl.expand_dims(gl.expand_dims(o_in, 0), 2)  # [1, keys of a block, 1]
    o_b = j * BLOCKS + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, gl.SliceLayout(2, B_L)))
    o_b = gl.expand_dims(gl.expand_dims(o_b, 1), 2)  # [blocks, 1, 1]
    # The last key has one of its two strides in the next block, the others both in their own.
    last = o_in == C.PER_BLOCK - 1
    b_own = gl.expand_dims(gl.sum(b_h * gl.where(last, 1.0, 2.0), 1), 1)
    o_part = o_b * 2 + gl.where(last, 3, 0)
    m_part = (last & (o_b + 1 < pitch)) | (o_in == 0)
    gl.store(p_out + o_part, gl.where(last, b_h, b_own), mask=m_part & m_out)


@gluon.jit
def _score_tiles(
    w: gl.constexpr, low, high, q, k, b_lse, b_until, p_out, m_out, pitch, scale, stage, parity,
    MASKED: gl.constexpr, STAGES: gl.constexpr, S_L: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Scores of the key tiles [low, high) for a consumer's columns.

    b_lse: -log2(e) lse; b_until: how many keys each column's token sees; both [columns].
    """
    for j in range(low, high):
        mbarrier.wait(k.full.index(stage), parity)
        b_s = _multiply(w, q, k, stage, S_L, C)  # [64, columns]
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(k.empty.index(stage), count=1)
        b_p = gl.exp2(gl.fma(b_s, scale, gl.expand_dims(b_lse, 0)))
        if MASKED:
            o_j = j * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_L))
            b_p = gl.where(gl.expand_dims(o_j, 1) < gl.expand_dims(b_until, 0), b_p, 0.0)
        _store_scores(_sum_heads(b_p, C), j, p_out, m_out, pitch, C)
        stage, parity = advance(stage, parity, STAGES)
    return stage, parity


@gluon.jit
def _consume(
    w: gl.constexpr, lse, scores, q, k, table, starts, begin_row, end_row, pitch, scale,
    STAGES: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The scores of tokens [w TOKENS, (w + 1) TOKENS) of each piece."""
    COLUMNS: gl.constexpr = C.R * C.TOKENS
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    # That of sums over heads, which nothing but their own type tells.
    b_none = _sum_heads(gl.full([ROWS, COLUMNS], 0.0, gl.float32, S_L), C)
    B_L: gl.constexpr = b_none.type.layout
    stage = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    q_parity = gl.to_tensor(0)
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, S_L))
    token_c = w * C.TOKENS + o_c % C.TOKENS
    token = w * C.TOKENS + gl.arange(0, C.TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(0, B_L)))
    token = gl.expand_dims(gl.expand_dims(token, 0), 0)  # [1, 1, TOKENS]
    first, last = _pieces_of_program(starts)
    for i in range(first, last):
        first_row, num_tokens, position, _base, g, begin, end = _load_piece(table, i)
        # Before: tiles that all tokens see all of.
        shared = gl.minimum(gl.maximum(_num_seen(position, C) // ROWS, begin), end)
        head = (first_row + token_c).to(gl.int64) * (C.G * C.R) + g * C.R + o_c // C.TOKENS
        b_lse = gl.load(lse + head, mask=token_c < num_tokens, other=float("inf"))
        b_lse = -(b_lse * SHORT_LOG2E)  # [columns]
        b_until = _num_seen(position + token_c, C)
        row = first_row + token
        m_out = (token < num_tokens) & (row >= begin_row) & (row < end_row)
        # In 32 bits, as the workspace is small.
        p_out = scores + ((row - begin_row) * C.G + g) * 2 * pitch
        mbarrier.wait(q.full.index(w), q_parity)
        stage, parity = _score_tiles(
            w, begin, shared, q, k, b_lse, b_until, p_out, m_out, pitch, scale, stage, parity,
            False, STAGES, S_L, C,
        )  # fmt: skip
        stage, parity = _score_tiles(
            w, shared, end, q, k, b_lse, b_until, p_out, m_out, pitch, scale, stage, parity,
            True, STAGES, S_L, C,
        )  # fmt: skip
        mbarrier.arrive(q.empty.index(w), count=1)
        q_parity ^= 1


@gluon.jit(do_not_specialize=["begin_row", "end_row"])
def _hopper_score_kernel(
    q_desc, k_desc, lse, scores, table, starts, begin_row, end_row, pitch, k_head, scale,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, NC: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """scores [end_row - begin_row, G, pitch, 2] of the pieces' query and key tiles."""
    DTYPE: gl.constexpr = q_desc.dtype
    gl.static_assert(NC == 3)
    q_s = gl.allocate_shared_memory(DTYPE, [NC * C.PARTS, C.R, C.TOKENS, WIDTH], q_desc.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES * C.PARTS, ROWS, WIDTH], k_desc.layout)
    q = Ring(q_s, new_barriers(NC, 1), new_barriers(NC, 1))
    k = Ring(k_s, new_barriers(STAGES, 1), new_barriers(STAGES, NC))
    # Arguments are written out: constants of a tuple that has a name would become tensors.
    gl.warp_specialize([
        (_consume, (0, lse, scores, q, k, table, starts, begin_row, end_row, pitch, scale,
                    STAGES, C)),
        (_consume, (1, lse, scores, q, k, table, starts, begin_row, end_row, pitch, scale,
                    STAGES, C)),
        (_consume, (2, lse, scores, q, k, table, starts, begin_row, end_row, pitch, scale,
                    STAGES, C)),
        (_produce, (q_desc, k_desc, q, k, table, starts, k_head, NC, STAGES, C)),
    ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


def hopper_score_blocks(
    q_NHD: Tensor,
    k_CGD: Tensor,
    lse_NH: Tensor,
    scores: Tensor,
    segments: QuerySegments,
    tiles: QueryTiles,
    chunk: Chunk,
    tile: HopperTile,
    *,
    block: int,
    stride: int,
    select_block: int,
    scale: float,
) -> None:
    """As `score_blocks`, for tiles of `tile.rows` columns; k_CGD has at least one row."""
    groups, width = k_CGD.shape[1:]
    ratio = q_NHD.shape[1] // groups
    consumers = 3  # As many as the kernel writes out.
    C = Constants(
        groups, ratio, block - 1, stride, select_block // stride,
        tile.rows // (consumers * ratio), width // PART,
    )  # fmt: skip
    num_scores = pitch(chunk.last // select_block + 1)
    most = (chunk.end_tile - chunk.first_tile) * groups * (num_scores * C.PER_BLOCK // KEYS)
    programs = persistent_programs(q_NHD, most)
    share = Share(C.OFFSET, stride, num_scores * C.PER_BLOCK, groups, programs)
    table, starts = pieces(segments, tiles, chunk, share)
    launcher(_hopper_score_kernel, (programs,))(
        head_tiles(q_NHD.transpose(0, 1), ratio, C.TOKENS, PART),
        row_tiles(k_CGD, KEYS, PART),
        lse_NH,
        scores,
        table,
        starts,
        chunk.begin,
        chunk.end,
        num_scores,
        k_CGD.stride(1),
        scale * SHORT_LOG2E.value,
        STAGES=tile.stages,
        REGISTERS=tile.consumer_registers,
        NC=consumers,
        C=C,
        num_warps=4,
        maxnreg=tile.registers,
        enable_fp_fusion=False,
    )

"""The highest scores of each query, by bisection over their bits: see scores.py.

Letters: N local rows, G KV heads, n chosen blocks; of a program L lines, W blocks of a line, PN
places (n padded).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.selection.chunks import Chunk
from nsa_kernels.triton.selection.scores import pitch
from nsa_kernels.triton.selection.top_keys import top_keys
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import cdiv, choose_registers, power_of_two

# Most scores that one program ranks; more are ranked in parts, whose best are ranked again. At
# least twice the blocks that are chosen.
MOST_COLUMNS = 4096
# Scores that a warp ranks at once: several short lines.
LINE_ELEMENTS = 1024


class Constants(NamedTuple):
    """What the kernel is compiled for.

    G KV heads; SELECT_BLOCK tokens of a block; PARTS of a score; INIT and LOCAL forced blocks;
    NUM_SELECTED chosen ones, padded to PN. FIRST, LAST, L, W: see the kernel. WORDS, RUN: see
    `top_keys`.
    """

    G: int
    SELECT_BLOCK: int
    PARTS: int
    INIT: int
    LOCAL: int
    NUM_SELECTED: int
    PN: int
    FIRST: bool
    LAST: bool
    L: int
    W: int
    WORDS: int
    RUN: int


@triton.jit(do_not_specialize=["begin_row", "num_lines", "num_found"])
def _choose_kernel(
    scores, found, out, positions, begin_row, num_lines, num_found, pitch, C: tl.constexpr
):
    """The best blocks of L lines among W blocks each, or among W of those found before.

    A line is a query and KV head, and has scores [lines, pitch, PARTS]. FIRST: among all blocks;
    else among found int32 [lines, num_found], ascending, with -1 where there is none. LAST: writes
    out [N, G, n], with the forced blocks; else out is what another launch finds there, n for each
    program.
    """
    L: tl.constexpr = C.L
    W: tl.constexpr = C.W
    i_part = tl.program_id(1)
    o_w = i_part * W + tl.arange(0, W)
    o_n = tl.arange(0, C.PN)
    line = tl.program_id(0) * L + tl.arange(0, L)
    m_l = line < num_lines
    t = tl.load(positions + begin_row + line // C.G, mask=m_l, other=0).to(tl.int32)  # [L]
    num_blocks = t // C.SELECT_BLOCK + 1
    # Eligible blocks: forced [0, first), free [first, end), forced [end, num_blocks).
    first = tl.minimum(num_blocks, C.INIT)
    end = tl.maximum(num_blocks - C.LOCAL, first)
    want = tl.maximum(C.NUM_SELECTED - first - (num_blocks - end), 0)
    o_line = line.to(tl.int64)

    # The bound of the wide load is coarse, which lets it be wide.
    bound = (tl.cdiv(num_blocks, 64) * 64)[:, None]
    p_s = scores + (o_line * C.PARTS * pitch)[:, None]
    b_own = tl.zeros([L, W], tl.float32)
    b_passed = tl.zeros([L, W], tl.float32)
    if C.FIRST:
        b_block = tl.broadcast_to(o_w[None, :], [L, W])
        if C.PARTS == 1:
            b_own = tl.load(p_s + o_w, mask=m_l[:, None] & (o_w < bound), other=0.0)
        else:
            o_p = i_part * W * 2 + tl.arange(0, W * 2)
            # [L, 2 W], then twice [L, W]
            b_both = tl.load(p_s + o_p, mask=m_l[:, None] & (o_p < bound * 2), other=0.0)
            b_own, b_passed = tl.split(tl.reshape(b_both, [L, W, 2]))
    else:
        p_found = found + (o_line * num_found)[:, None]
        # All [L, W].
        b_block = tl.load(p_found + o_w, mask=m_l[:, None] & (o_w < num_found), other=-1)
        b_own = tl.load(p_s + b_block * C.PARTS, mask=b_block >= 0, other=0.0)
        if C.PARTS == 2:
            b_passed = tl.load(p_s + b_block * 2 + 1, mask=b_block >= 0, other=0.0)
    # Nothing was written where no visible key begins: in front of block 0, and, as l <= l', in the
    # query's own block and after, of which none is free.
    b_score = b_own  # [L, W]
    if C.PARTS == 2:
        b_score += tl.where(b_block > 0, b_passed, 0.0)
    # Bits of floats that are not negative are in the order of the floats; NaN scores 0.
    b_key = tl.where(b_score > 0.0, b_score, 0.0).to(tl.int32, bitcast=True)
    m_free = (b_block >= first[:, None]) & (b_block < end[:, None]) & (want[:, None] > 0)
    b_key = tl.where(m_free, b_key, -1)

    b_column, count = top_keys(b_key, want, C.PN, C.WORDS, C.RUN)  # [L, PN], [L]
    m_n = m_l[:, None] & (o_n < count[:, None])
    if C.FIRST:
        b_chosen = i_part * W + b_column  # [L, PN]
    else:
        b_chosen = tl.load(p_found + i_part * W + b_column, mask=m_n, other=-1)
    if C.LAST:
        # Ascending: the free blocks are those between the forced ones.
        p_out = out + ((begin_row * C.G + o_line) * C.NUM_SELECTED)[:, None] + o_n
        tl.store(p_out + first[:, None], b_chosen, mask=m_n)
        m_first = o_n < first[:, None]
        b_local = (end - first - count)[:, None] + o_n  # [L, PN]
        b_rest = tl.where(m_first, o_n, tl.where(b_local < num_blocks[:, None], b_local, -1))
        m_rest = (m_first | (o_n >= (first + count)[:, None])) & (o_n < C.NUM_SELECTED)
        tl.store(p_out, b_rest, mask=m_rest & m_l[:, None])
    else:
        o_out = o_line * tl.num_programs(1) * C.NUM_SELECTED + i_part * C.NUM_SELECTED
        b_chosen = tl.where(o_n < count[:, None], b_chosen, -1)
        p_out = out + o_out[:, None] + o_n
        tl.store(p_out, b_chosen, mask=m_l[:, None] & (o_n < C.NUM_SELECTED))


def choose_blocks(
    scores: Tensor,
    selected_NGn: Tensor,
    positions_N: Tensor,
    chunk: Chunk,
    score_parts: int,
    select_block: int,
    num_init_blocks: int,
    num_local_blocks: int,
) -> None:
    """Ranks the scores of a chunk, and what their parts hand on until there is one part."""
    _, groups, num_selected = selected_NGn.shape
    rows = chunk.end - chunk.begin
    blocks = chunk.last // select_block + 1
    found, count = selected_NGn, blocks
    while True:
        first = found is selected_NGn
        parts = cdiv(count, MOST_COLUMNS)
        width = min(max(64, power_of_two(count)), MOST_COLUMNS)
        out = selected_NGn
        if parts > 1:
            out = selected_NGn.new_empty(rows * groups * parts * num_selected)
        lines = max(1, LINE_ELEMENTS // width)
        run = 4 // score_parts  # Blocks in the 16 bytes that a thread loads at once.
        C = Constants(
            groups, select_block, score_parts, num_init_blocks, num_local_blocks, num_selected,
            power_of_two(num_selected), first, parts == 1, lines, width,
            min(max(32, width // 32), width // run), run,
        )  # fmt: skip
        launcher(_choose_kernel, (cdiv(rows * groups, lines), parts))(
            scores, found, out, positions_N, chunk.begin, rows * groups, count, pitch(blocks), C=C,
            num_warps=max(1, width // LINE_ELEMENTS), maxnreg=choose_registers(scores, first),
        )  # fmt: skip
        if parts == 1:
            return
        found, count = out, parts * num_selected

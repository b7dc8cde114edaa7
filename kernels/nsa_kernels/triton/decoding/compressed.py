"""Compressed attention of few queries, split over keys, with the scores of blocks in one pass.

A program takes the R heads of one query and KV head, and SPLIT compressed keys. Beside its part of
the softmax it writes for each head what the keys of each selection block give to the block's score
and, where compression blocks overlap, to the next one's, relative to the maximum so far. When all
parts are there, another kernel makes probabilities of these and adds the heads. Keys are read once.

Letters: N queries, H query heads, G KV heads, B selection blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.decoding.constants import (
    Constants,
    Partial,
    attend_tile,
    load_query,
    num_visible,
    store_part,
)
from nsa_kernels.triton.selection.scores import pitch
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.arithmetic import filled, power, zeros
from nsa_kernels.triton.shared.shapes import Tile

SCORES_AT_ONCE = 64


class HeadScores(NamedTuple):
    """What the keys of a block give to its score and to the next one's, for each head, [N, H, B].

    maxima [N, H, tiles]: what those of each tile of keys are relative to. passed is not used
    where compression blocks do not overlap.
    """

    own: Any
    passed: Any
    maxima: Any


@triton.jit(do_not_specialize=["num_parts", "num_tiles", "pitch"])
def _compressed_kernel(
    q, k, v, partial, scores, rows, pages, num_parts, num_tiles, pitch, logit_scale,
    PAGE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The part of the softmax over keys [i_split * SPLIT, ...), and their scores.

    pages: where each PAGE keys start, if PAGE is not 0; a document's first is then its base.
    """
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    base = tl.load(rows + i_n * 4 + 1)
    seen = num_visible(tl.load(rows + i_n * 4).to(tl.int32), C)
    begin = i_split * C.SPLIT
    if begin < seen:
        b_q, head, m_m = load_query(q, i_n, i_g, C)
        b_acc = zeros(C.BM, C.PDV)
        b_max = filled(C.BM, -float("inf"))
        b_sum = filled(C.BM, 0.0)
        o_head = i_n * (C.G * C.R) + head
        BLOCKS: tl.constexpr = C.BC // C.PER_BLOCK
        column = tl.arange(0, C.PER_BLOCK)
        # Of the OVERLAP strides of a compression block, how many lie in its selection block.
        within = tl.minimum(C.PER_BLOCK - column, C.OVERLAP)
        for first in tl.range(begin, tl.minimum(begin + C.SPLIT, seen), C.BC):
            o_j = first + tl.arange(0, C.BC)
            o_row = base + o_j
            if PAGE > 0:
                page = tl.load(pages + base + o_j // PAGE, mask=o_j < seen, other=0)
                o_row = page + o_j % PAGE
            b_acc, b_max, b_sum, b_p = attend_tile(
                b_acc, b_max, b_sum, b_q, k, v, i_g, o_row, o_j < seen, logit_scale, C
            )
            if scores is not None:
                b_blocks = tl.reshape(b_p, [C.BM, BLOCKS, C.PER_BLOCK])
                o_b = o_head[:, None] * pitch + first // C.PER_BLOCK + tl.arange(0, BLOCKS)[None, :]
                b_own = tl.sum(b_blocks * within.to(tl.float32)[None, None, :], 2)
                tl.store(scores.own + o_b, b_own, mask=m_m[:, None])
                if C.OVERLAP > 1:
                    beyond = (C.OVERLAP - within).to(tl.float32)
                    b_passed = tl.sum(b_blocks * beyond[None, None, :], 2)
                    tl.store(scores.passed + o_b, b_passed, mask=m_m[:, None])
                tl.store(scores.maxima + o_head * num_tiles + first // C.BC, b_max, mask=m_m)
        store_part(partial, i_n, i_split, head, m_m, num_parts, b_acc, b_max, b_sum, C)


@triton.jit
def _probabilities(
    per_head, scores, o_head, m_m, o_b, m_b, b_safe, b_sum, num_tiles, pitch, C: tl.constexpr
):
    """What the keys of blocks o_b give, as probabilities summed over heads, [SCORES]."""
    mask = m_m[:, None] & m_b[None, :]
    o_tile = o_head[:, None] * num_tiles + (o_b * C.PER_BLOCK // C.BC)[None, :]
    b_tile = tl.load(scores.maxima + o_tile, mask=mask, other=-float("inf"))
    b_x = tl.load(per_head + o_head[:, None] * pitch + o_b[None, :], mask=mask, other=0.0)
    # Not by the log-sum-exp, whose rounding would weigh the heads differently.
    return tl.sum(b_x * (power(b_tile - b_safe[:, None], C) / b_sum[:, None]), 0)


@triton.jit(do_not_specialize=["num_parts", "num_tiles", "pitch", "out_pitch"])
def _block_scores_kernel(
    partial, scores, out, rows, num_parts, num_tiles, pitch, out_pitch, SCORES: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Scores of SCORES blocks for a query and KV head, as `choose_blocks` reads them."""
    line = tl.program_id(0).to(tl.int64)
    i_n, i_g = line // C.G, line % C.G
    seen = num_visible(tl.load(rows + i_n * 4).to(tl.int32), C)
    o_m = tl.arange(0, C.BM)
    m_m, o_head = o_m < C.R, i_n * (C.G * C.R) + i_g * C.R + o_m
    splits = tl.cdiv(seen, C.SPLIT)
    b_max = filled(C.BM, -float("inf"))
    for i in tl.range(0, splits):
        b_m = tl.load(partial.maxima + o_head * num_parts + i, mask=m_m, other=-float("inf"))
        b_max = tl.maximum(b_max, b_m)
    b_safe = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = filled(C.BM, 0.0)
    for i in tl.range(0, splits):
        b_m = tl.load(partial.maxima + o_head * num_parts + i, mask=m_m, other=-float("inf"))
        b_l = tl.load(partial.sums + o_head * num_parts + i, mask=m_m, other=0.0)
        b_sum = tl.fma(b_l, power(b_m - b_safe, C), b_sum)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)

    o_b = tl.program_id(1) * SCORES + tl.arange(0, SCORES)
    m_b = o_b * C.PER_BLOCK < seen
    b_own = _probabilities(
        scores.own, scores, o_head, m_m, o_b, m_b, b_safe, b_sum, num_tiles, pitch, C
    )
    o_out = line * out_pitch + o_b
    if C.OVERLAP > 1:
        m_b = (o_b > 0) & ((o_b - 1) * C.PER_BLOCK < seen)
        b_passed = _probabilities(
            scores.passed, scores, o_head, m_m, o_b - 1, m_b, b_safe, b_sum, num_tiles, pitch, C
        )
        tl.store(out + o_out * 2, b_own)
        tl.store(out + o_out * 2 + 1, b_passed)
    else:
        tl.store(out + o_out, b_own)


def attend_compressed(
    q_NHD: Tensor,
    k_CGD: Tensor,
    v_CGD: Tensor | None,
    partial: Partial,
    rows_N4: Tensor,
    pages: Tensor | None,
    page: int,
    splits: int,
    blocks: int,
    logit_scale: float,
    tile: Tile,
    C: Constants,
) -> Tensor | None:
    """Write the first `splits` parts of `partial`; without values their maxima and sums count.

    pages, page: as `AttendFew` takes compressed_rows and compressed_page.
    blocks: selection blocks up to the newest query's; 0 if they need no scores.

    Returns:
        Scores float32 [N * G, pitch(blocks), 1 or 2] for `choose_blocks`.
    """
    num_queries, heads, _ = q_NHD.shape
    parts, tiles = partial.acc.shape[2], splits * C.SPLIT // C.BC
    # Whole tiles of keys, which may reach beyond the last block.
    columns = splits * C.SPLIT // C.PER_BLOCK

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q_NHD.device)

    scores = None
    if blocks:
        own = empty(num_queries, heads, columns)
        # Triton 3.6 asks a None inside a tuple for its type.
        passed = empty(num_queries, heads, columns) if C.OVERLAP > 1 else own
        scores = HeadScores(own, passed, empty(num_queries, heads, tiles))
    if splits:
        _compressed_kernel[(num_queries, C.G, splits)](
            head_rows(q_NHD), head_rows(k_CGD), None if v_CGD is None else head_rows(v_CGD),
            partial, scores, rows_N4, pages, parts, tiles, columns, logit_scale, PAGE=page, C=C,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
            enable_fp_fusion=False,
        )  # fmt: skip
    if scores is None:
        return None
    out_pitch = pitch(blocks)
    out = empty(num_queries * C.G, out_pitch, 2 if C.OVERLAP > 1 else 1)
    _block_scores_kernel[(num_queries * C.G, out_pitch // SCORES_AT_ONCE)](
        partial, scores, out, rows_N4, parts, tiles, columns, out_pitch, SCORES=SCORES_AT_ONCE, C=C,
        num_warps=4, maxnreg=tile.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out

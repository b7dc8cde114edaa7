"""The selected branch: attention to the tokens of the chosen blocks (Eq. 12, arXiv 2502.11089).

The bottleneck is reading keys and values from the L2 cache, not arithmetic: a block has 2 l' D
numbers for the R rows of one token. So a program takes a tile of neighbouring tokens of one KV
head, BM = BT*R rows of one matrix, and walks the blocks that any of them chose. A block that
several chose is loaded once, and the matrix instructions have enough rows. A block that a token did
not choose leaves the token's running maximum, sum and accumulator as they are, bit for bit, and
blocks come in ascending order for every token. So a query's output depends neither on its
neighbours in the tile nor on where its document was cut. Multiply-adds are explicit and the
compiler makes no others, so that the loop at the causal edge and the loop before it round alike.
Hopper has a kernel of its own, see hopper_forward.py.

`BlockLists` (lists.py) says what an entry of a tile's list holds.

Letters: N local rows, H query heads, G KV heads, R = H/G, Dk and Dv widths, E and F own and fetched
rows, B selection blocks, n chosen blocks, l' tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selected.blocks import (
    Tiles,
    block_at,
    constants,
    load_block,
    load_whole,
    sources_of,
    sources_of_head,
    tiles_of,
    with_int32_blocks,
)
from nsa_kernels.triton.selected.hopper_forward import hopper_forward
from nsa_kernels.triton.selected.lists import (
    EDGES,
    block_lists,
    entry_chosen_by,
    entry_length,
    entry_row,
)
from nsa_kernels.triton.shared.arguments import head_rows, last_dim_contiguous, load_head_rows
from nsa_kernels.triton.shared.arithmetic import (
    LN2,
    add_dot,
    add_softmax,
    filled,
    logit_scale,
    power,
    zeros,
)
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import selected_walk_gluon, token_tile, walk_tiles
from nsa_kernels.triton.shared.tables import load_query_tile, query_tiles


@triton.jit
def _attend(
    b_acc,
    b_max,
    b_sum,
    b_q,
    b_k,
    b_v,
    first_key,
    chose,
    b_seen,
    logit_scale,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """One step of the online softmax, over BN keys of a block, for the rows that `chose` it.

    With EDGE a row sees the block's keys before its b_seen. Without it every row sees all keys, and
    b_seen is not read.
    """
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=C.PRECISION)  # [BM, BN]
    seen = chose[:, None]
    if EDGE:
        seen = seen & (first_key + tl.arange(0, C.BN)[None, :] < b_seen[:, None])
    b_s = tl.where(seen, b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * logit_scale)
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_scale = power(b_max - b_safe, C)
    b_p = power(tl.fma(b_s, logit_scale, -b_safe[:, None]), C)
    b_sum = tl.fma(b_sum, b_scale, tl.sum(b_p, 1))
    b_acc = b_acc * b_scale[:, None]
    b_acc = add_dot(b_acc, b_p.to(b_v.dtype), b_v, C)  # [BM, PDV]
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["num_own"])
def _forward_kernel(
    q,
    sources,
    num_own,
    k_own_tiles,
    v_own_tiles,
    k_fetched_tiles,
    v_fetched_tiles,
    o,
    lse,
    log_sum,
    tiles,
    blocks,
    logit_scale,
    EDGE_BLOCKS: tl.constexpr,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
):
    """o and lse of one tile of tokens, from its list of blocks, of LENGTH entries."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    first_row, num_tokens, position, _ = load_query_tile(tiles, i_tile)
    p_list = blocks.lists + (i_tile * C.G + i_g) * LENGTH
    count = tl.load(blocks.counts + i_tile * C.G + i_g)

    o_m = tl.arange(0, C.BM)
    token, head = o_m // C.R, i_g * C.R + o_m % C.R
    m_m = (token < num_tokens) & (token < C.BT)
    row = first_row + token
    b_q = load_head_rows(q, row, head, m_m, C.DK, C.PDK)  # [BM, PDK]
    sources = sources_of_head(sources, i_g)
    kv_tiles = Tiles(k_own_tiles, v_own_tiles, k_fetched_tiles, v_fetched_tiles)

    # With APART the tiles of a block are summed by themselves (b_a, b_m, b_l) and then added.
    b_a = zeros(C.BM, C.PDV)
    b_m = filled(C.BM, -float("inf"))
    b_l = filled(C.BM, 0.0)
    b_acc, b_max, b_sum = b_a, b_m, b_l
    TILES: tl.constexpr = C.BLOCK // C.BN
    # Tested outside the loop: if it may be empty, ptxas makes each wgmma wait for the one before.
    if count > 0:
        # Read ahead, so that the addresses of keys and values never wait for it.
        entry = tl.load(p_list + EDGE_BLOCKS)
        for i in tl.range(0, count * TILES):
            following = tl.load(p_list + EDGE_BLOCKS + tl.minimum((i + 1) // TILES, count - 1))
            first_key = i % TILES * C.BN
            b_k, b_v = load_whole(entry_row(entry), first_key, kv_tiles, sources, num_own, i_g, C)
            chose = entry_chosen_by(entry, token)
            b_a, b_m, b_l = _attend(
                b_a, b_m, b_l, b_q, b_k, b_v, first_key, chose, token, logit_scale, False, C
            )
            if C.APART:
                # No branch, for which ptxas would make each wgmma wait for the one before.
                ends = i % TILES == TILES - 1
                b_acc, b_max, b_sum = add_softmax(
                    b_acc, b_max, b_sum, b_a, tl.where(ends, b_m, -float("inf")),
                    tl.where(ends, b_l, 0.0), C,
                )  # fmt: skip
                b_a = tl.where(ends, 0.0, b_a)
                b_m = tl.where(ends, -float("inf"), b_m)
                b_l = tl.where(ends, 0.0, b_l)
            entry = following
    first_edge = (position + 1) // C.BLOCK
    for i in tl.range(0, EDGE_BLOCKS * TILES, num_stages=1):
        entry = tl.load(p_list + i // TILES)
        limit = entry_length(entry)  # 0 for a block that no token chose
        if i % TILES * C.BN < limit:
            first_key = i % TILES * C.BN
            block = block_at(entry_row(entry), sources, num_own)
            b_k, b_v = load_block(block, first_key, limit, True, C)  # [BN, PDK], [BN, PDV]
            chose = entry_chosen_by(entry, token)
            b_seen = position + token + 1 - (first_edge + i // TILES) * C.BLOCK
            b_a, b_m, b_l = _attend(
                b_a, b_m, b_l, b_q, b_k, b_v, first_key, chose, b_seen, logit_scale, True, C
            )
        if C.APART and i % TILES == TILES - 1:
            b_acc, b_max, b_sum = add_softmax(b_acc, b_max, b_sum, b_a, b_m, b_l, C)
            b_a = zeros(C.BM, C.PDV)
            b_m = filled(C.BM, -float("inf"))
            b_l = filled(C.BM, 0.0)
    if not C.APART:
        b_acc, b_max, b_sum = b_a, b_m, b_l

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # With nothing seen the maximum is -inf.
    b_o = b_acc / b_sum[:, None]
    if C.PRECISION == "ieee":  # Logits are multiples of ln, else of log2: see logit_scale.
        b_log_sum = b_max + tl.log(b_sum)
        b_lse = b_log_sum
    else:
        b_log_sum = b_max + tl.log2(b_sum)
        b_lse = b_log_sum * LN2
    o_dv = tl.arange(0, C.PDV)
    row_head = row * (C.G * C.R) + head
    p_o = o + row_head[:, None] * C.DV + o_dv[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & (o_dv < C.DV)[None, :])
    tl.store(log_sum + row_head, b_log_sum, mask=m_m)
    tl.store(lse + row_head, b_lse, mask=m_m)


def selected_forward(
    q_NHD: Tensor,
    k_own_EGD: Tensor,
    v_own_EGD: Tensor,
    k_fetched_FGD: Tensor,
    v_fetched_FGD: Tensor,
    selected_NGn: Tensor,
    block_rows_GB: Tensor,
    block_lengths_B: Tensor,
    segments: QuerySegments,
    select_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [N, H, Dv], lse [N, H], and lse in the base of the kernels' exponentials: `logit_scale`."""
    q_NHD = last_dim_contiguous(q_NHD)
    tensors = [
        with_int32_blocks(x, select_block)
        for x in (k_own_EGD, v_own_EGD, k_fetched_FGD, v_fetched_FGD)
    ]
    o_NHD, lse_NH, log_sum_NH = empty_outputs(q_NHD, v_own_EGD)
    if q_NHD.shape[0]:
        tile = walk_tiles(q_NHD, v_own_EGD, selected_NGn.shape[-1], select_block)[0]
        tokens, rows = token_tile(q_NHD.shape[1] // v_own_EGD.shape[1], q_NHD.dtype)
        C = constants(
            q_NHD, v_own_EGD, select_block, tokens=tokens, rows=rows, keys=tile.keys,
            apart=tile.apart,
        )  # fmt: skip
        tiles = query_tiles(segments, tokens, "selected_base").table
        blocks = block_lists(
            selected_NGn, block_rows_GB, block_lengths_B, tiles, tokens, select_block
        )
        in_logits = logit_scale(q_NHD, scale)
        if selected_walk_gluon(q_NHD, v_own_EGD, select_block, tile) and any(map(len, tensors)):
            hopper_forward(q_NHD, tensors, o_NHD, lse_NH, log_sum_NH, tiles, blocks, in_logits)
            return o_NHD, lse_NH, log_sum_NH
        launcher(_forward_kernel, (len(tiles), C.G))(
            head_rows(q_NHD), sources_of(tensors), k_own_EGD.shape[0],
            *tiles_of(tensors, tile), o_NHD, lse_NH, log_sum_NH, tiles, blocks, in_logits,
            EDGE_BLOCKS=EDGES, LENGTH=blocks.lists.shape[-1], C=C, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers, enable_fp_fusion=False,
        )  # fmt: skip
    return o_NHD, lse_NH, log_sum_NH


def empty_outputs(q_NHD: Tensor, v_EGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and lse in the kernels' base, not yet written."""
    o_NHD = q_NHD.new_empty(*q_NHD.shape[:2], v_EGD.shape[-1])
    lse_NH = q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)
    return o_NHD, lse_NH, torch.empty_like(lse_NH)

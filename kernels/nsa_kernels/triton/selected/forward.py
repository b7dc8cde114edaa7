"""The selection branch: attention to the tokens of the chosen blocks (Eq. 11, arXiv 2502.11089).

What binds is the traffic of keys and values from the L2 cache, not arithmetic: a block has 2 l' D
numbers for the R rows of one token. So a program takes a tile of neighbouring tokens of one KV
head, BM = BT*R rows of one matrix, and walks the blocks that any of them chose: one that several
chose is loaded once, and the matrix instructions have rows enough. A block that a token did not
choose leaves the token's running maximum, sum and accumulator as they are, bit for bit, and blocks
come in ascending order for every token, so that a query's output depends neither on its neighbours
in the tile nor on where its document was cut. Multiply-adds are written out and the compiler may
make no other, since blocks at the causal edge take another branch of the code than those before.

Letters: N local rows, H query heads, G KV heads, R = H/G, Dk and Dv widths, E and F own and fetched
rows, B selection blocks, n chosen blocks, l' tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selected.blocks import block_of, load_block, with_int32_blocks
from nsa_kernels.triton.selected.lists import EDGES, block_lists
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.arithmetic import add_dot, logit_scale, power, precision
from nsa_kernels.triton.shared.shapes import padded, token_tile, walk_tiles
from nsa_kernels.triton.shared.tables import query_tiles


@triton.jit
def _attend(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_k,
    p_v,
    stride_k,
    stride_v,
    first_key,
    chose,
    b_seen,
    limit,
    logit_scale,
    EDGE: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax, over BN keys of a block, for the rows that `chose` it.

    At an EDGE to the keys before b_seen of each row; none is there from `limit` on.
    """
    b_k = load_block(p_k, stride_k, first_key, limit, BN, DK, PDK, EDGE)  # [BN, PDK]
    b_v = load_block(p_v, stride_v, first_key, limit, BN, DV, PDV, EDGE)  # [BN, PDV]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    seen = chose[:, None]
    if EDGE:
        seen = seen & (first_key + tl.arange(0, BN)[None, :] < b_seen[:, None])
    b_s = tl.where(seen, b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * logit_scale)
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_scale = power(b_max - b_safe, PRECISION)
    b_p = power(tl.fma(b_s, logit_scale, -b_safe[:, None]), PRECISION)
    b_sum = tl.fma(b_sum, b_scale, tl.sum(b_p, 1))
    b_acc = b_acc * b_scale[:, None]
    b_acc = add_dot(b_acc, b_p.to(b_v.dtype), b_v, PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def _add_softmax(b_acc, b_max, b_sum, b_a, b_m, b_l, PRECISION: tl.constexpr):
    """Two accumulators, maxima and sums as one."""
    b_new = tl.maximum(b_max, b_m)
    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_old, b_add = power(b_max - b_safe, PRECISION), power(b_m - b_safe, PRECISION)
    b_acc = tl.fma(b_acc, b_old[:, None], b_a * b_add[:, None])
    b_sum = tl.fma(b_sum, b_old, b_l * b_add)
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["num_own"])
def _forward_kernel(
    q,
    k_own,
    v_own,
    k_fetched,
    v_fetched,
    o,
    lse,
    log_sum,
    tiles,
    lists,
    counts,
    num_own,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_fkt,
    stride_fkh,
    stride_fvt,
    stride_fvh,
    logit_scale,
    G: tl.constexpr,
    R: tl.constexpr,
    LENGTH: tl.constexpr,
    EDGE_BLOCKS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PDK: tl.constexpr,
    PDV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    first_row = tl.load(tiles + i_tile * 4)
    num_tokens = tl.load(tiles + i_tile * 4 + 1).to(tl.int32)
    position = tl.load(tiles + i_tile * 4 + 2).to(tl.int32)
    p_list = lists + (i_tile * G + i_g) * LENGTH
    count = tl.load(counts + i_tile * G + i_g)

    o_m = tl.arange(0, BM)
    o_dk = tl.arange(0, PDK)
    token, head = o_m // R, i_g * R + o_m % R
    m_m = (token < num_tokens) & (token < BT)
    row = first_row + token
    p_q = q + (row * stride_qt + head * stride_qh)[:, None] + o_dk[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_dk < DK)[None, :], other=0.0)  # [BM, PDK]
    k_own += i_g * stride_kh
    v_own += i_g * stride_vh
    k_fetched += i_g * stride_fkh
    v_fetched += i_g * stride_fvh

    # With APART the tiles of a block are summed by themselves (b_a, b_m, b_l) and then added.
    b_a = tl.zeros([BM, PDV], dtype=tl.float32)
    b_m = tl.full([BM], -float("inf"), dtype=tl.float32)
    b_l = tl.zeros([BM], dtype=tl.float32)
    b_acc, b_max, b_sum = b_a, b_m, b_l
    TILES: tl.constexpr = BLOCK // BN
    # Asked outside: for a loop of no turns, ptxas would let every wgmma wait for the one before.
    if count > 0:
        # Read ahead, so that the addresses of keys and values never wait for it.
        entry = tl.load(p_list + EDGE_BLOCKS)
        for i in tl.range(0, count * TILES):
            following = tl.load(p_list + EDGE_BLOCKS + tl.minimum((i + 1) // TILES, count - 1))
            p_k, p_v, stride_k, stride_v = block_of(
                entry, k_own, v_own, k_fetched, v_fetched, num_own, stride_kt, stride_vt,
                stride_fkt, stride_fvt,
            )  # fmt: skip
            chose = ((entry.to(tl.int32) >> token) & 1) != 0
            b_a, b_m, b_l = _attend(
                b_a, b_m, b_l, b_q, p_k, p_v, stride_k, stride_v, i % TILES * BN, chose, token,
                BLOCK, logit_scale, False, BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
            if APART:
                # No branch, for which ptxas would let every wgmma wait for the one before.
                ends = i % TILES == TILES - 1
                b_acc, b_max, b_sum = _add_softmax(
                    b_acc, b_max, b_sum, b_a, tl.where(ends, b_m, -float("inf")),
                    tl.where(ends, b_l, 0.0), PRECISION,
                )  # fmt: skip
                b_a = tl.where(ends, 0.0, b_a)
                b_m = tl.where(ends, -float("inf"), b_m)
                b_l = tl.where(ends, 0.0, b_l)
            entry = following
    first_edge = (position + 1) // BLOCK
    for i in tl.range(0, EDGE_BLOCKS * TILES, num_stages=1):
        entry = tl.load(p_list + i // TILES)
        limit = ((entry >> 16) & 255).to(tl.int32)  # 0 for a block that no token chose
        if i % TILES * BN < limit:
            p_k, p_v, stride_k, stride_v = block_of(
                entry, k_own, v_own, k_fetched, v_fetched, num_own, stride_kt, stride_vt,
                stride_fkt, stride_fvt,
            )  # fmt: skip
            chose = ((entry.to(tl.int32) >> token) & 1) != 0
            b_seen = position + token + 1 - (first_edge + i // TILES) * BLOCK
            b_a, b_m, b_l = _attend(
                b_a, b_m, b_l, b_q, p_k, p_v, stride_k, stride_v, i % TILES * BN, chose, b_seen,
                limit, logit_scale, True, BN, DK, DV, PDK, PDV, PRECISION,
            )  # fmt: skip
        if APART and i % TILES == TILES - 1:
            b_acc, b_max, b_sum = _add_softmax(b_acc, b_max, b_sum, b_a, b_m, b_l, PRECISION)
            b_a = tl.zeros([BM, PDV], dtype=tl.float32)
            b_m = tl.full([BM], -float("inf"), dtype=tl.float32)
            b_l = tl.zeros([BM], dtype=tl.float32)
    if not APART:
        b_acc, b_max, b_sum = b_a, b_m, b_l

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # With nothing seen the maximum is -inf.
    b_o = b_acc / b_sum[:, None]
    if PRECISION == "ieee":
        b_log_sum = b_max + tl.log(b_sum)
        b_lse = b_log_sum
    else:
        b_log_sum = b_max + tl.log2(b_sum)
        b_lse = b_log_sum * 0.6931471805599453
    o_dv = tl.arange(0, PDV)
    row_head = row * (G * R) + head
    p_o = o + row_head[:, None] * DV + o_dv[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & (o_dv < DV)[None, :])
    tl.store(log_sum + row_head, b_log_sum, mask=m_m)
    tl.store(lse + row_head, b_lse, mask=m_m)


def selected_forward(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: QuerySegments,
    select_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q = last_dim_contiguous(q)
    sources = [with_int32_blocks(x, select_block) for x in (k_own, v_own, k_fetched, v_fetched)]
    num_rows, heads, dk = q.shape
    groups, dv = v_own.shape[1:]
    o, lse, log_sum = empty_outputs(q, v_own)
    if num_rows:
        ratio = heads // groups
        shape = walk_tiles(q, v_own, selected.shape[-1], select_block)[0]
        tokens, rows = token_tile(ratio, q.dtype)
        tiles = query_tiles(segments, tokens, "selected_base").table
        lists, counts = block_lists(
            selected, block_rows, block_lengths, tiles, tokens, select_block
        )
        _forward_kernel[(len(tiles), groups)](
            q, *sources, o, lse, log_sum, tiles, lists, counts, k_own.shape[0],
            *(stride for x in (q, *sources) for stride in x.stride()[:2]),
            logit_scale(q, scale), G=groups, R=ratio, LENGTH=lists.shape[-1],
            EDGE_BLOCKS=EDGES, APART=shape.apart,
            BLOCK=select_block, BT=tokens, BM=rows, BN=shape.keys, DK=dk, DV=dv,
            PDK=padded(dk), PDV=padded(dv), PRECISION=precision(q),
            num_warps=shape.warps, num_stages=shape.stages, maxnreg=shape.registers,
            enable_fp_fusion=False,
        )  # fmt: skip
    return o, lse, log_sum


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the lse as kernels count it, not yet written."""
    o, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)
    return o, lse, torch.empty_like(lse)

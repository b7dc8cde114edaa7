"""What the kernels for few queries are compiled for, and where a query's keys stand.

Letters: N queries, H query heads, G KV heads, R = H/G, Dk and Dv widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.shared.arguments import load_rows
from nsa_kernels.triton.shared.arithmetic import PIECE, add_dot, power, precision
from nsa_kernels.triton.shared.cache import cached
from nsa_kernels.triton.shared.shapes import cdiv, decoding_tile, padded, power_of_two

# Keys of a program, from multiples of it on: a query's sums have the same parts in every batch.
SPLIT = 512
# Chosen blocks of a program in tokens, and keys of the window, likewise.
PART = 256


class Options(NamedTuple):
    """As the operators of `Backend` take them."""

    block: int
    stride: int
    select_block: int
    num_selected: int
    window: int


class Constants(NamedTuple):
    """What a kernel is compiled for.

    G KV heads with R query heads each, BM rows of a program of which R are used; BN keys of a tile,
    BC compressed ones; DK, DV widths, padded to PDK, PDV. BLOCK, STRIDE: l and d; PER_BLOCK
    compression blocks begin in a selection block, and OVERLAP cover a stride. NUM blocks of
    SELECT_BLOCK tokens are chosen, of which a program takes ENTRIES, in PARTS_SELECTED programs;
    PARTS_WINDOW programs share the WINDOW. PIECE: partial results that are added in a row.
    """

    G: int
    R: int
    BM: int
    BN: int
    BC: int
    DK: int
    DV: int
    PDK: int
    PDV: int
    PRECISION: str
    BLOCK: int
    STRIDE: int
    PER_BLOCK: int
    OVERLAP: int
    SPLIT: int
    SELECT_BLOCK: int
    NUM: int
    ENTRIES: int
    PARTS_SELECTED: int
    WINDOW: int
    PART: int
    PARTS_WINDOW: int
    PIECE: int


class Partial(NamedTuple):
    """Softmaxes over parts of a query's keys, in float32.

    acc [N, H, parts, Dv], with their maxima and sums [N, H, parts], in the units of `logit_scale`.
    Parts of a row: `splits` of compressed keys, those of the selected branch, those of the window.
    """

    acc: Tensor
    maxima: Tensor
    sums: Tensor


def constants(q_NHD: Tensor, v: Tensor, options: Options) -> Constants:
    """v [rows, G, Dv], of any branch."""
    groups, dk, dv = v.shape[1], q_NHD.shape[-1], v.shape[-1]
    ratio = q_NHD.shape[1] // groups
    entries = max(1, PART // options.select_block)
    keys = min(decoding_tile(q_NHD, v).keys, options.select_block)
    per_block = options.select_block // options.stride
    return Constants(
        G=groups,
        R=ratio,
        BM=max(16, power_of_two(ratio)),
        BN=keys,
        BC=max(keys, per_block),
        DK=dk,
        DV=dv,
        PDK=padded(dk),
        PDV=padded(dv),
        PRECISION=precision(q_NHD),
        BLOCK=options.block,
        STRIDE=options.stride,
        PER_BLOCK=per_block,
        OVERLAP=options.block // options.stride,
        SPLIT=SPLIT,
        SELECT_BLOCK=options.select_block,
        NUM=options.num_selected,
        ENTRIES=entries,
        PARTS_SELECTED=cdiv(options.num_selected, entries),
        WINDOW=options.window,
        PART=PART,
        PARTS_WINDOW=(options.window + PART - 2) // PART + 1,
        PIECE=PIECE,
    )


def query_rows(segments: QuerySegments) -> Tensor:
    """int64 [N, 4]: a query's position, and the rows or ids of key, block and token 0 for it.

    That is compressed_base, selected_base and window_base of its segment.
    """
    return cached(segments, "query_rows", lambda: _query_rows(segments))


def _query_rows(segments: QuerySegments) -> Tensor:
    table, num = segments.table, segments.num_queries
    bases = table[:, 3:].repeat_interleave(table[:, 1], dim=0, output_size=num)
    return torch.cat((segments.positions.unsqueeze(1), bases), dim=1)


@triton.jit
def num_visible(position, C: tl.constexpr):
    """Compression blocks whose last token is at or before a position."""
    return tl.where(position >= C.BLOCK - 1, (position - (C.BLOCK - 1)) // C.STRIDE + 1, 0)


@triton.jit
def load_query(q, i_n, i_g, C: tl.constexpr):
    """The R query heads of KV head i_g, [BM, PDK], their numbers and which rows are some."""
    o_m = tl.arange(0, C.BM)
    m_m, head = o_m < C.R, i_g * C.R + o_m
    o_row = i_n * q.stride_row + head * q.stride_head
    return load_rows(q.p, o_row, tl.arange(0, C.PDK), m_m, C.DK, C.PDK), head, m_m


@triton.jit
def attend_tile(b_acc, b_max, b_sum, b_q, k, v, i_g, o_row, m_row, logit_scale, C: tl.constexpr):
    """One step of the online softmax, over the keys and values at rows o_row int64.

    Returns the softmax so far, and its new terms [BM, rows]. Without v, nothing is accumulated.
    """
    o_k = o_row * k.stride_row + i_g * k.stride_head
    b_k = load_rows(k.p, o_k, tl.arange(0, C.PDK), m_row, C.DK, C.PDK)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=C.PRECISION)
    b_s = tl.where(m_row[None, :], b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * logit_scale)
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_scale = power(b_max - b_safe, C)
    b_p = power(tl.fma(b_s, logit_scale, -b_safe[:, None]), C)
    b_sum = tl.fma(b_sum, b_scale, tl.sum(b_p, 1))
    if v is not None:
        o_v = o_row * v.stride_row + i_g * v.stride_head
        b_v = load_rows(v.p, o_v, tl.arange(0, C.PDV), m_row, C.DV, C.PDV)
        b_acc = add_dot(b_acc * b_scale[:, None], b_p.to(b_v.dtype), b_v, C)
    return b_acc, b_new, b_sum, b_p


@triton.jit
def store_part(partial, i_n, i_part, head, m_m, num_parts, b_acc, b_max, b_sum, C: tl.constexpr):
    """Write part i_part of `Partial`."""
    o_part = (i_n * (C.G * C.R) + head) * num_parts + i_part
    o_d = tl.arange(0, C.PDV)
    mask = m_m[:, None] & (o_d < C.DV)[None, :]
    tl.store(partial.acc + o_part[:, None] * C.DV + o_d[None, :], b_acc, mask=mask)
    tl.store(partial.maxima + o_part, b_max, mask=m_m)
    tl.store(partial.sums + o_part, b_sum, mask=m_m)

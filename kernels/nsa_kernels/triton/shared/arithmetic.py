"""How kernels multiply and add: precision, the order of sums, exponentials.

C: the constants of a kernel, of which PRECISION is read here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
# Tiles added one after another; more are added in pieces, whose sums are then added.
PIECE = 64


def precision(x: Tensor) -> str:
    """How a dot of this dtype is computed: float32 exactly, never in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a sum of float32 tiles [ROWS, COLUMNS] starts."""
    return tl.zeros([ROWS, COLUMNS], dtype=tl.float32)


@triton.jit
def filled(ROWS: tl.constexpr, value):
    """A float32 [ROWS] of one value."""
    return tl.full([ROWS], value, dtype=tl.float32)


@triton.jit
def add_dot(acc, a, b, C: tl.constexpr, BY_ITSELF: tl.constexpr = False):
    """acc + a b. In float32 the product is summed by itself and then added.

    One running sum through all tiles would round as often as it has terms; a plain addition would
    be made one by the compiler. BY_ITSELF does so in every dtype: for an acc that a loop sets back
    to zero, ptxas would let every wgmma that adds to it wait for the one before.
    """
    if C.PRECISION == "ieee" or BY_ITSELF:
        return tl.fma(tl.dot(a, b, input_precision=C.PRECISION), 1.0, acc)
    return tl.dot(a, b, acc, input_precision=C.PRECISION)


@triton.jit
def add_tiles(b_sum, p_tile, low, high, stride, mask, PIECE_TILES: tl.constexpr):
    """b_sum + the tiles low..high-1 that stand `stride` elements apart, in pieces."""
    AT_ONCE: tl.constexpr = 8  # Loads that wait together.
    for piece in tl.range(low, high, PIECE_TILES):
        b_piece = tl.zeros_like(b_sum)
        end = tl.minimum(piece + PIECE_TILES, high)
        for first in tl.range(piece, end, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                # Not the scalars' comparison: the interpreter takes that for an integer.
                m_tile = mask & (tl.full(mask.shape, first + i, tl.int64) < end)
                b_piece += tl.load(p_tile + (first + i) * stride, mask=m_tile, other=0.0)
        b_sum += b_piece
    return b_sum


@triton.jit
def power(x, C: tl.constexpr):
    """2^x, or e^x where a dot is exact: see `logit_scale`."""
    return tl.exp(x) if C.PRECISION == "ieee" else tl.exp2(x)


def logit_scale(q: Tensor, scale: float) -> float:
    """What logits are multiplied by in kernels, and the log-sum-exp that they keep is counted in.

    Powers of 2 are cheaper; but rounding scale log2(e) loses digits that float32 has to keep.
    """
    return scale if q.dtype == torch.float32 else scale * LOG2E


@triton.jit
def add_softmax(b_acc, b_max, b_sum, b_a, b_m, b_l, C: tl.constexpr):
    """Two accumulators [BM, PDV] of a softmax, with their maxima and sums [BM], as one."""
    b_new = tl.maximum(b_max, b_m)
    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_old, b_add = power(b_max - b_safe, C), power(b_m - b_safe, C)
    b_acc = tl.fma(b_acc, b_old[:, None], b_a * b_add[:, None])
    b_sum = tl.fma(b_sum, b_old, b_l * b_add)
    return b_acc, b_new, b_sum

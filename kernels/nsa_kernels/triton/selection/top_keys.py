"""The n highest of a line of integers, by bisection over their values.

All comparisons of a line are made by few threads that keep its keys in registers: what a search
costs grows with the length of the line, and n hardly matters. The result is exact, ties included.

Letters: L lines, W keys of a line, WORDS times BITS = W, PN places.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_of_line(x):
    """[L, WORDS] or [L, WORDS, BITS] -> [L]."""
    if len(x.shape) == 3:
        x = tl.sum(x, 2)
    return tl.sum(x, 1)


@triton.jit
def _least_taken(b_key, b_top, want, low, NUM_KEYS: tl.constexpr):
    """What the `want` [L] highest of a line's keys reach, and how many [L] do reach it.

    b_key [L, WORDS] or [L, WORDS, BITS], NUM_KEYS a line; b_top [L, WORDS] the highest of each
    word; low [L] >= 0 a lower bound, returned where no more than `want` keys reach that.
    """
    # Invariant: count = keys >= low, and fewer than `want` keys are >= high.
    high = tl.max(b_top, 1) + 1  # [L], as are low, count, middle and above
    if len(b_key.shape) == 3:
        count = _sum_of_line((b_key >= low[:, None, None]).to(tl.int32))
    else:
        count = _sum_of_line((b_key >= low[:, None]).to(tl.int32))
    left = tl.max(((count > want) & (high - low > 1)).to(tl.int32), 0)
    while left > 0:
        searched = (count > want) & (high - low > 1)
        middle = low + (high - low) // 2
        # The sign of a difference: fewer operations than a comparison.
        if len(b_key.shape) == 3:
            above = NUM_KEYS + _sum_of_line((b_key - middle[:, None, None]) >> 31)
        else:
            above = NUM_KEYS + _sum_of_line((b_key - middle[:, None]) >> 31)
        enough = above >= want
        low = tl.where(searched & enough, middle, low)
        count = tl.where(searched & enough, above, count)
        high = tl.where(searched & (above < want), middle, high)
        left = tl.max(((count > want) & (high - low > 1)).to(tl.int32), 0)
    return low, count


@triton.jit
def top_keys(b_key, want, PN: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr):
    """Columns [L, PN] of the `want` [L] highest of the keys >= 0 [L, W], ascending; how many.

    Of equal keys the first are taken. A line that wants none must have no key >= 0. A line's keys
    are in WORDS words; bit b of word i is column (b // RUN) * WORDS * RUN + i * RUN + b % RUN,
    such that a thread has a word.
    """
    L: tl.constexpr = b_key.shape[0]
    W: tl.constexpr = b_key.shape[1]
    BITS: tl.constexpr = W // WORDS
    b_key = tl.permute(tl.reshape(b_key, [L, BITS // RUN, WORDS, RUN]), (0, 2, 1, 3))
    b_key = tl.reshape(b_key, [L, WORDS, BITS])
    o_word = tl.arange(0, WORDS) * RUN
    o_bit = tl.arange(0, BITS)
    b_top = tl.max(b_key, 2)  # [L, WORDS]
    # At least `want` keys reach what that many of the words' highest reach.
    low, count = _least_taken(b_top, b_top, want, want * 0, WORDS)
    low, count = _least_taken(b_key, b_top, want, low, W)
    if tl.max(count - want, 0) > 0:
        # Keys equal to the lowest that is taken are too many: now the first is the highest.
        o_column = o_word[:, None] + (o_bit // RUN * (WORDS * RUN) + o_bit % RUN)[None, :]
        b_turn = tl.where(b_key == low[:, None, None], W - o_column[None, :, :], -1)
        b_key = tl.where(b_key > low[:, None, None], W + 1, b_turn)
        low, count = _least_taken(b_key, tl.max(b_key, 2), want, want * 0, W)

    # [L, WORDS, BITS]
    b_taken = (b_key >= low[:, None, None]).to(tl.uint32) << o_bit.to(tl.uint32)[None, None, :]
    b_word = tl.sum(b_taken, 2)  # [L, WORDS]
    o_n = tl.arange(0, PN)
    b_column = tl.zeros([L, PN], tl.int32)
    for i in tl.range(0, tl.max(count, 0)):
        b_bit = b_word & (0 - b_word)  # The lowest; its exponent as a float is its number.
        b_bit = (b_bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        b_next = b_bit // RUN * (WORDS * RUN) + o_word + b_bit % RUN
        b_next = tl.where(b_word == 0, W, b_next)  # [L, WORDS]
        first = tl.min(b_next, 1)  # [L]
        b_word = tl.where(b_next == first[:, None], b_word & (b_word - 1), b_word)
        b_column = tl.where(o_n == i, first[:, None], b_column)
    return b_column, count

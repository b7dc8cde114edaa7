"""Traps of the choice of blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_dist import NativeSparseAttention, NSAConfig
from nsa_kernels.reference import ReferenceOptions, RotaryOptions, layer_reference
from tests.traps.mutation import Replaced, Rewritten, catches
from tests.traps.seam import (
    BLOCK,
    SELECT,
    STRIDE,
    all_blocks,
    attend_selected,
    choose,
    num_blocks,
    one_document,
)


def keys_with(logits: list[dict[int, float]], count: int, dtype: torch.dtype) -> Tensor:
    """Compressed keys [count, 1, D] that query e_c (times sqrt(D)) scores as logits[c] says,
    0 where it says nothing."""
    keys = torch.zeros(count, 1, len(logits), dtype=dtype)
    for channel, given in enumerate(logits):
        for block, logit in given.items():
            keys[block, 0, channel] = logit
    return keys


def queries(count: int, dtype: torch.dtype) -> Tensor:
    """Query c is e_c times sqrt(D), [count, 1, count]."""
    return (torch.eye(count, dtype=dtype) * count**0.5)[:, None]


def choose_at(logits: list[dict[int, float]], position: int, dtype: torch.dtype, **options) -> list:
    """What queries that score the compressed keys as ``logits`` choose at ``position``."""
    keys = keys_with(logits, num_blocks(position + 1)[0], dtype)
    found = []
    for q in queries(len(logits), dtype).split(1):
        found.append(choose(q, keys, one_document(1, position), **options)[0, 0].tolist())
    return found


def sum_of_later_keys(
    block_scores: Any, probs: Tensor, num_blocks: int, per_block: int, overlap: int
) -> Tensor:
    """p[m j + a + b]: the sum over +m-k of probabilities that stand overlap - 1 places on."""
    moved = F.pad(probs[..., overlap - 1 :], (0, overlap - 1))
    return block_scores(moved, num_blocks, per_block, overlap)


def sum_of_earlier_keys(
    block_scores: Any, probs: Tensor, num_blocks: int, per_block: int, overlap: int
) -> Tensor:
    """p[m j - a - b]: the sum over +m-k of probabilities that stand m - 1 places back."""
    moved = F.pad(probs, (per_block - 1, 0))[..., : per_block * num_blocks]
    return block_scores(moved, num_blocks, per_block, overlap)


@catches(
    "Eq. 9's sign",
    "+m+k in the place of +m-k",
    Replaced("nsa_kernels.pytorch:_block_scores", sum_of_later_keys),
)
@catches(
    "Eq. 9's sign",
    "-m-k, as printed, in the place of +m-k",
    Replaced("nsa_kernels.pytorch:_block_scores", sum_of_earlier_keys),
)
def test_trap_eq_9_sign() -> None:
    """Compression blocks 4j-1 .. 4j+3 touch selection block j, with weights 1, 2, 2, 2, 1.

    Block 7 (tokens 14..17) lies in both 1 and 2, block 8 in 2 alone: together they make 2 best.
    With +m+k block 1 would get 2 p7 + p8 against p8. Block 9 (tokens 18..21) lies in 2; with the
    printed -m-k block 3 would get it.
    """
    peaks = [{7: 9.0, 8: 8.0}, {9: 9.0}]
    assert choose_at(peaks, 63, torch.float64, n=2, init=0) == [[2, 7], [2, 7]]
    # Blocks 3 and 7 count once for selection block 1, block 17 twice for selection block 4.
    more = 9.0 + math.log(1.2)
    assert choose_at([{3: 9.0, 7: 9.0, 17: more}], 63, torch.float64, n=2, init=0) == [[4, 7]]


@catches(
    "k larger than the blocks there are",
    "the best n of fewer than n blocks are asked for",
    Rewritten("nsa_kernels.pytorch:select_blocks", "$BLOCKS <= num_selected", "$BLOCKS < 0"),
)
@catches(
    "k larger than the blocks there are",
    "places without an eligible block keep a future one",
    Rewritten(
        "nsa_kernels.pytorch:select_blocks", "$BEST.masked_fill($BEST > $OWN, -1)", "$BEST.clone()"
    ),
)
def test_trap_k_larger_than_the_blocks_there_are() -> None:
    """A query with fewer eligible blocks than n gets them all, then -1, and no future block."""
    q = torch.randn(100, 4, 8, dtype=torch.float64)
    k = torch.randn(num_blocks(100)[0], 2, 8, dtype=torch.float64)
    for n in (2, 5, 13, 16):
        positions = torch.arange(100)
        selected = choose(q, k, one_document(100), n=n)
        eligible = positions // SELECT + 1
        assert torch.equal((selected >= 0).sum(-1), eligible.clamp(max=n)[:, None].expand(-1, 2))
        assert (selected <= positions[:, None, None] // SELECT).all()
        short = eligible <= n
        assert torch.equal(selected[short], all_blocks(positions[short], 2, n))
    config = NSAConfig(2, 1, 8, None, BLOCK, STRIDE, SELECT, num_selected=16, window=5)
    layer = NativeSparseAttention(16, config, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 10, 40], dtype=torch.int32)
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    expected = layer_reference(
        x[0],
        dict(layer.named_parameters()),
        ReferenceOptions.from_config(config),
        rotary=RotaryOptions(),
        cu_seqlens=cu_seqlens,
    ).output
    torch.testing.assert_close(layer(x, cu_seqlens=cu_seqlens)[0], expected, rtol=0, atol=1e-12)


def ties_to_the_higher(best: Any, scores: Tensor, num_selected: int) -> Tensor:
    return (scores.shape[-1] - 1 - best(scores.flip(-1), num_selected)).flip(-1)


@catches(
    "ties",
    "equal scores go to the higher index",
    Replaced("nsa_kernels.pytorch:_best", ties_to_the_higher),
)
def test_trap_ties() -> None:
    """Equal scores go to the lower index, whatever their place, number and dtype."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        # Keys all alike: inside the document every block's score is the same.
        assert choose_at([{}], 255, dtype, n=6, local=2) == [[0, 1, 2, 3, 30, 31]]
        # 3 and 9 tie for the best, 5, 12 and 20 for one place behind them.
        peaks = {4 * j + 1: 4.0 for j in (9, 3)} | {4 * j + 1: 3.0 for j in (20, 5, 12)}
        assert choose_at([peaks], 255, dtype, n=5) == [[0, 3, 5, 9, 31]]


@catches(
    "ties",
    "float64 scores are compared as they are",
    Rewritten(
        "nsa_kernels.pytorch:best_blocks",
        "$SCORES.float().nan_to_num(nan=0.0)",
        "$SCORES.nan_to_num(nan=0.0)",
    ),
)
def test_trap_ties_below_float32() -> None:
    """Scores are compared as float32, also in float64: what differs less is a tie."""
    peaks = {4 * 5 + 1: 3.0, 4 * 12 + 1: 3.0 + 1e-12}
    assert choose_at([peaks], 255, torch.float64, n=3) == [[0, 5, 31]]
    peaks = {4 * 5 + 1: 3.0, 4 * 12 + 1: 3.0 + 1e-4}
    assert choose_at([peaks], 255, torch.float64, n=3) == [[0, 12, 31]]


def in_the_order_of_scores(best: Any, scores: Tensor, num_selected: int) -> Tensor:
    return scores.topk(num_selected, dim=-1).indices


@catches(
    "index order changing bits",
    "indices stand in the order of scores",
    Replaced("nsa_kernels.pytorch:_best", in_the_order_of_scores),
)
def test_trap_index_order_changing_bits() -> None:
    """The same blocks chosen in any order of scores are one list, ascending, and one output."""
    position = 127
    best = [3, 11, 7, 5]
    orders = [best, best[::-1], sorted(best), [5, 3, 7, 11]]
    peaks = [{4 * j + 1: 6.0 - at for at, j in enumerate(order)} for order in orders]
    chosen = choose_at(peaks, position, torch.float32, n=6)
    assert chosen == [[0, 3, 5, 7, 11, 15]] * len(orders)
    q = torch.randn(1, 2, 8)
    k, v = torch.randn(position + 1, 1, 8), torch.randn(position + 1, 1, 8)
    outputs = [
        attend_selected(
            q,
            k,
            v,
            torch.tensor(blocks, dtype=torch.int32).view(1, 1, -1),
            one_document(1, position),
            position + 1,
        )[0]
        for blocks in chosen
    ]
    assert all(torch.equal(o, outputs[0]) for o in outputs)

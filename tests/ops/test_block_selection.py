"""The choice of blocks: against the oracle where scores are exact, by scores where they round."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments, get_backend
from nsa_kernels.reference import (
    block_scores,
    compressed_mask,
    masked_softmax,
    num_compressed,
    select_blocks,
)
from tests.ops.accuracy import plain_dtype
from tests.ops.op_cases import CASES, DTYPES, Case, Layout, case_id, fill, largest, random

BACKEND = get_backend("pytorch")


def choose(
    case: Case, segments: QuerySegments, q: Tensor, k: Tensor, init: int = 1, local: int = 2
) -> Tensor:
    """int32 [N, G, n] with the log-sum-exp that the compression branch finds."""
    blocks = {"block": case.block, "stride": case.stride, "scale": case.scale}
    _, lse = BACKEND.compressed_attention(q, k, k, segments, **blocks)
    return BACKEND.select_blocks(
        q,
        k,
        lse,
        segments,
        select_block=case.select_block,
        num_selected=case.num_selected,
        num_init_blocks=init,
        num_local_blocks=local,
        **blocks,
    )


def scores(case: Case, document: int, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, G, B] by the dense code in `dtype`, of the whole stream's q and compressed k."""
    tokens = slice(case.bounds[document], case.bounds[document + 1])
    keys = slice(case.compressed_bounds[document], case.compressed_bounds[document + 1])
    length = case.documents[document]
    mask = compressed_mask(length, case.block, case.stride, q.device)
    probs, _ = masked_softmax(q[tokens].to(dtype), k[keys].to(dtype), mask, case.scale)
    return block_scores(probs, case.options)


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q of the stream, compressed k of its documents."""
    count = case.compressed_bounds[-1]
    q = random(sum(case.documents), case.heads, case.key_width, dtype=dtype)
    return q, random(count, case.groups, case.key_width, dtype=dtype)


def assert_well_formed(
    case: Case, selected: Tensor, positions: Tensor, init: int, local: int
) -> None:
    """Ascending, eligible, no more and no fewer than there are, -1 at the end, the forced there."""
    eligible = positions // case.select_block + 1
    for row, count in zip(selected, eligible.tolist(), strict=True):
        for choice in row.tolist():
            chosen = choice[: min(case.num_selected, count)]
            assert chosen == sorted(set(chosen))
            assert chosen[0] >= 0
            assert chosen[-1] < count
            assert choice[len(chosen) :] == [-1] * (case.num_selected - len(chosen))
            forced = {*range(min(init, count)), *range(max(0, count - local), count)}
            assert forced <= set(chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_chosen_scores_are_the_highest(case: Case, dtype: torch.dtype) -> None:
    """Among blocks not forced, in float64: no unchosen one above a chosen one by more than tau,
    4 x the largest error of the plain code's scores in this dtype."""
    layout = Layout(case)
    q, k = make_inputs(case, dtype)
    selected = choose(case, layout.segments, q[case.local_rows], fill(k, layout.compressed_index))
    assert selected.dtype == torch.int32
    assert selected.shape == (case.run_bounds[-1], case.groups, case.num_selected)
    start = 0
    for document, position, length in case.local_runs:
        own = selected[start : start + length].long()
        start += length
        if not length:
            continue
        t = torch.arange(position, position + length)
        assert_well_formed(case, own, t, 1, 2)
        exact = scores(case, document, q, k, torch.float64)
        plain = scores(case, document, q, k, plain_dtype(dtype)).double()
        tau = 4 * (plain - exact).abs().max()
        exact = exact[position : position + length]
        num_blocks = exact.shape[-1]
        last = (t // case.select_block)[:, None, None]
        block = torch.arange(num_blocks)
        free = (block >= 1) & (block <= last - 2)
        chosen = torch.zeros(length, case.groups, num_blocks + 1, dtype=torch.bool)
        chosen.scatter_(-1, own.where(own >= 0, num_blocks), True)
        chosen = chosen[..., :-1]
        worst_chosen = exact.masked_fill(~(chosen & free), math.inf).amin(dim=-1)
        best_left = exact.masked_fill(chosen | ~free, -math.inf).amax(dim=-1)
        assert (best_left - worst_chosen <= tau).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(
    "case",
    [
        replace(CASES[0], key_width=16, num_selected=5),
        replace(CASES[2], key_width=16, num_selected=6),
        Case("no_overlap", (99, 64), block=4, stride=4, select_block=8, num_selected=5),
        Case("much_overlap", (99, 64), block=8, stride=1, select_block=8, num_selected=5),
    ],
    ids=case_id,
)
@pytest.mark.parametrize(("init", "local"), [(1, 2), (0, 1), (2, 1), (3, 2)])
def test_equals_the_oracle_where_scores_are_exact(
    case: Case, dtype: torch.dtype, init: int, local: int, small_tiles: None
) -> None:
    """Each head reads a channel of its own, in which some keys outshine all before them: the last
    of these has probability 1 to the bit, all others 0, and most blocks tie."""
    layout = Layout(case)
    group = case.heads // case.groups
    q = torch.zeros(sum(case.documents), case.groups, group, case.key_width, dtype=dtype)
    for r in range(group):
        q[:, :, r, r] = 2048.0
    q = q.flatten(1, 2)
    shape = case.compressed_bounds[-1], case.groups, case.key_width
    shines = torch.rand(shape) < 0.2
    k = torch.where(shines, torch.arange(shape[0])[:, None, None] + 1.0, -1.0).to(dtype)
    assert shape[0] < 256  # exact in bfloat16
    options = replace(case.options, num_init_blocks=init, num_local_blocks=local)
    expected = torch.cat(
        [
            select_blocks(scores(case, number, q, k, torch.float64), options)
            for number in range(len(case.documents))
        ]
    )[case.local_rows]
    keys = fill(k, layout.compressed_index)
    selected = choose(case, layout.segments, q[case.local_rows], keys, init, local)
    assert torch.equal(selected, expected)


def test_trap_ties() -> None:
    """All keys equal: every inner block scores the same, and the lowest win."""
    case = Case("one", (16 * 9,), block=4, stride=4, select_block=16, num_selected=5)
    for gain in (0.0, 0.3):  # 0.3: probabilities that no float holds
        q = torch.full((144, case.heads, case.key_width), gain)
        k = torch.full((36, case.groups, case.key_width), gain)
        selected = choose(case, QuerySegments.from_rows([(0, 144, 0, 0, 0, 0)]), q, k)
        # Complete blocks tie; the query's own may not be complete, and the first is forced.
        expected = torch.tensor([0, 1, 2, 7, 8], dtype=torch.int32)
        assert torch.equal(selected[143], expected.expand(case.groups, -1))
        assert torch.equal(selected[16 * 6, 0], torch.tensor([0, 1, 2, 5, 6], dtype=torch.int32))


def test_trap_k_larger_than_the_blocks_there_are() -> None:
    case = Case("one", (70,), num_selected=9)
    q, k = make_inputs(case, torch.float32)
    selected = choose(case, QuerySegments.from_rows([(0, 70, 0, 0, 0, 0)]), q, k)
    block = torch.arange(9, dtype=torch.int32)
    eligible = torch.arange(70)[:, None, None] // 16
    assert torch.equal(selected, block.where(block <= eligible, -1).expand(-1, 2, -1))


def test_trap_eq_9_sign() -> None:
    """Block j is touched by compression blocks 2j-1, 2j, 2j+1 (l = l' = 8, d = 4): the one before
    it counts for it too, and the one after it does not."""
    case = Case("one", (80,), heads=1, groups=1, block=8, stride=4, select_block=8, num_selected=3)
    q = torch.zeros(80, 1, case.key_width)
    q[..., 0] = 1000.0
    for shining, expected in ((7, [0, 3, 9]), (8, [0, 4, 9])):
        k = torch.zeros(num_compressed(80, 8, 4), 1, case.key_width)
        k[shining, 0, 0] = 1.0
        segments = QuerySegments.from_rows([(0, 80, 0, 0, 0, 0)])
        selected = choose(case, segments, q, k, init=1, local=1)
        # 7 is tokens 28..35, in blocks 3 and 4: a tie, and the lower one wins.
        assert selected[79, 0].tolist() == expected


@pytest.mark.parametrize("documents", [(0,), (1, 3, 2)], ids=str)
def test_documents_without_compressed_tokens(documents: tuple[int, ...]) -> None:
    case = Case("short", documents)
    q, k = make_inputs(case, torch.float32)
    selected = choose(case, Layout(case).segments, q, k)
    expected = torch.tensor([0, -1, -1, -1], dtype=torch.int32)
    assert torch.equal(selected, expected.expand(sum(documents), case.groups, -1))


@pytest.mark.parametrize("t", [0, 47, 48, 100, 149])
@pytest.mark.parametrize("value", ["huge", "inf", "nan"])
def test_future_and_other_documents_change_no_choice(value: str, t: int, small_tiles: None) -> None:
    case = Case("two", (150, 90))
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    keys = fill(k, layout.compressed_index)
    before = choose(case, layout.segments, q, keys)
    bad = {"huge": largest(torch.float32), "inf": math.inf, "nan": math.nan}[value]
    keys[layout.compressed_index * case.stride + case.block - 1 > t] *= -bad
    q[t + 1 :] *= -3
    after = choose(case, layout.segments, q, keys)
    assert torch.equal(before[: t + 1], after[: t + 1])
    # Whoever sees what is not finite still gets blocks that exist.
    assert_well_formed(case, after[:150].long(), torch.arange(150), 1, 2)


def test_has_no_gradient() -> None:
    case = Case("one", (100,))
    q, k = (x.requires_grad_() for x in make_inputs(case, torch.float32))
    selected = choose(case, QuerySegments.from_rows([(0, 100, 0, 0, 0, 0)]), q, k)
    assert not selected.requires_grad

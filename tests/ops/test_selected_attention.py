"""The selected branch against the oracle, over tables that mix own and fetched blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from nsa_kernels import QuerySegments
from tests.ops.accuracy import assert_2x
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import PYTORCH, BackendOnDevice, over, over_all
from tests.ops.op_cases import (
    CASES,
    DTYPES,
    Case,
    Layout,
    assert_unchanged_bits,
    case_id,
    largest,
    random_choice,
    same_bits,
)
from tests.ops.selected import (
    attend,
    check_against_the_oracle,
    make_inputs,
    plain_table,
    pool,
)
from tests.traps.mutation import Rewritten, catches

NARROW = [torch.float32, torch.bfloat16, torch.float16]
# Every R, l' and padded width of the kernels, with key and value widths that differ.
KERNEL_CASES = [
    Case("R1", (50,), heads=2, groups=2, key_width=64, value_width=64),
    Case("R2_packed", (1, 37, 0, 7, 21), key_width=16, value_width=32),
    Case("R3", (50,), heads=3, groups=1, key_width=80, value_width=64, num_selected=3),
    Case("R4", (75,), heads=8, groups=2, key_width=48, value_width=16, select_block=32),
    Case(
        "R8_pieces",
        (40, 200, 90),
        ((1, 37, 21), (1, 150, 20), (2, 0, 13), (2, 60, 1)),
        heads=8,
        groups=1,
        key_width=64,
        value_width=96,
        select_block=16,
        num_selected=5,
    ),
    Case("R12", (40,), heads=12, groups=1, key_width=96, value_width=80, num_selected=3),
    Case(
        "R16_end",
        (21, 290),
        ((1, 250, 40), (0, 0, 21)),
        heads=16,
        groups=1,
        key_width=64,
        value_width=64,
        select_block=64,
    ),
    Case("R32", (33,), heads=32, groups=1, key_width=32, value_width=128, num_selected=4),
    # So many keys a query that the tiles of a block are summed by themselves first.
    Case(
        "many_keys",
        (280,),
        ((0, 100, 17), (0, 240, 17)),
        heads=8,
        groups=1,
        value_width=16,
        select_block=128,
        num_selected=40,
    ),
]


@catches(
    "tail padding that drops keys",
    "a short last selection block counts as empty",
    Rewritten(
        "nsa_kernels.triton:_block_lists_kernel",
        "tl.load(block_lengths + $BASE + $J, mask=$M, other=0).to(tl.int32)",
        "tl.load(block_lengths + $BASE + $J, mask=$M, other=0).to(tl.int32) // C.BLOCK * C.BLOCK",
    ),
    case="triton-R1-float32",
)
@catches(
    "KV base pointer wrong with batches",
    "every document reads the blocks of the first",
    Rewritten(
        "nsa_kernels.triton:_block_lists_kernel",
        "block_rows + $HEAD * $STRIDE + $BASE",
        "block_rows + $HEAD * $STRIDE",
    ),
    case="triton-R2_packed-float32",
)
@catches(
    "unmasked dK/dV store",
    "a short block's gradients are stored as those of a whole one",
    Rewritten(
        "nsa_kernels.triton:_add_programs",
        "($N < $LENGTH)[:, None]",
        "($N < C.BLOCK)[:, None]",
    ),
    case="triton-R2_packed-float32",
)
@catches(
    "fp16 dq",
    "dq is added up over blocks in float16 in the selected branch",
    Rewritten(
        "nsa_kernels.triton:_add_dq",
        "add_dot($...ARGS)",
        "add_dot($...ARGS).to(tl.float16).to(tl.float32)",
    ),
    case="triton-R1-float32",
)
@over(
    "case, dtype",
    pytorch=product(CASES, DTYPES),
    triton=product(KERNEL_CASES, KERNEL_DTYPES),
)
def test_against_the_oracle(backend: BackendOnDevice, case: Case, dtype: torch.dtype) -> None:
    check_against_the_oracle(backend, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=case_id)
def test_many_tiles(dtype: torch.dtype, small_tiles: None) -> None:
    check_against_the_oracle(PYTORCH, Case("many", (300, 41), groups=1), dtype)


def test_more_runs_than_are_added_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query a tile and a run: 171 summands in the gradients of a block."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", 1)
    check_against_the_oracle(PYTORCH, Case("more", (130, 41), groups=1), torch.float32)


def test_cases_have_fetched_blocks_and_blocks_left_out() -> None:
    case = CASES[2]
    layout = Layout(case)
    selected = random_choice(case)[case.local_rows]
    table = layout.block_table(selected)
    num_own = table.own_index.shape[0]
    for g in range(case.groups):
        assert (table.block_rows[g] >= num_own).sum() >= 3
        assert (table.block_rows[g] == -1).sum() >= 3
    last = selected[99]  # of a document of 25 blocks
    assert (last >= 0).all()
    assert torch.equal(table.block_lengths.unique(), torch.tensor([0, 2, 8]))


@over(
    "case, dtype",
    pytorch=[(CASES[2], torch.float32)],
    triton=[
        (
            Case("pieces", (40, 60), ((1, 7, 30), (0, 0, 5)), heads=6, value_width=16),
            torch.float16,
        )
    ],
)
def test_one_head_at_a_time(backend: BackendOnDevice, case: Case, dtype: torch.dtype) -> None:
    """A slice of the KV heads, as the flow hands them over, gives the bits of the whole call."""
    layout = Layout(case)
    selected = random_choice(case)[case.local_rows]
    table = layout.block_table(selected)
    inputs, _ = make_inputs(case, dtype)
    q, (own, fetched) = inputs[0][case.local_rows], pool(table, inputs)
    o, lse = attend(backend, case, layout.segments, table, q, own, fetched, selected)
    group = case.heads // case.groups
    for g in range(case.groups):
        heads, head = slice(g * group, (g + 1) * group), slice(g, g + 1)
        part_o, part_lse = attend(
            backend,
            case,
            layout.segments,
            replace(table, block_rows=table.block_rows[head]),
            q[:, heads],
            (own[0][:, head], own[1][:, head]),
            (fetched[0][:, head], fetched[1][:, head]),
            selected[:, head],
        )
        assert same_bits(part_o, o[:, heads])
        assert same_bits(part_lse, lse[:, heads])


@catches(
    "block visible one token early",
    "a query sees the token after it in its own block",
    Rewritten(
        "nsa_kernels.triton.selected:_forward_kernel",
        "$POSITION + $TOKEN + 1 - ($FIRST + $I // $TILES) * C.BLOCK",
        "$POSITION + $TOKEN + 2 - ($FIRST + $I // $TILES) * C.BLOCK",
    ),
    case="triton-huge-float32-0",
)
@pytest.mark.usefixtures("small_tiles")
@over(
    "value, dtype, t",
    pytorch=product(["huge", "inf", "nan"], NARROW, [0, 15, 16, 70, 149]),
    triton=product(["huge"], KERNEL_DTYPES, [0, 16, 37]),
)
def test_future_others_and_their_choices_change_no_bit(
    backend: BackendOnDevice, value: str, dtype: torch.dtype, t: int
) -> None:
    case = Case("two", (150, 40))
    if backend is not PYTORCH:
        case = Case("two", (50, 20), value_width=16)
    bad = {"huge": largest(dtype), "inf": math.inf, "nan": math.nan}[value]
    layout = Layout(case)
    selected, other_choice = random_choice(case), random_choice(case, seed=1)
    table = layout.block_table(torch.cat([selected, other_choice], dim=-1))
    inputs, _ = make_inputs(case, dtype)
    q, (own, fetched) = inputs[0], pool(table, inputs)

    def disturb() -> None:
        for keys, values, index in [
            (*own, table.own_index),
            *((fetched[0][:, g], fetched[1][:, g], table.fetched_index[g]) for g in (0, 1)),
        ]:
            keys[index > t] *= -bad
            values[index > t] = bad
        q[t + 1 :] *= -3
        selected[t + 1 :] = other_choice[t + 1 :]

    assert_unchanged_bits(
        lambda: attend(backend, case, layout.segments, table, q, own, fetched, selected),
        disturb,
        slice(0, t + 1),
    )


@pytest.mark.parametrize("value", [largest(torch.float32), math.nan], ids=["huge", "nan"])
def test_blocks_not_chosen_change_no_bit(value: float) -> None:
    case = Case("one", (150,), num_selected=3)
    layout = Layout(case)
    selected = random_choice(case)
    table = layout.block_table(selected)
    (q, k, v), _ = make_inputs(case, torch.float32)
    (k_own, k_fetched), (v_own, v_fetched) = table.fill(k), table.fill(v)
    t = 149
    unchosen = sorted(set(range(10)) - set(selected[t].flatten().tolist()))
    assert unchosen

    def disturb() -> None:
        for j in unchosen:
            for keys, values, index in [
                (k_own, v_own, table.own_index),
                *((k_fetched[:, g], v_fetched[:, g], table.fetched_index[g]) for g in (0, 1)),
            ]:
                keys[index // 16 == j] = value
                values[index // 16 == j] = value

    assert_unchanged_bits(
        lambda: attend(
            PYTORCH,
            case,
            layout.segments,
            table,
            q,
            (k_own, v_own),
            (k_fetched, v_fetched),
            selected,
        ),
        disturb,
        slice(t, t + 1),
    )


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("value", [largest(torch.float32), math.inf, math.nan], ids=str)
def test_trap_nan_left_behind_in_a_masked_tile(value: float, where: str) -> None:
    """The query's own block holds NaN behind the query: no NaN in it or in its gradients, nor in
    those of keys that no query sees."""
    case = Case("one", (64,), ((0, 0, 45),))
    segments = QuerySegments.from_rows([(0, 45, 0, 0, 0, 0)])
    selected = random_choice(case)[:45]
    (q, k, v), grad_o = make_inputs(case, torch.float32)
    q = q[:45]
    grad_o[40:] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    nothing = [x.detach()[:0] for x in (k, v)]
    results = []
    for bad in (0.5, value):
        with torch.no_grad():
            (k if where == "keys" else v)[40] = bad
        o, lse = PYTORCH.ops.selected_attention(
            *leaves,
            *nothing,
            selected,
            *plain_table(64, case),
            segments,
            select_block=16,
            scale=0.2,
        )
        dq, dk, dv = torch.autograd.grad(o, leaves, grad_o)
        results.append((o[:40], lse[:40], dq[:40], dk[45:], dv[45:]))
    if not math.isfinite(value):
        assert o[40:].isnan().all()
        assert lse[40:].isnan().all()
        assert dq[40:].isnan().any(dim=-1).all()
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_trap_fully_masked_rows() -> None:
    """A query without any block: 0, -inf, no gradient; its neighbours as ever.

    Their outputs bit for bit. Their gradients come of products with all queries of a block, whose
    rows a BLAS may add up otherwise where they are fewer: by the rule, against float64.
    """
    case = Case("one", (50,))
    segments = QuerySegments.from_rows([(0, 50, 0, 0, 0, 0)])
    full = random_choice(case)
    (q, k, v), grad_o = make_inputs(case, torch.float32)
    nothing = [x[:0] for x in (k, v)]
    cut = full.clone()
    cut[20] = -1
    results = []
    for selected, dtype in ((full, torch.float32), (cut, torch.float32), (full, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o, lse = PYTORCH.ops.selected_attention(
            *leaves,
            *(x.to(dtype) for x in nothing),
            selected,
            *plain_table(50, case),
            segments,
            select_block=16,
            scale=0.2,
        )
        results.append((o, lse, torch.autograd.grad(o, leaves[0], grad_o.to(dtype))[0]))
    others = torch.arange(50) != 20
    plain, (o, lse, dq), exact = results
    assert torch.equal(o[others], plain[0][others])
    assert torch.equal(lse[others], plain[1][others])
    assert_2x(dq[others], plain[2][others], exact[2][others], torch.float32, "dq")
    assert not o[20].any()
    assert not dq[20].any()
    assert torch.equal(lse[20], torch.full((4,), -math.inf))


def test_trap_unmasked_store_past_a_short_block() -> None:
    """Rows behind the end of a document's last block get no gradient, the zero row's least."""
    case = Case("one", (21,), heads=2, groups=1)
    segments = QuerySegments.from_rows([(0, 21, 0, 0, 0, 0)])
    (q, k, v), grad_o = make_inputs(case, torch.float64)
    k, v = (torch.cat([x, torch.full_like(x[:11], math.nan)]).requires_grad_() for x in (k, v))
    selected = random_choice(case)
    o, _ = PYTORCH.ops.selected_attention(
        q, k, v, k.detach()[:0], v.detach()[:0], selected, *plain_table(21, case), segments,
        select_block=16, scale=0.2,
    )  # fmt: skip
    for grad in torch.autograd.grad(o, (k, v), grad_o):
        assert grad[:21].isfinite().all()
        assert torch.equal(grad[21:], torch.zeros_like(grad[21:]))


def test_a_chosen_block_that_is_not_here_is_an_error() -> None:
    case = Case("one", (50,))
    segments = QuerySegments.from_rows([(0, 50, 0, 0, 0, 0)])
    (q, k, v), _ = make_inputs(case, torch.float32)
    rows, lengths = plain_table(50, case)
    rows = rows.clone()
    rows[1, 2] = -1
    with pytest.raises(AssertionError, match="block 2 was chosen and is not here"):
        PYTORCH.ops.selected_attention(
            q, k, v, k[:0], v[:0], random_choice(case), rows, lengths, segments,
            select_block=16, scale=0.2,
        )  # fmt: skip


@over_all
@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("blocks", [0, 2])
def test_nothing_chosen(backend: BackendOnDevice, queries: int, blocks: int) -> None:
    """No query, or queries without a block: o = 0, and gradients of zeros for all inputs."""
    rows = 16 * blocks
    shapes = [(queries, 4, 16), (rows, 2, 16), (rows, 2, 32), (0, 2, 16), (0, 2, 32)]
    leaves = [torch.randn(shape, device=backend.device, requires_grad=True) for shape in shapes]
    selected = torch.full((queries, 2, 3), -1, dtype=torch.int32)
    block_rows = torch.arange(0, rows, 16).repeat(2, 1)
    o, lse = backend.ops.selected_attention(
        *leaves,
        *(x.to(backend.device) for x in (selected, block_rows, torch.full((blocks,), 16))),
        QuerySegments.from_rows([(0, queries, 0, 0, 0, 0)], backend.device),
        select_block=16,
        scale=1.0,
    )
    assert o.shape == (queries, 4, 32)
    assert not o.any()
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    for leaf, grad in zip(leaves, torch.autograd.grad(o.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))

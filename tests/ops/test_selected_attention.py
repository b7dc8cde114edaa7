"""The selection branch against the oracle, over tables that mix own and fetched blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments, get_backend
from tests.ops.accuracy import assert_2x
from tests.ops.op_cases import (
    CASES,
    DTYPES,
    BlockTable,
    Case,
    Layout,
    assert_attention,
    assert_unchanged_bits,
    case_id,
    largest,
    masks,
    random,
    random_choice,
)

BACKEND = get_backend("pytorch")


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v of the whole stream and the gradient of the local outputs."""
    tokens = sum(case.documents)
    q = random(tokens, case.heads, case.key_width, dtype=dtype)
    k = random(tokens, case.groups, case.key_width, dtype=dtype)
    v = random(tokens, case.groups, case.value_width, dtype=dtype)
    grad_o = random(case.run_bounds[-1], case.heads, case.value_width, dtype=dtype)
    return (q, k, v), grad_o


def attend(
    case: Case,
    layout: Layout,
    table: BlockTable,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    fetched: tuple[Tensor, Tensor],
    selected: Tensor,
) -> tuple[Tensor, Tensor]:
    return BACKEND.selected_attention(
        q,
        *own,
        *fetched,
        selected,
        table.block_rows,
        table.block_lengths,
        layout.segments,
        select_block=case.select_block,
        scale=case.scale,
    )


def plain_table(length: int, case: Case) -> tuple[Tensor, Tensor]:
    """block_rows, block_lengths of one document that is all own."""
    rows = torch.arange(0, length, case.select_block)
    return rows.expand(case.groups, -1), (length - rows).clamp(max=case.select_block)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype) -> None:
    layout = Layout(case)
    choice = random_choice(case)
    selected = choice[case.local_rows]
    table = layout.block_table(selected)
    inputs, grad_o = make_inputs(case, dtype)
    q = inputs[0][case.local_rows]
    (k_own, k_fetched), (v_own, v_fetched) = (table.fill(x) for x in inputs[1:])
    leaves = [x.requires_grad_() for x in (q, k_own, v_own, k_fetched, v_fetched)]
    o, lse = attend(case, layout, table, q, (k_own, v_own), (k_fetched, v_fetched), selected)
    dq, *grads = torch.autograd.grad(o, leaves, grad_o)
    assert all(x.dtype == dtype for x in (dq, *grads))
    tokens = inputs[1].shape[0]
    dk = table.collect(grads[0], grads[2], tokens)
    dv = table.collect(grads[1], grads[3], tokens)
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_attention(case, ours, masks(case, "selected", choice), case.bounds, inputs, grad_o)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=case_id)
def test_many_tiles(dtype: torch.dtype, small_tiles: None) -> None:
    test_against_the_oracle(Case("many", (300, 41), groups=1), dtype)


def test_more_runs_than_are_added_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query a tile and a run: 171 summands in the gradients of a block."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", 1)
    test_against_the_oracle(Case("more", (130, 41), groups=1), torch.float32)


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


def test_one_head_at_a_time() -> None:
    """A slice of the KV heads, as the flow hands them over, gives the bits of the whole call."""
    case = CASES[2]
    layout = Layout(case)
    selected = random_choice(case)[case.local_rows]
    table = layout.block_table(selected)
    (q, k, v), _ = make_inputs(case, torch.float32)
    q = q[case.local_rows]
    (k_own, k_fetched), (v_own, v_fetched) = table.fill(k), table.fill(v)
    o, lse = attend(case, layout, table, q, (k_own, v_own), (k_fetched, v_fetched), selected)
    group = case.heads // case.groups
    for g in range(case.groups):
        heads, head = slice(g * group, (g + 1) * group), slice(g, g + 1)
        part_o, part_lse = BACKEND.selected_attention(
            q[:, heads],
            k_own[:, head],
            v_own[:, head],
            k_fetched[:, head],
            v_fetched[:, head],
            selected[:, head],
            table.block_rows[head],
            table.block_lengths,
            layout.segments,
            select_block=case.select_block,
            scale=case.scale,
        )
        assert torch.equal(part_o, o[:, heads])
        assert torch.equal(part_lse, lse[:, heads])


@pytest.mark.parametrize("t", [0, 15, 16, 70, 149])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("value", ["huge", "inf", "nan"])
def test_future_others_and_their_choices_change_no_bit(
    value: str, dtype: torch.dtype, t: int, small_tiles: None
) -> None:
    case = Case("two", (150, 40))
    layout = Layout(case)
    selected = random_choice(case)
    other_choice = random_choice(case, seed=1)
    table = layout.block_table(torch.cat([selected, other_choice], dim=-1)[: sum(case.documents)])
    (q, k, v), _ = make_inputs(case, dtype)
    (k_own, k_fetched), (v_own, v_fetched) = table.fill(k), table.fill(v)
    bad = {"huge": largest(dtype), "inf": math.inf, "nan": math.nan}[value]

    def run() -> tuple[Tensor, Tensor]:
        return attend(case, layout, table, q, (k_own, v_own), (k_fetched, v_fetched), selected)

    def disturb() -> None:
        for keys, values, index in [
            (k_own, v_own, table.own_index),
            *((k_fetched[:, g], v_fetched[:, g], table.fetched_index[g]) for g in (0, 1)),
        ]:
            keys[index > t] *= -bad
            values[index > t] = bad
        q[t + 1 :] *= -3
        selected[t + 1 :] = other_choice[t + 1 :]

    assert_unchanged_bits(run, disturb, slice(0, t + 1))


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
        lambda: attend(case, layout, table, q, (k_own, v_own), (k_fetched, v_fetched), selected),
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
        o, lse = BACKEND.selected_attention(
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
        o, lse = BACKEND.selected_attention(
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
    o, _ = BACKEND.selected_attention(
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
        BACKEND.selected_attention(
            q, k, v, k[:0], v[:0], random_choice(case), rows, lengths, segments,
            select_block=16, scale=0.2,
        )  # fmt: skip


def test_nothing_anywhere() -> None:
    """No query, no row, no block, and still gradients of zeros for all inputs."""
    shapes = [(0, 4, 8), (0, 2, 8), (0, 2, 6), (0, 2, 8), (0, 2, 6)]
    leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    selected = torch.zeros(0, 2, 3, dtype=torch.int32)
    rows, lengths = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    segments = QuerySegments.from_rows([])
    o, lse = BACKEND.selected_attention(
        *leaves, selected, rows, lengths, segments, select_block=16, scale=1.0
    )
    assert o.shape == (0, 4, 6)
    assert lse.shape == (0, 4)
    for leaf, grad in zip(leaves, torch.autograd.grad(o.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape

"""The window branch against the oracle, and what its queries must not notice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments, get_backend
from tests.ops.op_cases import (
    CASES,
    DTYPES,
    Case,
    Layout,
    assert_attention,
    assert_unchanged_bits,
    case_id,
    collect,
    fill,
    largest,
    masks,
    random,
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


def attend(case: Case, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return BACKEND.window_attention(q, k, v, layout.segments, window=case.window, scale=case.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype) -> None:
    layout = Layout(case)
    inputs, grad_o = make_inputs(case, dtype)
    q = inputs[0][case.local_rows].requires_grad_()
    k, v = (fill(x, layout.window_index).requires_grad_() for x in inputs[1:])
    o, lse = attend(case, layout, q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), grad_o)
    assert (dq.dtype, dk.dtype, dv.dtype) == (dtype, dtype, dtype)
    dk, dv = (collect(x, layout.window_index, inputs[1].shape[0]) for x in (dk, dv))
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_attention(case, ours, masks(case, "window"), case.bounds, inputs, grad_o)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200])
def test_many_tiles(window: int, small_tiles: None) -> None:
    test_against_the_oracle(Case("tiles", (130, 67), window=window), torch.float32)


def test_negative_window_base() -> None:
    """The last ten tokens of a document and the window before them are all there is."""
    length, window = 100, 7
    q, k, v = (torch.randn(length, 1, 8, dtype=torch.float64) for _ in range(3))
    whole = QuerySegments.from_rows([(0, length, 0, 0, 0, 0)])
    part = QuerySegments.from_rows([(0, 10, 90, 0, 0, -84)])
    assert part.rows[0].window_base < 0
    o, lse = BACKEND.window_attention(q, k, v, whole, window=window, scale=0.3)
    some_o, some_lse = BACKEND.window_attention(
        q[90:], k[84:], v[84:], part, window=window, scale=0.3
    )
    torch.testing.assert_close(some_o, o[90:], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(some_lse, lse[90:], rtol=1e-14, atol=1e-14)


def test_first_query_sees_itself_alone() -> None:
    q, k, v = (torch.randn(5, 2, 4) for _ in range(3))
    segments = QuerySegments.from_rows([(0, 5, 0, 0, 0, 0)])
    o, lse = BACKEND.window_attention(q, k, v, segments, window=3, scale=0.5)
    assert torch.equal(o[0], v[0])
    torch.testing.assert_close(lse[0], 0.5 * (q[0] * k[0]).sum(-1))


@pytest.mark.parametrize("t", [0, 63, 77, 149])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("value", ["huge", "inf", "nan"])
def test_future_and_other_documents_change_no_bit(
    value: str, dtype: torch.dtype, t: int, small_tiles: None
) -> None:
    case = Case("two", (150, 40))
    layout = Layout(case)
    (q, k, v), _ = make_inputs(case, dtype)
    k, v = fill(k, layout.window_index), fill(v, layout.window_index)
    bad = {"huge": largest(dtype), "inf": math.inf, "nan": math.nan}[value]

    def disturb() -> None:
        later = layout.window_index > t  # of its document, and the whole other one
        k[later] *= -bad
        v[later] = bad
        q[t + 1 :] *= -3

    assert_unchanged_bits(lambda: attend(case, layout, q, k, v), disturb, slice(0, t + 1))


def test_tokens_that_left_the_window_change_no_bit(small_tiles: None) -> None:
    case = Case("one", (150,))
    layout = Layout(case)
    (q, k, v), _ = make_inputs(case, torch.float32)
    k, v = fill(k, layout.window_index), fill(v, layout.window_index)

    def disturb() -> None:
        left = (layout.window_index >= 0) & (layout.window_index < 100 - case.window + 1)
        k[left], v[left] = largest(torch.float32), math.nan

    assert_unchanged_bits(lambda: attend(case, layout, q, k, v), disturb, slice(100, None))


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("value", [largest(torch.float32), math.inf, math.nan], ids=str)
def test_trap_nan_left_behind_in_a_masked_tile(value: float, where: str) -> None:
    """Of a token that is not finite, nothing reaches the outputs and gradients of queries that do
    not see it, nor the gradients of keys that no query who sees it sees."""
    q, k, v = (torch.randn(60, 2, 8, requires_grad=True) for _ in range(3))
    segments = QuerySegments.from_rows([(0, 60, 0, 0, 0, 0)])
    grad_o = torch.randn(60, 2, 8)
    results = []
    for bad in (0.5, value):
        with torch.no_grad():
            (k if where == "keys" else v)[30] = bad  # seen by 30..36
        o, lse = BACKEND.window_attention(q, k, v, segments, window=7, scale=0.3)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), grad_o)
        unaware = torch.cat([torch.arange(30), torch.arange(37, 60)])
        unseen = torch.cat([torch.arange(24), torch.arange(37, 60)])
        results.append((o[unaware], lse[unaware], dq[unaware], dk[unseen], dv[unseen]))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_not_finite_shows_in_those_who_see_it() -> None:
    q, k, v = (torch.randn(9, 1, 4) for _ in range(3))
    v[4, 0, 2] = math.inf
    segments = QuerySegments.from_rows([(0, 9, 0, 0, 0, 0)])
    o, lse = BACKEND.window_attention(q, k, v, segments, window=3, scale=0.5)
    sees = torch.tensor([4 <= t < 7 for t in range(9)])
    assert torch.equal(o.isnan().all(dim=-1)[:, 0], sees)
    assert torch.equal(lse.isnan()[:, 0], sees)

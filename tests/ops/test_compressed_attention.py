"""The compression branch's attention against the oracle, and what its queries must not notice."""

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
    """q of the stream, compressed k, v of its documents, the gradient of the local outputs."""
    count = case.compressed_bounds[-1]
    q = random(sum(case.documents), case.heads, case.key_width, dtype=dtype)
    k = random(count, case.groups, case.key_width, dtype=dtype)
    v = random(count, case.groups, case.value_width, dtype=dtype)
    grad_o = random(case.run_bounds[-1], case.heads, case.value_width, dtype=dtype)
    return (q, k, v), grad_o


def attend(case: Case, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return BACKEND.compressed_attention(
        q, k, v, layout.segments, block=case.block, stride=case.stride, scale=case.scale
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype) -> None:
    layout = Layout(case)
    inputs, grad_o = make_inputs(case, dtype)
    q = inputs[0][case.local_rows].requires_grad_()
    k, v = (fill(x, layout.compressed_index).requires_grad_() for x in inputs[1:])
    o, lse = attend(case, layout, q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), grad_o)
    assert (dq.dtype, dk.dtype, dv.dtype) == (dtype, dtype, dtype)
    dk, dv = (collect(x, layout.compressed_index, inputs[1].shape[0]) for x in (dk, dv))
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    seen = masks(case, "compressed")
    assert_attention(case, ours, seen, case.compressed_bounds, inputs, grad_o)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=case_id)
def test_more_tiles_than_are_added_in_a_row(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query a tile: 383 tiles, 6 pieces in pairs of pairs."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", 1)
    test_against_the_oracle(Case("long", (390,), heads=2, groups=1), dtype)


def test_trap_block_visible_one_token_early() -> None:
    """Values are an identity: the output shows who sees which block."""
    case = Case("one", (60,), heads=1, groups=1, key_width=4, value_width=14)
    assert case.compressed_bounds == [0, 14]
    layout = Layout(case)
    q, k = torch.randn(60, 1, 4), torch.randn(14, 1, 4)
    v = torch.eye(14)[:, None]
    k, v = fill(k, layout.compressed_index), fill(v, layout.compressed_index)
    o, _ = attend(case, layout, q, k, v)
    last_token = torch.arange(14) * 4 + 7
    assert torch.equal(o[:, 0] > 0, last_token <= torch.arange(60)[:, None])


@pytest.mark.parametrize("position", [0, 5, 6, 7, 8, 40])
def test_trap_inverted_compression_mask(position: int) -> None:
    """Gradients of one query reach the blocks that ended before it, and no other."""
    case = Case("one", (60,), ((0, position, 1),), heads=2)
    layout = Layout(case)
    (q, k, v), grad_o = make_inputs(case, torch.float64)
    k, v = (fill(x, layout.compressed_index).requires_grad_() for x in (k, v))
    o, lse = attend(case, layout, q[position : position + 1], k, v)
    dv = torch.autograd.grad(o, v, grad_o)[0]
    reached = dv.abs().sum(dim=(1, 2)) > 0
    block = layout.compressed_index
    assert torch.equal(reached, (block >= 0) & (block * 4 + 7 <= position))
    assert bool(lse.isinf().all()) == (position < 7)


def test_trap_fully_masked_rows() -> None:
    """The first l - 1 queries see no block: 0, -inf, no gradient, and the others as ever."""
    case = Case("one", (30,))
    layout = Layout(case)
    (q, k, v), grad_o = make_inputs(case, torch.float32)
    q = q.requires_grad_()
    k, v = fill(k, layout.compressed_index), fill(v, layout.compressed_index)
    o, lse = attend(case, layout, q, k, v)
    dq = torch.autograd.grad(o, q, grad_o)[0]
    blind = case.block - 1
    assert not o[:blind].any()
    assert not dq[:blind].any()
    assert o[blind:].all()
    assert dq[blind + case.stride :].all()  # those between see one block: o is its value
    assert torch.equal(lse[:blind], torch.full((blind, case.heads), -math.inf))
    assert lse[blind:].isfinite().all()


@pytest.mark.parametrize("documents", [(5,), (3, 7, 2), (0,)], ids=str)
def test_trap_zero_compression_windows(documents: tuple[int, ...]) -> None:
    """Documents shorter than a block: no compressed key anywhere, gradients of zeros."""
    case = Case("short", documents)
    (q, k, v), grad_o = make_inputs(case, torch.float32)
    assert k.shape[0] == 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = attend(case, Layout(case), *leaves)
    assert not o.any()
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    for x, grad in zip(leaves, torch.autograd.grad(o, leaves, grad_o), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_trap_finite_mask_value_leaks_future() -> None:
    """Logits of seen blocks far below any mask value: the future must still weigh nothing."""
    q = torch.ones(40, 1, 2)
    k, v = torch.full((9, 1, 2), -1e30), torch.eye(9)[:, None]
    k[5:] = 1e30
    o, lse = BACKEND.compressed_attention(
        q, k, v, QuerySegments.from_rows([(0, 40, 0, 0, 0, 0)]), block=8, stride=4, scale=1.0
    )
    for t in range(7, 27):
        seen = (t - 7) // 4 + 1
        torch.testing.assert_close(o[t, 0], (torch.arange(9) < seen) / seen)
    assert torch.equal(lse[7:27], torch.full((20, 1), -2e30))


@pytest.mark.parametrize("t", [6, 7, 10, 11, 63, 149])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("value", ["huge", "inf", "nan"])
def test_future_and_other_documents_change_no_bit(
    value: str, dtype: torch.dtype, t: int, small_tiles: None
) -> None:
    """A token that overflows in the compressor makes its compressed token inf or NaN."""
    case = Case("two", (150, 40))
    layout = Layout(case)
    (q, k, v), _ = make_inputs(case, dtype)
    k, v = fill(k, layout.compressed_index), fill(v, layout.compressed_index)
    bad = {"huge": largest(dtype), "inf": math.inf, "nan": math.nan}[value]

    def disturb() -> None:
        later = layout.compressed_index * case.stride + case.block - 1 > t
        k[later] *= -bad
        v[later] = bad
        q[t + 1 :] *= -3

    assert_unchanged_bits(lambda: attend(case, layout, q, k, v), disturb, slice(0, t + 1))


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("value", [largest(torch.float32), math.inf, math.nan], ids=str)
def test_trap_nan_left_behind_in_a_masked_tile(value: float, where: str) -> None:
    """NaN in a block that some queries of a tile see: the outputs and gradients of the others are
    what they are without that block."""
    case = Case("one", (40,))
    layout = Layout(case)
    (q, k, v), grad_o = make_inputs(case, torch.float32)
    grad_o[20:] = 0
    q = q.requires_grad_()
    results = []
    for bad in (0.5, value):
        (k if where == "keys" else v)[4:] = bad  # seen from 4*4 + 7 = 23 on
        keys, values = fill(k, layout.compressed_index), fill(v, layout.compressed_index)
        o, lse = attend(case, layout, q, keys, values)
        dq = torch.autograd.grad(o, q, grad_o)[0]
        results.append((o[:23], lse[:23], dq[:23]))
    if not math.isfinite(value):
        assert o[23:].isnan().all()
        assert lse[23:].isnan().all()
        assert dq[23:].isnan().any(dim=-1).all()
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_trap_kv_base_with_batches() -> None:
    """Two documents in one call are each document alone."""
    case = Case("two", (50, 50))
    layout = Layout(case)
    (q, k, v), _ = make_inputs(case, torch.float64)
    keys, values = fill(k, layout.compressed_index), fill(v, layout.compressed_index)
    o, lse = attend(case, layout, q, keys, values)
    alone = Case("one", (50,))
    for document in (0, 1):
        tokens = slice(50 * document, 50 * document + 50)
        blocks = slice(11 * document, 11 * document + 11)
        alone_layout = Layout(alone)
        some_k, some_v = (fill(x[blocks], alone_layout.compressed_index) for x in (k, v))
        alone_o, alone_lse = attend(alone, alone_layout, q[tokens], some_k, some_v)
        assert torch.equal(o[tokens], alone_o)
        assert torch.equal(lse[tokens], alone_lse)

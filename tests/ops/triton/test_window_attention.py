"""The window branch in Triton against the oracle, and what its queries must not notice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nsa_kernels import QuerySegments
from nsa_kernels.triton import window_attention
from tests.ops.op_cases import Case, assert_unchanged_bits, case_id, largest
from tests.ops.triton.banded import (
    CASES,
    Branch,
    assert_same,
    check_against_the_oracle,
    check_bits_of_a_split,
    check_empty,
    check_grad_mode,
    check_strides,
    small_pieces,
)
from tests.ops.triton.conftest import DEVICE, DTYPES, INTERPRETED, natively_all
from tests.ops.triton.guard import far_apart
from tests.traps.mutation import Rewritten, catches

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
BITS = Case("bits", (150,), heads=6, groups=2, key_width=16, value_width=16, window=41)


@catches(
    "KV base pointer wrong with batches",
    "every KV head reads the keys of the first",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "k + $HEAD.to(tl.int64) * $STRIDE",
        "k",
    ),
    case="one_document-float32",
)
@catches(
    "fp16 dq",
    "dq is added up over tiles in float16 in the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton:_dq_tiles",
        "add_dot($...ARGS)",
        "add_dot($...ARGS).to(tl.float16).to(tl.float32)",
    ),
    case="one_document-float32",
)
@catches(
    "NaN left behind in a masked tile",
    "masked rows of keys and values hold whatever was there",
    Rewritten(
        "nsa_kernels.triton:load_rows", "tl.load($P, mask=$M, other=0.0)", "tl.load($P, mask=$M)"
    ),
    case="one_document-float32",
)
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype) -> None:
    check_against_the_oracle("window", case, dtype)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 65, 129])
def test_windows(window: int) -> None:
    case = Case("tiles", (130, 67), heads=3, groups=1, value_width=16, window=window)
    check_against_the_oracle("window", case, torch.float32)


@every_dtype
@pytest.mark.parametrize("window", [20, 100])
def test_more_tiles_than_are_added_in_a_row(
    window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    case = Case("long", (150, 100), heads=16, groups=1, value_width=16, window=window)
    check_against_the_oracle("window", case, dtype)


@every_dtype
@pytest.mark.usefixtures("_same_bits_in_any_row")
@pytest.mark.parametrize("pieces", [False, True], ids=["short", "pieces"])
@pytest.mark.parametrize("window", [41, 150])
def test_bits_do_not_depend_on_the_split(
    window: int, pieces: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        small_pieces(monkeypatch)
    check_bits_of_a_split("window", replace(BITS, window=window), dtype)


@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
def test_gradients_repeat(dtype: torch.dtype) -> None:
    branch = Branch("window", CASES[2])
    inputs, grad_o = branch.inputs(dtype)
    buffers = branch.buffers(inputs)
    assert_same(branch.results(buffers, grad_o), branch.results(buffers, grad_o))


@every_dtype
def test_views_of_any_strides(dtype: torch.dtype) -> None:
    check_strides("window", dtype)


def test_no_query_or_key() -> None:
    check_empty("window")


def test_grad_mode() -> None:
    check_grad_mode("window")


@catches(
    "int32 offsets",
    "KV heads are int32 in the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "k + $HEAD.to(tl.int64) * $STRIDE",
        "k + $HEAD * $STRIDE",
    ),
    case="heads",
)
@pytest.mark.skipif(not INTERPRETED, reason="what overflows shows in the interpreter")
@pytest.mark.parametrize("strides", [(1 << 28, 16, 1), (16, 1 << 30, 1)], ids=["rows", "heads"])
def test_offsets_past_two_to_the_31(strides: tuple[int, int, int]) -> None:
    branch = Branch("window", Case("one", (20,), heads=8, groups=4, value_width=16, window=9))
    inputs, grad_o = branch.inputs(torch.float32)
    buffers = branch.buffers(inputs)
    expected = branch.results(buffers, grad_o)
    apart = tuple(far_apart(x.detach(), *strides).requires_grad_() for x in buffers)
    assert_same(branch.results(apart, far_apart(grad_o, *strides)), expected)  # type: ignore[arg-type]


def test_negative_window_base() -> None:
    """The last ten tokens of a document and the window before them are all there is."""
    length, window = 100, 7
    q, k, v = (torch.randn(length, 1, 16, device=DEVICE) for _ in range(3))
    whole = QuerySegments.from_rows([(0, length, 0, 0, 0, 0)], DEVICE)
    part = QuerySegments.from_rows([(0, 10, 90, 0, 0, -84)], DEVICE)
    o, lse = window_attention(q, k, v, whole, window=window, scale=0.3)
    some_o, some_lse = window_attention(q[90:], k[84:], v[84:], part, window=window, scale=0.3)
    torch.testing.assert_close(some_o, o[90:])
    torch.testing.assert_close(some_lse, lse[90:])


def test_first_query_sees_itself_alone() -> None:
    q, k, v = (torch.randn(5, 2, 16, device=DEVICE) for _ in range(3))
    segments = QuerySegments.from_rows([(0, 5, 0, 0, 0, 0)], DEVICE)
    o, lse = window_attention(q, k, v, segments, window=3, scale=0.5)
    assert torch.equal(o[0], v[0])
    torch.testing.assert_close(lse[0], 0.5 * (q[0] * k[0]).sum(-1))


@every_dtype
@pytest.mark.parametrize("t", [63, 77])
def test_future_and_other_documents_change_no_bit(t: int, dtype: torch.dtype) -> None:
    branch = Branch("window", Case("two", (150, 40), value_width=16))
    q, k, v = (x.detach() for x in branch.buffers(branch.inputs(dtype)[0]))
    other = (branch.index >= branch.key_bounds[1]).to(DEVICE)

    def disturb() -> None:
        later = (branch.index > t).to(DEVICE)  # of its document, and the whole other one
        k[later] *= -largest(dtype)
        v[later] = largest(dtype)
        k[other], v[other] = math.inf, math.nan
        q[t + 1 :] *= -3

    assert_unchanged_bits(lambda: branch.attend(q, k, v), disturb, slice(0, t + 1))


def test_tokens_that_left_the_window_change_no_bit() -> None:
    branch = Branch("window", Case("one", (150,), value_width=16))
    q, k, v = (x.detach() for x in branch.buffers(branch.inputs(torch.float32)[0]))

    def disturb() -> None:
        left = (branch.index >= 0) & (branch.index < 100 - branch.case.window + 1)
        k[left.to(DEVICE)] = v[left.to(DEVICE)] = largest(torch.float32)

    assert_unchanged_bits(lambda: branch.attend(q, k, v), disturb, slice(100, None))

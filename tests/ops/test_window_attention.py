"""The window branch against the oracle, and what its queries must not notice."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from nsa_kernels import QuerySegments
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import PYTORCH, BackendOnDevice, over
from tests.ops.banded import KERNEL_CASES, Branch, check_against_the_oracle
from tests.ops.op_cases import CASES, DTYPES, Case, assert_unchanged_bits, largest
from tests.traps.mutation import Rewritten, catches

NARROW = [torch.float32, torch.bfloat16, torch.float16]
TILES = Case("tiles", (130, 67))
KERNEL_TILES = Case("tiles", (130, 67), heads=3, groups=1, value_width=16)


@catches(
    "KV base pointer wrong with batches",
    "every KV head reads the keys of the first",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "k.p + $HEAD.to(tl.int64) * $STRIDE",
        "k.p",
    ),
    case="triton-one_document-float32",
)
@catches(
    "fp16 dq",
    "dq is added up over tiles in float16 in the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton:_dq_tiles",
        "add_dot($...ARGS)",
        "add_dot($...ARGS).to(tl.float16).to(tl.float32)",
    ),
    case="triton-one_document-float32",
)
@catches(
    "NaN left behind in a masked tile",
    "masked rows of keys and values hold whatever was there",
    Rewritten(
        "nsa_kernels.triton:load_rows", "tl.load($P, mask=$M, other=0.0)", "tl.load($P, mask=$M)"
    ),
    case="triton-one_document-float32",
)
@over(
    "case, dtype",
    pytorch=product(CASES, DTYPES),
    triton=product(KERNEL_CASES, KERNEL_DTYPES),
)
def test_against_the_oracle(backend: BackendOnDevice, case: Case, dtype: torch.dtype) -> None:
    check_against_the_oracle(backend, "window", case, dtype)


@pytest.mark.usefixtures("small_tiles")
@over("window", pytorch=(1, 2, 63, 64, 65, 200), triton=(1, 2, 31, 32, 33, 64, 65, 129))
def test_windows(backend: BackendOnDevice, window: int) -> None:
    """Around the widths of tiles, and longer than a document."""
    case = replace(TILES if backend is PYTORCH else KERNEL_TILES, window=window)
    check_against_the_oracle(backend, "window", case, torch.float32)


@over(
    "dtype, width, tolerance",
    pytorch=[(torch.float64, 8, {"rtol": 1e-14, "atol": 1e-14})],
    triton=[(torch.float32, 16, {})],
)
def test_negative_window_base(
    backend: BackendOnDevice, dtype: torch.dtype, width: int, tolerance: dict[str, float]
) -> None:
    """The last ten tokens of a document and the window before them are all there is."""
    length, window = 100, 7
    q, k, v = (torch.randn(length, 1, width, dtype=dtype, device=backend.device) for _ in range(3))
    whole = QuerySegments.from_rows([(0, length, 0, 0, 0, 0)], backend.device)
    part = QuerySegments.from_rows([(0, 10, 90, 0, 0, -84)], backend.device)
    assert part.rows[0].window_base < 0
    o, lse = backend.ops.window_attention(q, k, v, whole, window=window, scale=0.3)
    some_o, some_lse = backend.ops.window_attention(
        q[90:], k[84:], v[84:], part, window=window, scale=0.3
    )
    torch.testing.assert_close(some_o, o[90:], **tolerance)
    torch.testing.assert_close(some_lse, lse[90:], **tolerance)


@over("width", pytorch=[4], triton=[16])
def test_first_query_sees_itself_alone(backend: BackendOnDevice, width: int) -> None:
    q, k, v = (torch.randn(5, 2, width, device=backend.device) for _ in range(3))
    segments = QuerySegments.from_rows([(0, 5, 0, 0, 0, 0)], backend.device)
    o, lse = backend.ops.window_attention(q, k, v, segments, window=3, scale=0.5)
    assert torch.equal(o[0], v[0])
    torch.testing.assert_close(lse[0], 0.5 * (q[0] * k[0]).sum(-1))


@pytest.mark.usefixtures("small_tiles")
@over(
    "value, dtype, t",
    pytorch=product(["huge", "inf", "nan"], NARROW, [0, 63, 77, 149]),
    triton=product(["huge"], KERNEL_DTYPES, [63, 77]),
)
def test_future_and_other_documents_change_no_bit(
    backend: BackendOnDevice, value: str, dtype: torch.dtype, t: int
) -> None:
    """The others' tokens are infinite and NaN in kernels, whatever the later ones are."""
    width = 12 if backend is PYTORCH else 16
    branch = Branch(backend, "window", Case("two", (150, 40), value_width=width))
    q, k, v = (x.detach() for x in branch.buffers(branch.inputs(dtype)[0]))
    bad = {"huge": largest(dtype), "inf": math.inf, "nan": math.nan}[value]
    other = (branch.index >= branch.key_bounds[1]).to(backend.device)

    def disturb() -> None:
        later = (branch.index > t).to(backend.device)  # of its document, and the whole other one
        k[later] *= -bad
        v[later] = bad
        if backend is not PYTORCH:
            k[other], v[other] = math.inf, math.nan
        q[t + 1 :] *= -3

    assert_unchanged_bits(lambda: branch.attend(q, k, v), disturb, slice(0, t + 1))


@pytest.mark.usefixtures("small_tiles")
@over(
    "width, value",
    pytorch=[(12, math.nan)],
    triton=[(16, largest(torch.float32))],
)
def test_tokens_that_left_the_window_change_no_bit(
    backend: BackendOnDevice, width: int, value: float
) -> None:
    branch = Branch(backend, "window", Case("one", (150,), value_width=width))
    q, k, v = (x.detach() for x in branch.buffers(branch.inputs(torch.float32)[0]))

    def disturb() -> None:
        left = (branch.index >= 0) & (branch.index < 100 - branch.case.window + 1)
        k[left.to(backend.device)] = largest(torch.float32)
        v[left.to(backend.device)] = value

    assert_unchanged_bits(lambda: branch.attend(q, k, v), disturb, slice(100, None))


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
        o, lse = PYTORCH.ops.window_attention(q, k, v, segments, window=7, scale=0.3)
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
    o, lse = PYTORCH.ops.window_attention(q, k, v, segments, window=3, scale=0.5)
    sees = torch.tensor([4 <= t < 7 for t in range(9)])
    assert torch.equal(o.isnan().all(dim=-1)[:, 0], sees)
    assert torch.equal(lse.isnan()[:, 0], sees)

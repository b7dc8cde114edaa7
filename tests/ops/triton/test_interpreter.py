"""What the tests do to Triton's interpreter gives the bits that it gives by itself."""

from __future__ import annotations

from functools import reduce
from operator import xor

import pytest
import torch
import triton
import triton.language as tl

from tests.ops.backends import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="there is no interpreter")


@triton.jit
def _combine_kernel(x, rows, columns, kept, whole, sort, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    tl.store(rows + o_m, tl.xor_sum(b_x, 1))
    tl.store(columns + o_n, tl.xor_sum(b_x, 0))
    b_kept = tl.xor_sum(b_x, 1, keep_dims=True)
    tl.store(kept + o_m[:, None] * N + o_n[None, :], b_x ^ b_kept)
    tl.store(whole, tl.xor_sum(b_x, None))
    tl.store(sort + o_m[:, None] * N + o_n[None, :], tl.sort(b_x, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_combining_by_xor(dtype: torch.dtype) -> None:
    m, n, ends = 8, 16, torch.iinfo(dtype)
    x = torch.randint(ends.min, ends.max, (m, n), dtype=dtype)
    rows, columns, whole = (torch.empty(size, dtype=dtype) for size in (m, n, 1))
    kept, sort = torch.empty_like(x), torch.empty_like(x)
    _combine_kernel[(1,)](x, rows, columns, kept, whole, sort, M=m, N=n)
    expected = [reduce(xor, row) for row in x.tolist()]
    assert rows.tolist() == expected
    assert columns.tolist() == [reduce(xor, column) for column in x.T.tolist()]
    assert whole.tolist() == [reduce(xor, expected)]
    assert torch.equal(kept, x ^ torch.tensor(expected, dtype=dtype)[:, None])
    assert torch.equal(sort, x.sort(dim=1).values)

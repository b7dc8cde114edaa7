"""Products of rows with a matrix: right, and each row for itself."""

from __future__ import annotations

import pytest
import torch

from nsa_kernels.triton.rows import multiply_rows
from tests.ops.accuracy import assert_2x
from tests.ops.backends import DEVICE, DTYPES, INTERPRETED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(5, 48, 1), (1, 80, 97), (70, 64, 130)])
def test_products(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    for each in (None, bias):
        given = (x, weight, each)
        found = multiply_rows(*(None if t is None else t.to(DEVICE) for t in given)).cpu()
        plain = torch.nn.functional.linear(*given)
        exact = torch.nn.functional.linear(*(None if t is None else t.double() for t in given))
        assert found.dtype == dtype
        assert_2x(found, plain, exact, dtype, "product")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: the interpreter's products are a BLAS's")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_has_the_bits_it_has_among_others(dtype: torch.dtype) -> None:
    x = torch.randn(300, 1024, device=DEVICE, dtype=dtype)
    weight = torch.randn(513, 1024, device=DEVICE, dtype=dtype)
    together = multiply_rows(x, weight)
    for count in (1, 2, 7, 64, 129):
        for start in (0, 1, 63, 170):
            found = multiply_rows(x[start : start + count].clone(), weight)
            assert torch.equal(found, together[start : start + count])

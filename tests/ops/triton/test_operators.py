"""What holds for all operators of every backend alike, natively: repeatable bits, precision."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import DTYPES, TRITON
from tests.ops.op_cases import case_id
from tests.ops.test_operators import (
    assert_same_bits,
    every_operator,
    inputs,
    reduced_precision,
    results,
)


@pytest.mark.gpu
@every_operator
def test_float32_products_are_ieee_on_matrix_units(name: str) -> None:
    leaves = inputs(TRITON, name)
    expected = results(TRITON, name, leaves)
    with reduced_precision():
        found = results(TRITON, name, leaves)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    assert_same_bits(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@every_operator
def test_the_same_bits_in_every_run(name: str, dtype: torch.dtype) -> None:
    leaves = inputs(TRITON, name, dtype)
    first = results(TRITON, name, leaves)
    for _ in range(3):
        assert_same_bits(results(TRITON, name, leaves), first)

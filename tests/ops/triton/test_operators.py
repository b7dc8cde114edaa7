"""What holds for all operators of every backend alike: repeatable bits, graphs, precision."""

from __future__ import annotations

import pytest
import torch

from nsa_kernels import get_backend
from tests.ops import test_operators
from tests.ops.op_cases import case_id
from tests.ops.test_operators import (
    test_an_input_without_gradient_costs_nothing_else,
    test_forward_bits_do_not_depend_on_grad_mode,
    test_recomputation_gives_the_same_bits,
    test_several_forwards_before_their_backwards,
)
from tests.ops.triton.conftest import DEVICE, DTYPES

__all__ = [
    "test_an_input_without_gradient_costs_nothing_else",
    "test_forward_bits_do_not_depend_on_grad_mode",
    "test_recomputation_gives_the_same_bits",
    "test_several_forwards_before_their_backwards",
]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_operators, "BACKEND", get_backend("triton"))
    monkeypatch.setattr(test_operators, "DEVICE", DEVICE)
    monkeypatch.setattr(test_operators, "OPERATORS", test_operators._operators(DEVICE))


@test_operators.every_operator
def test_autocast(name: str) -> None:
    test_operators.test_autocast_changes_nothing(name, torch.float32)


@pytest.mark.gpu
@test_operators.every_operator
def test_float32_products_are_ieee_on_matrix_units(name: str) -> None:
    test_operators.test_float32_products_stay_ieee(name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@test_operators.every_operator
def test_the_same_bits_in_every_run(name: str, dtype: torch.dtype) -> None:
    leaves = test_operators.inputs(name, dtype)
    first = test_operators.results(name, leaves)
    for _ in range(3):
        test_operators.assert_same_bits(test_operators.results(name, leaves), first)

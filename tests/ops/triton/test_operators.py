"""What holds for all operators of every backend alike: repeatable bits, graphs, precision."""

from __future__ import annotations

import pytest
import torch

from nsa_kernels import get_backend
from tests.ops import test_operators
from tests.ops.test_operators import (
    test_an_input_without_gradient_costs_nothing_else,
    test_forward_bits_do_not_depend_on_grad_mode,
    test_recomputation_gives_the_same_bits,
    test_several_forwards_before_their_backwards,
)
from tests.ops.triton.conftest import INTERPRETED

__all__ = [
    "test_an_input_without_gradient_costs_nothing_else",
    "test_forward_bits_do_not_depend_on_grad_mode",
    "test_recomputation_gives_the_same_bits",
    "test_several_forwards_before_their_backwards",
]

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tensors of the host")


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_operators, "BACKEND", get_backend("triton"))


@test_operators.every_operator
def test_autocast(name: str) -> None:
    test_operators.test_autocast_changes_nothing(name, torch.float32)

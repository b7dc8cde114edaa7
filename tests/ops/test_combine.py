"""The gated sum against the oracle's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_kernels import get_backend
from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.op_cases import DTYPES, case_id, random, same_bits

BACKEND = get_backend("pytorch")


def dense(outputs: list[Tensor], gates: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The sum and the gradients of outputs and gates, in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in (*outputs, gates)]
    weights = leaves[-1].unsqueeze(-2).unbind(-1)
    o = torch.stack([w * x for w, x in zip(weights, leaves, strict=False)]).sum(dim=0)
    return [o, *torch.autograd.grad(o, leaves, grad.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("queries", [0, 1, 37])
def test_against_the_oracle(queries: int, branches: int, dtype: torch.dtype) -> None:
    outputs = [random(queries, 4, 6, dtype=dtype) for _ in range(branches)]
    gates = random(queries, 4, branches, dtype=dtype).sigmoid()
    grad = random(queries, 4, 6, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (*outputs, gates)]
    o = BACKEND.combine(leaves[:-1], leaves[-1])
    ours = [o, *torch.autograd.grad(o, leaves, grad)]
    exact = dense(outputs, gates, grad, torch.float64)
    plain = dense(outputs, gates, grad, plain_dtype(dtype))
    names = ["o", *(f"d output {b}" for b in range(branches)), "d gates"]
    for name, x, y, z in zip(names, ours, plain, exact, strict=True):
        assert x.dtype == dtype
        assert_2x(x, y, z, dtype, name, heads=True)


def test_gates_in_float32_over_outputs_in_bfloat16() -> None:
    outputs = [random(9, 2, 4, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    gates = torch.rand(9, 2, 3, requires_grad=True)
    o = BACKEND.combine(outputs, gates)
    expected = sum(gates[..., b, None] * x.float() for b, x in enumerate(outputs))
    assert same_bits(o, expected.to(torch.bfloat16))
    *_, grad_gates = torch.autograd.grad(o.float().sum(), [*outputs, gates])
    assert grad_gates.dtype == torch.float32


def test_a_gate_of_zero_silences_its_branch() -> None:
    outputs = [torch.randn(3, 1, 2) for _ in range(2)]
    gates = torch.tensor([[[1.0, 0.0]]]).expand(3, 1, 2)
    assert torch.equal(BACKEND.combine(outputs, gates), outputs[0])

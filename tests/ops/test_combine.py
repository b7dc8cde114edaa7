"""The gated sum against the oracle's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import PYTORCH, BackendOnDevice, over
from tests.ops.op_cases import DTYPES, random, same_bits


def dense(outputs: list[Tensor], gates: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The sum and the gradients of outputs and gates, in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in (*outputs, gates)]
    weights = leaves[-1].unsqueeze(-2).unbind(-1)
    o = torch.stack([w * x for w, x in zip(weights, leaves, strict=False)]).sum(dim=0)
    return [o, *torch.autograd.grad(o, leaves, grad.to(dtype))]


def run(
    backend: BackendOnDevice, outputs: list[Tensor], gates: Tensor, grad: Tensor
) -> list[Tensor]:
    """The sum and the gradients of outputs and gates."""
    leaves = [x.detach().requires_grad_() for x in (*outputs, gates)]
    o = backend.ops.combine(leaves[:-1], leaves[-1])
    return [o, *torch.autograd.grad(o, leaves, grad)]


def assert_combines(
    backend: BackendOnDevice, outputs: list[Tensor], gates: Tensor, grad: Tensor
) -> None:
    dtype = outputs[0].dtype
    ours = run(backend, outputs, gates, grad)
    exact = dense(outputs, gates, grad, torch.float64)
    plain = dense(outputs, gates, grad, plain_dtype(dtype))
    names = ["o", *(f"d output {b}" for b in range(len(outputs))), "d gates"]
    if gates.dtype != dtype:
        plain[-1] = plain[-1].to(gates.dtype)
    coarsest = max(dtype, gates.dtype, key=lambda x: torch.finfo(x).eps)
    for name, x, y, z in zip(names, ours, plain, exact, strict=True):
        assert x.dtype == (gates.dtype if name == "d gates" else dtype)
        assert_2x(x, y, z, coarsest if name == "d gates" else dtype, name, heads=True)


def make(
    backend: BackendOnDevice,
    queries: int,
    branches: int,
    dtype: torch.dtype,
    heads: int,
    width: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs of branches, gates and the gradient of the sum."""
    device = backend.device
    outputs = [random(queries, heads, width, dtype=dtype).to(device) for _ in range(branches)]
    gates = random(queries, heads, branches, dtype=dtype).sigmoid().to(device)
    return outputs, gates, random(queries, heads, width, dtype=dtype).to(device)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("queries", [0, 1, 37])
@over(
    "dtype, heads, width",
    pytorch=product(DTYPES, [4], [6]),
    triton=product(KERNEL_DTYPES, [3], [48]),
)
def test_against_the_oracle(
    backend: BackendOnDevice,
    dtype: torch.dtype,
    heads: int,
    width: int,
    queries: int,
    branches: int,
) -> None:
    assert_combines(backend, *make(backend, queries, branches, dtype, heads, width))


def test_gates_in_float32_over_outputs_in_bfloat16() -> None:
    outputs = [random(9, 2, 4, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    gates = torch.rand(9, 2, 3, requires_grad=True)
    o = PYTORCH.ops.combine(outputs, gates)
    expected = sum(gates[..., b, None] * x.float() for b, x in enumerate(outputs))
    assert same_bits(o, expected.to(torch.bfloat16))
    *_, grad_gates = torch.autograd.grad(o.float().sum(), [*outputs, gates])
    assert grad_gates.dtype == torch.float32


@over("heads, width", pytorch=[(1, 2)], triton=[(3, 48)])
def test_a_gate_of_zero_silences_its_branch(
    backend: BackendOnDevice, heads: int, width: int
) -> None:
    outputs = [torch.randn(3, heads, width, device=backend.device) for _ in range(2)]
    gates = torch.tensor([[[1.0, 0.0]]], device=backend.device).expand(3, heads, 2)
    assert torch.equal(backend.ops.combine(outputs, gates), outputs[0])

"""Branches that take their gate: the gradients of g o and of g, against the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels.backend import gated_branches
from tests.ops import selected
from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import INTERPRETED, PYTORCH, BackendOnDevice, over, over_all
from tests.ops.banded import KERNEL_CASES, Branch
from tests.ops.op_cases import (
    CASES,
    DTYPES,
    NO_QUERY,
    Case,
    Layout,
    assert_attention,
    collect,
    dense_attention,
    masks,
    random,
    random_choice,
    same_bits,
)

BANDED = ("compressed", "window")


def gates_of(case: Case, powers: bool = False) -> Tensor:
    """[N, H, 3] of both signs, and 0 for some queries in the second column.

    From 0.5 to 1 elsewhere: where few queries have all the weight, few roundings are compared. Or
    powers of two, which leave every rounding of float32 as it is.
    """
    signs, sizes = (random(case.run_bounds[-1], case.heads, 3, dtype=torch.float32) for _ in "ab")
    gates = signs.sign() * (sizes.sign().exp2() if powers else 0.5 + 0.5 * sizes.sigmoid())
    gates[1::7, :, 1] = 0
    return gates


def assert_gated(
    case: Case,
    found: dict[str, Tensor],
    of: tuple[list[Tensor], list[int]],
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    gate: Tensor,
) -> None:
    """found: o, lse, dq, dk, dv and dgate; of: the masks and the bounds of keys."""
    dgate = found.pop("dgate")
    gated = gate.double()[..., None] * grad.double()
    assert_attention(case, found, *of, inputs, gated)
    assert_dgate(case, dgate, of, inputs, grad, gate)


def assert_dgate(
    case: Case,
    dgate: Tensor,
    of: tuple[list[Tensor], list[int]],
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    gate: Tensor,
) -> None:
    dtype = inputs[0].dtype
    gated = gate.double()[..., None] * grad.double()
    plain, exact = (
        (dense_attention(case, *of, inputs, gated, x)["o"].to(x) * grad.to(x)).sum(-1)
        for x in (plain_dtype(dtype), torch.float64)
    )
    assert dgate.dtype == gate.dtype
    coarsest = max(dtype, gate.dtype, key=lambda x: torch.finfo(x).eps)
    # Of all runs and heads: few queries would compare one rounding with another.
    assert_2x(dgate, plain, exact, coarsest, "dgate")


def _kernel_rows() -> list[Any]:
    """Where kernels are interpreted, few: float32, which they compute in, has all cases below."""
    few = ("packed", "sixteen")  # A padded ratio and widths, and whole tiles of heads.
    rows = product(KERNEL_CASES, [x for x in KERNEL_DTYPES if x != torch.float32])
    return [
        pytest.param(*row, marks=[pytest.mark.slow] * (INTERPRETED and row[0].name not in few))
        for row in rows
    ]


@pytest.mark.parametrize("name", BANDED)
@over("case, dtype", pytorch=product([*CASES, NO_QUERY], DTYPES), triton=_kernel_rows())
def test_band(backend: BackendOnDevice, case: Case, dtype: torch.dtype, name: str) -> None:
    branch = Branch(backend, name, case)
    inputs, grad = branch.inputs(dtype)
    buffers, gates = branch.buffers(inputs), gates_of(case)
    gate = gates.to(backend.device)[..., 1].requires_grad_()
    o, lse, summand = branch.attend(*buffers, gate=gate)
    assert not o.requires_grad
    assert summand.shape == o.shape and summand.dtype == o.dtype
    assert all(same_bits(x, y) for x, y in zip((o, lse), branch.attend(*buffers), strict=True))
    leaves = (*buffers, gate)
    dq, dk, dv, dgate = torch.autograd.grad(summand, leaves, grad.to(backend.device))
    names = ("o", "lse", "dq", "dk", "dv", "dgate")
    found = dict(zip(names, (x.cpu() for x in (o, lse, dq, dk, dv, dgate)), strict=True))
    for key in ("dk", "dv"):
        found[key] = collect(found[key], branch.index, inputs[1].shape[0])
    assert_gated(case, found, (masks(case, name), branch.key_bounds), inputs, grad, gates[..., 1])


@pytest.mark.parametrize("name", BANDED)
@over("case", pytorch=[], triton=KERNEL_CASES)
def test_band_in_float32(backend: BackendOnDevice, case: Case, name: str) -> None:
    """Gates that are powers of two: the gradients that the branch without its gate has of g do."""
    branch = Branch(backend, name, case)
    inputs, grad = branch.inputs(torch.float32)
    buffers, gate = branch.buffers(inputs), gates_of(case, powers=True)[..., 1]
    do, given = grad.to(backend.device), gate.to(backend.device).requires_grad_()
    summand = branch.attend(*buffers, gate=given)[2]
    *grads, dgate = torch.autograd.grad(summand, (*buffers, given), do)
    o, _ = branch.attend(*buffers)
    expected = torch.autograd.grad(o, buffers, do * given.detach()[..., None])
    for x, y in zip(grads, expected, strict=True):
        assert torch.equal(x, y)  # Not to the bit: 0 and -0.
    assert_dgate(case, dgate.cpu(), (masks(case, name), branch.key_bounds), inputs, grad, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, NO_QUERY], ids=lambda case: case.name)
def test_selected(case: Case, dtype: torch.dtype) -> None:
    inputs, grad = selected.make_inputs(case, dtype)
    gates, layout = gates_of(case), Layout(case)
    chosen = random_choice(case)
    choice = chosen[case.local_rows]
    table = layout.block_table(choice)
    sources = selected.pool(table, inputs)
    gate = gates[..., 1].requires_grad_()
    leaves = [x.requires_grad_() for x in (inputs[0][case.local_rows], *sources[0], *sources[1])]
    o, lse, summand = PYTORCH.ops.selected_attention(
        *leaves, choice, table.block_rows, table.block_lengths, layout.segments,
        select_block=case.select_block, scale=case.scale, gate=gate,
    )  # fmt: skip
    assert not o.requires_grad
    dq, *grads, dgate = torch.autograd.grad(summand, [*leaves, gate], grad)
    tokens = inputs[1].shape[0]
    found = {"o": o, "lse": lse, "dq": dq, "dgate": dgate}
    found["dk"] = table.collect(grads[0], grads[2], tokens)
    found["dv"] = table.collect(grads[1], grads[3], tokens)
    of = masks(case, "selected", chosen), case.bounds
    assert_gated(case, found, of, inputs, grad, gates[..., 1].detach())


@over("width", pytorch=[8], triton=[16])
def test_the_sum_hands_its_gradient_on_uncopied(backend: BackendOnDevice, width: int) -> None:
    """To each summand, of all heads or of some; branches without one are weighed as ever."""
    shape, device = (9, 4, width), backend.device
    outputs = [torch.randn(shape, device=device) for _ in range(3)]
    gates = torch.randn(9, 4, 3, device=device).requires_grad_()
    plain = outputs[2].clone().requires_grad_()
    whole = torch.empty(shape, device=device).requires_grad_()
    parts = [torch.empty(9, n, width, device=device).requires_grad_() for n in (1, 3)]
    out = backend.ops.combine([*outputs[:2], plain], gates, [[whole], parts, []])
    leaves = [whole, *parts, plain, gates]
    seen: list[Tensor] = []
    for leaf in (whole, *parts):
        leaf.register_hook(seen.append)
    do = torch.randn(shape, device=device)
    dwhole, *dparts, dplain, dgates = torch.autograd.grad(out, leaves, do)
    start = do.data_ptr()
    size = do.element_size() * width
    assert {x.data_ptr() for x in seen} == {start, start + size}
    assert torch.equal(dwhole, do)
    assert torch.equal(torch.cat(dparts, dim=1), do)
    assert not dgates[..., :2].any()

    expected = backend.ops.combine([*outputs[:2], plain], gates)
    assert same_bits(out, expected)
    dplain_of_all, dgates_of_all = torch.autograd.grad(expected, [plain, gates], do)
    assert same_bits(dplain, dplain_of_all)
    assert same_bits(dgates[..., 2].contiguous(), dgates_of_all[..., 2].contiguous())


def _names(backend: BackendOnDevice) -> list[str]:
    ops = backend.ops
    functions: dict[str, Callable[..., object]] = {
        "compressed": ops.compressed_attention,
        "selected": ops.selected_attention,
        "window": ops.window_attention,
    }
    return [name for name, f in functions.items() if "gate" in f.__code__.co_varnames]


@over_all
def test_gated_branches_are_those_whose_functions_take_a_gate(
    backend: BackendOnDevice,
) -> None:
    assert list(gated_branches(backend.ops)) == _names(backend)


def test_a_backend_without_gated_branches_has_none() -> None:
    class Older:
        name = "older"

    assert gated_branches(Older()) == ()  # type: ignore[arg-type]

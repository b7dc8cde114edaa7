"""The kernels of the gated sum: every width, strides, places and offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import test_combine
from tests.ops.backends import DEVICE, DTYPES, INTERPRETED, TRITON, natively_all
from tests.ops.op_cases import case_id, same_bits
from tests.ops.triton.guard import far_apart
from tests.traps.mutation import Rewritten, catches


def run(outputs: list[Tensor], gates: Tensor, grad: Tensor) -> list[Tensor]:
    return test_combine.run(TRITON, outputs, gates, grad)


def assert_combines(outputs: list[Tensor], gates: Tensor, grad: Tensor) -> None:
    test_combine.assert_combines(TRITON, outputs, gates, grad)


def make(
    queries: int, branches: int, dtype: torch.dtype, heads: int = 3, width: int = 48
) -> tuple[list[Tensor], Tensor, Tensor]:
    return test_combine.make(TRITON, queries, branches, dtype, heads, width)


@pytest.mark.parametrize("dtype", natively_all(torch.float16), ids=case_id)
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 192, 256])
def test_widths(width: int, dtype: torch.dtype) -> None:
    assert_combines(*make(70, 2, dtype, heads=2, width=width))


@pytest.mark.parametrize("gates_dtype", [torch.float32, torch.float16], ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_gates_of_another_dtype(dtype: torch.dtype, gates_dtype: torch.dtype) -> None:
    outputs, gates, grad = make(9, 3, dtype)
    assert_combines(outputs, gates.to(gates_dtype), grad)


@pytest.mark.parametrize("gates_dtype", [torch.float32, torch.float16], ids=case_id)
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_are_added_as_combine_does(count: int, gates_dtype: torch.dtype) -> None:
    """The bits of a sum with gates of 1 and of torch's stack, from any strides."""
    grads, gates, _ = make(37, count, torch.float16)
    grads, of_gates = [x.detach() for x in grads], gates.detach().to(gates_dtype).unbind(-1)
    found = TRITON.ops.add_gradients(grads, of_gates)
    expected = [TRITON.ops.combine(grads, torch.ones_like(gates)), torch.stack(of_gates, dim=-1)]
    assert [same_bits(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 2


def test_gates_of_all_tokens_are_one_row() -> None:
    """Static gates are expanded over tokens; their gradient is that of every token's own."""
    outputs, gates, grad = make(37, 3, torch.float32)
    expanded = gates[:1].expand_as(gates)
    found = run(outputs, expanded, grad)
    expected = run(outputs, expanded.contiguous(), grad)
    assert [same_bits(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 5


@pytest.mark.parametrize("dtype", natively_all(torch.float16), ids=case_id)
def test_views_of_any_strides(dtype: torch.dtype) -> None:
    outputs, gates, grad = make(21, 2, dtype)
    expected = run(outputs, gates, grad)
    fused = torch.full((21, 3, 5 * 48), torch.nan, dtype=dtype, device=DEVICE)
    views = [fused[..., 48 * i : 48 * (i + 1)] for i in (1, 3)]
    for view, output in zip(views, outputs, strict=True):
        view.copy_(output)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in outputs]
    channels_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in outputs]
    moved_gates = gates.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    moved_grad = grad.transpose(0, 2).contiguous().transpose(0, 2)
    for given in (views, heads_first, channels_first):
        found = run(given, moved_gates, moved_grad)
        assert [same_bits(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 4


def test_a_gradient_of_one_number_for_all() -> None:
    outputs, gates, _ = make(5, 2, torch.float32)
    one = torch.ones((), device=DEVICE).expand(5, 3, 48)
    found, expected = run(outputs, gates, one), run(outputs, gates, one.contiguous())
    assert [same_bits(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
def test_a_row_does_not_depend_on_where_it_stands(dtype: torch.dtype) -> None:
    outputs, gates, grad = make(90, 3, dtype)
    whole = run(outputs, gates, grad)
    for part in (slice(0, 7), slice(7, 64), slice(64, 90)):
        found = run([x[part] for x in outputs], gates[part], grad[part])
        assert [same_bits(x, y[part]) for x, y in zip(found, whole, strict=True)] == [True] * 5


@catches(
    "int32 offsets",
    "rows are int32 where branches are combined",
    Rewritten(
        "nsa_kernels.triton.combine:_rows_of_program",
        "tl.program_id(0).to(tl.int64)",
        "tl.program_id(0)",
    ),
    case="rows",
)
@pytest.mark.skipif(not INTERPRETED, reason="what overflows shows in the interpreter")
@pytest.mark.parametrize("strides", [(1 << 28, 48, 1), (48, 1 << 30, 1)], ids=["rows", "heads"])
def test_offsets_past_two_to_the_31(strides: tuple[int, int, int]) -> None:
    outputs, gates, grad = make(11, 2, torch.float16)
    expected = run(outputs, gates, grad)
    apart = [far_apart(x, *strides) for x in outputs]
    found = run(apart, far_apart(gates, *strides[:2], 1), far_apart(grad, *strides))
    assert [same_bits(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 4

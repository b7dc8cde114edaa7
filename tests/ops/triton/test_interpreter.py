"""What the tests do to Triton's interpreter gives the bits that it gives by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from importlib.util import find_spec, module_from_spec
from itertools import product
from operator import xor
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

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


@triton.jit
def _mixed_kernel(x, n, sums, quotients, more, fewer, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    o_mn = o_m[:, None] * N + o_n[None, :]
    b_x, b_n = tl.load(x + o_mn), tl.load(n + o_n)
    tl.static_assert(b_x.dtype == tl.float16 and (b_x + b_x).dtype == tl.float16)
    tl.static_assert((b_x / b_x).dtype == tl.float32 and (b_n + b_x).dtype == tl.float16)
    tl.static_assert((b_n * b_n).dtype == tl.int32 and (b_n < 2).dtype == tl.int1)
    tl.static_assert((b_n + b_n.to(tl.int64)).dtype == tl.int64)
    tl.static_assert(b_x.shape[0] == M and b_n[None, :].shape[1] == N and b_n.numel == N)
    tl.store(sums + o_mn, b_x + b_x)
    tl.store(quotients + o_mn, b_x / (b_x + 2))
    tl.store(more + o_mn, b_x.to(tl.float32) + b_n[None, :] * 2)
    tl.store(fewer + o_mn, tl.where(b_n[None, :] < o_m[:, None], b_x, -1.0))


def test_dtypes_and_shapes_of_results() -> None:
    m, n = 4, 8
    x, y = torch.rand(m, n).half(), torch.arange(n, dtype=torch.int32)
    sums, fewer = torch.empty_like(x), torch.empty_like(x)
    quotients, more = torch.empty(m, n), torch.empty(m, n)
    _mixed_kernel[(1,)](x, y, sums, quotients, more, fewer, M=m, N=n)
    assert torch.equal(sums, x + x)
    assert torch.equal(quotients, x.float() / (x + 2).float())
    assert torch.equal(more, x.float() + y * 2)
    assert torch.equal(fewer, torch.where(y < torch.arange(m)[:, None], x, -1.0))


def test_types_of_equal_sizes_share_their_shape_and_nothing_else() -> None:
    first, second = tl.block_type(tl.float32, [4, 8]), tl.block_type(tl.int32, [4, 8])
    assert (str(first), str(second)) == ("<['4', '8'], fp32>", "<['4', '8'], int32>")
    assert first != second and first == tl.block_type(tl.float32, [4, 8])
    assert first != tl.block_type(tl.float32, [8, 4])
    assert first.numel == second.numel == 32
    for sizes, error in (([4.0, 8], TypeError), ([3], ValueError), ([], TypeError)):
        for _ in range(2):
            with pytest.raises(error):
                tl.block_type(tl.float32, sizes)


@pytest.fixture
def operators() -> Iterator[tuple[Any, Any]]:
    """Triton's semantics as the tests change them, and as they are."""
    spec = find_spec("triton.language.semantic")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = interpreter.interpreter_semantic
    scope = interpreter._patch_lang(_mixed_kernel.fn)
    try:
        yield ours, module.TritonSemantic(ours.builder)
    finally:
        scope.restore()


DTYPES = [tl.int1, tl.int8, tl.uint32, tl.int32, tl.int64, tl.float16, tl.float32, tl.float64]
NUMBERS = [0, -1, 3, 3.0, 2**31, 2**40, 0.5, 0.0, -0.0, 1e300, float("nan"), True]


def _tensor(dtype: tl.dtype, shape: tuple[int, ...]) -> tl.tensor:
    kind = tl.block_type(dtype, list(shape)) if shape else dtype
    values = np.arange(1, 1 + max(1, int(np.prod(shape)))).reshape(shape or (1,))
    np_dtype = interpreter._get_np_dtype(dtype)
    return tl.tensor(interpreter.TensorHandle(values.astype(np_dtype), dtype), kind)


def _outcome(function: Any, *operands: Any) -> Any:
    """The error, or the type and bits of every result."""
    try:
        results = function(*operands)
    except Exception as error:
        return type(error).__name__, str(error)
    results = results if isinstance(results, tuple) else (results,)
    datas = [x.handle.data for x in results]
    bits = [(x.dtype, x.shape, x.tobytes()) for x in datas]
    return [str(x.type) for x in results], [str(x.handle.dtype) for x in results], bits


def test_operands_are_matched_as_by_triton(operators: tuple[Any, Any]) -> None:
    ours, plain = operators
    pointers = [tl.pointer_type(tl.float32), tl.pointer_type(tl.int32)]
    shapes = [(), (4,), (1, 4), (4, 1), (4, 4)]
    tensors = [_tensor(dtype, shape) for dtype in DTYPES + pointers for shape in shapes]
    arithmetic, pointer, quotient = (), (True, True), (False, False, True, True)
    operands = [*product(tensors, tensors), *product(tensors, NUMBERS), *product(NUMBERS, tensors)]
    for how, pair in product((arithmetic, pointer, quotient), operands):
        expected = _outcome(plain.binary_op_type_checking_impl, *pair, *how)
        for _ in range(2):  # The second time it is known how.
            assert _outcome(ours.binary_op_type_checking_impl, *pair, *how) == expected, (how, pair)


def test_numbers_beside_tensors_cannot_be_written_to(operators: tuple[Any, Any]) -> None:
    ours, _ = operators
    x = _tensor(tl.float32, (4,))
    for _ in range(2):
        _, number = ours.binary_op_type_checking_impl(x, 3.0)
    assert not number.handle.data.flags.writeable


def test_casts_are_those_of_triton(operators: tuple[Any, Any]) -> None:
    ours, plain = operators
    for source, to, shape in product(DTYPES, DTYPES, [(), (4, 4)]):
        x = _tensor(source, shape)
        for rounding in (None, "rtne"):
            expected = _outcome(plain.cast, x, to, rounding)
            assert _outcome(ours.cast, x, to, rounding) == expected, (source, to, rounding)

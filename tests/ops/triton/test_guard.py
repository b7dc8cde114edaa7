"""The guard catches what it is there for: each kernel here is wrong in one way."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ops.backends import INTERPRETED
from tests.ops.triton.guard import far_apart

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="guards the interpreter")


@triton.jit
def _copy_kernel(x, y, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Each program copies a row of y.shape[1] elements, BLOCK lanes of which WIDTH are kept."""
    i = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    row = i.to(tl.int64) if WIDE else i
    b_x = tl.load(x + row * stride + o, mask=o < WIDTH, other=0.0)
    tl.store(y + row * WIDTH + o, b_x, mask=o < WIDTH)


@triton.jit
def _same_place_kernel(y):
    tl.store(y + tl.program_id(0) // 2, 1.0)


@triton.jit
def _shared_lanes_kernel(y, LANES: tl.constexpr):
    tl.store(y + tl.arange(0, LANES) // 2, tl.arange(0, LANES).to(tl.float32))


@triton.jit
def _neighbour_kernel(x):
    """Each program reads what the one before it has written."""
    i = tl.program_id(0)
    tl.store(x + i + 1, tl.load(x + i) + 1.0)


@triton.jit
def _sum_kernel(x, y, length, BLOCK: tl.constexpr, ZEROS: tl.constexpr):
    o = tl.arange(0, BLOCK)
    if ZEROS:
        b_x = tl.load(x + o, mask=o < length, other=0.0)
    else:
        b_x = tl.load(x + o, mask=o < length)
    tl.store(y, tl.sum(b_x, 0))


@triton.jit
def _count_kernel(y, ONE: tl.constexpr):
    tl.atomic_add(y, ONE)


@triton.jit
def _indirect_kernel(addresses, y):
    tl.store(y, tl.load(tl.load(addresses).to(tl.pointer_type(tl.float32))))


def copy(x: Tensor, width: int, rows: int, block: int = 8, wide: bool = True) -> Tensor:
    y = torch.zeros(rows, x.shape[1])
    _copy_kernel[(rows,)](x, y, rows, x.stride(0), WIDTH=width, BLOCK=block, WIDE=wide)
    return y


def test_a_right_kernel_passes() -> None:
    x = torch.randn(5, 6)
    assert torch.equal(copy(x, 6, 5), x)
    assert torch.equal(copy(torch.randn(5, 9)[:, 2:8], 6, 5).isfinite(), x.isfinite())


def test_load_past_the_end() -> None:
    with pytest.raises(Exception, match=r"out of bounds: load at \[30\] of float32 \[5, 6\]"):
        copy(torch.randn(5, 6), 7, 5)


def test_load_before_the_start() -> None:
    x = torch.randn(5, 6)
    with pytest.raises(Exception, match="out of bounds: load"):
        _sum_kernel[(1,)](x[1:].flatten()[-1:], x, 2, BLOCK=2, ZEROS=True)


def test_load_between_the_rows_of_a_view() -> None:
    """In the memory of another tensor: what is there belongs to the same allocation."""
    with pytest.raises(Exception, match="out of bounds: load"):
        copy(torch.randn(5, 12)[:, :6], 7, 4)


def test_store_past_the_end() -> None:
    x, y = torch.randn(4, 6), torch.zeros(4, 6)
    with pytest.raises(Exception, match=r"out of bounds: store at \[18\]"):
        _copy_kernel[(1,)](x, y[:3].flatten()[:18], 4, 6, WIDTH=19, BLOCK=32, WIDE=True)


def test_pointer_of_no_argument() -> None:
    x = torch.ones(1)
    with pytest.raises(Exception, match="a pointer that is no argument's"):
        _indirect_kernel[(1,)](torch.tensor([x.data_ptr()]), x.clone())


def test_two_programs_write_one_element() -> None:
    with pytest.raises(Exception, match="race: writes what another program writes"):
        _same_place_kernel[(2,)](torch.zeros(4))


def test_two_programs_add_floats_to_one_element() -> None:
    """Integers may be: their sum has one value."""
    count = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(2,)](count, ONE=1)
    assert count.item() == 2
    with pytest.raises(Exception, match="race: writes what another program writes"):
        _count_kernel[(2,)](torch.zeros(1), ONE=1.0)


def test_two_lanes_write_one_element() -> None:
    with pytest.raises(Exception, match="race: two lanes of a store"):
        _shared_lanes_kernel[(1,)](torch.zeros(4), LANES=4)


def test_a_program_reads_what_another_writes() -> None:
    with pytest.raises(Exception, match="race: reads what another program writes"):
        _neighbour_kernel[(3,)](torch.zeros(4))


def test_launches_do_not_race_with_one_another() -> None:
    x = torch.zeros(4)
    for _ in range(2):
        _neighbour_kernel[(1,)](x)
    assert x.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_int32_overflow_of_an_offset() -> None:
    x = torch.randn(5, 6)
    apart = far_apart(x, 1 << 29, 1)
    assert torch.equal(copy(apart, 6, 5), x)
    with pytest.raises(Exception, match="int32 overflow: multiply gives 2147483648"):
        copy(apart, 6, 5, wide=False)


@pytest.mark.parametrize("zeros", [False, True])
def test_masked_lanes_are_poisoned(zeros: bool) -> None:
    x, y = torch.ones(8), torch.zeros(1)
    _sum_kernel[(1,)](x, y, 5, BLOCK=8, ZEROS=zeros)
    assert y.isnan().item() != zeros
    assert zeros == (y.item() == 5.0)

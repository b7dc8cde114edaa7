"""What kernels written for Hopper (sm_90) in Gluon share: rings of tiles, copies, registers.

Such a kernel has warps of two kinds. One producer warp asks the tensor memory accelerator (TMA) for
tiles and keeps a ring of stages full; warpgroups of four warps, the consumers, multiply them by
asynchronous matrix instructions (wgmma). Barriers in shared memory tie them together: `full` of a
stage says that its tile is there, `empty` that all consumers are done with it.

A barrier is waited for by the parity of its phase. Who waits counts: `advance` moves to the next
stage of the ring and changes the parity after the last one. A consumer's first parity is 0; a
producer's is 1, which a new barrier lets pass, as its stages start out empty.

Gluon calls the functions that plain kernels are made of, so maths of positions is written once.

Tiles are powers of two wide. 192 channels are three parts of 64, each a tile of its own: a product
over channels is a sum over the parts, one that gives channels is made part by part.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_kernels.triton.shared.launch import descriptor


@gluon.constexpr_function
def channel_parts(width: int) -> int:
    """Of how many tiles rows of `width` channels are made."""
    return 3 if width == 192 else 1


@gluon.constexpr_function
def part_width(width: int) -> int:
    """Channels of each of these tiles."""
    return 64 if width == 192 else width


# The same for the host: what kernels may call takes it thirty times as long.
host_part_width = cache(part_width)

# Rows of a warpgroup's matrix instruction.
WARPGROUP_ROWS = 64
# TMA reads from addresses, and over strides, that are multiples of this many bytes.
TMA_ALIGNMENT = 16


class Ring(NamedTuple):
    """Stages of shared memory with two barriers each.

    tiles: [STAGES, ...]; full, empty: [STAGES, 1].
    """

    tiles: Any
    full: Any
    empty: Any


@gluon.jit
def new_barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM barriers [NUM, 1], each of which waits for COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def advance(stage, parity, STAGES: gl.constexpr):
    """The next stage of a ring and the parity of its barrier."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, parity ^ 1, parity)


@gluon.jit
def retreat(stage, parity, STAGES: gl.constexpr):
    """The stage before, and the parity of its barrier: what `advance` came from."""
    first = stage == 0
    return gl.where(first, STAGES - 1, stage - 1), gl.where(first, parity ^ 1, parity)


@gluon.jit
def append(parts, part):
    """A tuple with one more at its end."""
    return parts + (part,)  # noqa: RUF005 (Gluon unpacks nothing)


@gluon.jit
def parts_of(tiles, i, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """The parts [ROWS, ..] of the WIDTH channels of tile i; those of a tile stand in a row."""
    PARTS: gl.constexpr = channel_parts(WIDTH)
    parts = ()
    for part in gl.static_range(PARTS):
        tile = tiles.index(i * PARTS + part).reshape((ROWS, part_width(WIDTH)))
        parts = append(parts, tile)
    return parts


@gluon.jit
def multiply_rows(a, b, b_sum, USE_SUM: gl.constexpr):
    """Issue a b^T of two tuples of parts, plus b_sum if USE_SUM."""
    PARTS: gl.constexpr = len(a)
    for part in gl.static_range(PARTS):
        b_sum = warpgroup_mma(
            a[part], b[part].permute((1, 0)), b_sum, use_acc=USE_SUM or part > 0, is_async=True
        )
    return b_sum


@gluon.jit
def add_products(b_a, b, sums):
    """Issue b_a times each of the parts b, each on top of its sum."""
    PARTS: gl.constexpr = len(b)
    found = ()
    for part in gl.static_range(PARTS):
        found = append(found, warpgroup_mma(b_a, b[part], sums[part], is_async=True))
    return found


@gluon.jit
def wait_for_sums(NUM: gl.constexpr, sums, b_a):
    """Wait until NUM products are under way, not those of `add_products` with b_a: sums, b_a."""
    found = warpgroup_mma_wait(NUM, deps=append(sums, b_a))
    return found[:-1], found[-1]


@gluon.jit
def to_16_bits(b_x, DTYPE: gl.constexpr):
    """A float32 tile, rounded to bfloat16 or float16, two elements an instruction.

    The compiler's own conversion takes a permutation more for each pair.
    """
    if DTYPE == gl.bfloat16:  # noqa: SIM300 (DTYPE is the variable)
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def keep_rows(tile, low, high, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Write zeros to the rows of a shared tile [ROWS, WIDTH] outside [low, high), by a warpgroup.

    What TMA brought may be another document's or was never written: 0 times NaN is NaN.
    Two warpgroups may do so with one tile at one time, if they keep the same rows: both write what
    was there or zero, and none goes on before it wrote.
    """
    STEP: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    o_row = gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
    for start in gl.static_range(0, ROWS, STEP):
        if (start < low) | (start + STEP > high):
            part = tile.slice(start, STEP)
            kept = (start + o_row >= low) & (start + o_row < high)
            b_x = part.load(layout)
            part.store(gl.where(gl.expand_dims(kept, 1), b_x, 0.0))
    # Matrix instructions and TMA reach shared memory by another way than loads and stores.
    fence_async_shared()


def for_tma(x: Tensor) -> Tensor:
    """x [rows, heads, D], copied where TMA cannot read it as it stands."""
    step = TMA_ALIGNMENT // x.element_size()
    row, head, channel = x.stride()
    readable = (
        channel == 1
        and x.data_ptr() % TMA_ALIGNMENT == 0
        and row > 0
        and head > 0
        and row % step == 0
        and head % step == 0
        and (x.shape[1] - 1) * head < 1 << 31  # The column of a head is 32 bits.
    )
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def head_tiles(x: Tensor, tokens: int, heads: int, width: int, column: int = 0) -> TensorDescriptor:
    """Tiles [tokens, heads, width] of x [rows, H, D], for TMA; from channel `column` on."""
    x = x[..., column:] if column else x
    return _descriptor(x, x.shape, x.stride(), (tokens, heads, width))


def row_tiles(x: Tensor, rows: int, width: int, column: int = 0) -> TensorDescriptor:
    """Tiles [rows, width] of one head of x [rows, G, D], for TMA; from channel `column` on.

    A head is a range of columns: head i starts at column i * x.stride(1).
    """
    x = x[..., column:] if column else x
    all_rows, heads, channels = x.shape
    stride_row, stride_head, _ = x.stride()
    columns = (heads - 1) * stride_head + channels
    return _descriptor(x, (all_rows, columns), (stride_row, 1), (rows, width))


def lines(x: Tensor) -> TensorDescriptor:
    """Contiguous float32 numbers in lines of 64, for TMA."""
    return _descriptor(x, (x.numel(),), (1,), (WARPGROUP_ROWS,))


def _descriptor(
    x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    made: TensorDescriptor = descriptor(
        x, shape, strides, block, tile_layout(block, x.dtype), TensorDescriptor
    )
    return made


@cache
def tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How TMA lays a tile out in shared memory, so that matrix instructions can read it."""
    if len(block) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return gl.NVMMASharedLayout.get_default_for(list(block), _GLUON_DTYPES[dtype])


_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def persistent_programs(x: Tensor, work: int, at_once: int = 1) -> int:
    """Of a kernel whose programs stay: `at_once` a multiprocessor, no more than `work`."""
    return min(work, at_once * _multiprocessors(x.device))


@cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count

"""Tile sizes, warps and stages of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa_kernels.triton.shared.arithmetic import PIECE

# A thread's. Unless it is told, ptxas gives some small kernels few and spills some bytes.
MOST_REGISTERS = 255
# Most tokens of a tile of the selection branch: bits of an entry's mask.
MOST_TOKENS = 16


def padded(width: int) -> int:
    """The power of two, at least 16, that a tile's columns are padded to."""
    return max(16, 1 << (width - 1).bit_length())


class TileShape(NamedTuple):
    """Tokens BT (with R heads each: BM rows) and keys BN of a tile, and the warps that share it.

    registers: of a thread, where the compiler is told.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def compute_capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that x is on; (0, 0) where kernels are interpreted."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def ratio_is_power_of_two(q: Tensor, v: Tensor) -> bool:
    """Whether R is, the heads of q [.., H, Dk] for each of v [.., G, Dv]."""
    ratio = q.shape[1] // v.shape[1]
    return ratio & (ratio - 1) == 0


def attention_shapes(q: Tensor, v: Tensor) -> tuple[TileShape, TileShape, TileShape]:
    """Of the forward, dq and dk, dv kernels; by widths, R, dtype and GPU alone.

    Bits of an output depend on them. They are as large as the registers of that GPU allow.
    """
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if not q.is_cuda and (q.dtype == torch.float32 or width > 128):
        # Registers are no matter to the interpreter, and large tiles are its fast ones.
        return TileShape(64, 32, 4, 2), TileShape(64, 32, 4, 1), TileShape(64, 32, 8, 1)
    if q.dtype == torch.float32:
        keys = 32 if width <= 128 else 16
        return TileShape(32, keys, 8, 1), TileShape(32, keys, 8, 2), TileShape(32, keys, 8, 1)
    if width > 128:
        return TileShape(64, 32, 8, 2), TileShape(64, 32, 8, 2), TileShape(64, 32, 8, 1)
    major = compute_capability(q)[0]
    if major == 10:
        forward, dq = TileShape(64, 64, 8, 2, MOST_REGISTERS), TileShape(64, 32, 8, 2)
        return forward, dq, TileShape(32, 64, 8, 2, MOST_REGISTERS)
    if major not in (0, 9):
        small = TileShape(64, 32, 8, 2)
        return small, small, small if width > 64 else TileShape(32, 32, 8, 2)
    if not ratio_is_power_of_two(q, v):  # Rows are divided by it, which takes registers.
        return TileShape(64, 64, 8, 2), TileShape(128, 32, 8, 2), TileShape(32, 64, 8, 2)
    if width > 64:
        # A second tile in flight is a few registers too many where two widths have their masks.
        widths = {x.shape[-1] for x in (q, v) if x.shape[-1] != padded(x.shape[-1])}
        stages = 1 if len(widths) == 2 else 2
        return TileShape(128, 64, 8, 3), TileShape(128, 32, 8, 3), TileShape(64, 128, 8, stages)
    return TileShape(128, 64, 8, 3), TileShape(128, 64, 8, 3), TileShape(64, 128, 8, 3)


class WalkShape(NamedTuple):
    """Keys of a tile, the warps of a program, the tiles in flight.

    apart: whether the tiles of a block are summed by themselves, for too many to add in a row.
    registers: of a thread, where the compiler is told.
    """

    keys: int
    warps: int
    stages: int
    apart: bool
    registers: int | None = None


def token_tile(ratio: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a tile and rows of its matrix: 64 rows fill a Hopper matrix instruction.

    Groups of one or two heads take fewer: tokens that choose differently share little.
    """
    tokens = min(MOST_TOKENS, (32 if dtype == torch.float32 else 64) // ratio)
    return tokens, max(16, triton.next_power_of_2(tokens * ratio))


def walk_shapes(q: Tensor, v: Tensor, num: int, select_block: int) -> tuple[WalkShape, WalkShape]:
    """Of the forward and dq kernels; by widths, dtype, n, l' and GPU, for the promise of bits."""
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    keys = min(16 if q.dtype == torch.float32 else 32 if width > 128 else 64, select_block)
    apart = num * select_block > PIECE * keys
    if q.dtype == torch.float32:
        shape = WalkShape(keys, 4, 1, apart)
        return shape, shape
    major = compute_capability(q)[0]
    dq_keys = min(keys, 32) if 0 < major < 9 else keys
    dq_apart = num * select_block > PIECE * dq_keys
    # On Hopper the compiler is right to spare registers where tiles are 64 rows high.
    tall = token_tile(q.shape[1] // v.shape[1], q.dtype)[1] >= 64
    registers = None if width > 128 or (major == 9 and tall) else MOST_REGISTERS
    if width > 128 or apart:
        return (
            WalkShape(keys, 8, 3, apart, registers),
            WalkShape(dq_keys, 8, 3, dq_apart, registers),
        )
    forward_warps = 4 if ratio_is_power_of_two(q, v) else 8
    # Two programs of 112 and 96 KB fit a Hopper multiprocessor; elsewhere dq would spill, and so
    # does all that divides rows by a ratio that is no power of two.
    dq_warps = 4 if major in (0, 9) else 8
    return (
        WalkShape(keys, forward_warps, 3, apart, registers),
        WalkShape(dq_keys, dq_warps, 2, dq_apart, registers),
    )


class KeyShape(NamedTuple):
    """Query rows and keys of a tile, the warps of a program and the tiles in flight.

    registers: of a thread, where the compiler is told.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def key_shape(q: Tensor, v: Tensor, select_block: int) -> KeyShape:
    """Of the kernel of dk and dv; by widths, dtype, R, l' and GPU."""
    if q.dtype == torch.float32:
        return KeyShape(32, min(32, select_block), 8, 1)
    if max(padded(q.shape[-1]), padded(v.shape[-1])) > 128:
        return KeyShape(32, min(64, select_block), 8, 2)
    # A tile of queries this small leaves two programs the registers for dk and dv.
    warps = 4 if select_block <= 64 and ratio_is_power_of_two(q, v) else 8
    major = compute_capability(q)[0]
    stages = 2 if select_block == 128 and major == 8 else 3
    return KeyShape(32, select_block, warps, stages, MOST_REGISTERS if major == 10 else None)


class ScoreShape(NamedTuple):
    """columns: (head, token) pairs of a tile of scores; keys: its rows; registers: of a thread."""

    columns: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def score_widths(width: int) -> tuple[int, int]:
    """A power of two and another one or 0, of which tiles of `width` channels are made."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = padded(width - first) if width > first else 0
    return (2 * first, 0) if rest == first else (first, rest)


def score_shape(
    dtype: torch.dtype,
    widths: tuple[int, int],
    heads: int,
    per_block: int,
    capability: tuple[int, int],
) -> ScoreShape:
    if dtype == torch.float32:
        return ScoreShape(columns=32, keys=64, warps=8, stages=2)
    # A head and a key by themselves are summed with no other: a thread keeps all scores of a tile.
    few = 2 if heads * per_block == 1 and capability[0] == 10 else 1
    registers = MOST_REGISTERS if capability[0] in (8, 10) else None
    if widths[1]:
        # With more warps the compiler would lay out the results of the two products differently.
        stages = 3 if sum(widths) <= 128 else 2
        return ScoreShape((128 if heads >= 8 else 64) // few, 64, 4, stages, registers)
    # Few heads or short blocks leave many sums of a tile for a thread.
    if heads < 8 or heads * per_block < 16 or capability[0] not in (9, 10):
        return ScoreShape(columns=128 // few, keys=64, warps=8, stages=2, registers=registers)
    shape = ScoreShape(columns=256, keys=64, warps=8, stages=2)
    if widths[0] <= 128 and capability == (9, 0):
        # Two programs fill the registers of a multiprocessor, and with three stages its shared
        # memory, when exchanging a tile's scores between threads takes no more than 1 KiB of it.
        scores = shape.columns // heads * (shape.keys // per_block)
        shape = shape._replace(registers=128, stages=3 if 4 * scores <= 1024 else 2)
    return shape

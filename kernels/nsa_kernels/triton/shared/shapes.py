"""Tile sizes, warps and stages of kernels, for each generation of GPUs.

Of kernels that pass over memory once, or make tables, the launchers choose themselves.

A new GPU is a row of GPUS; `make compile-all` says whether its tiles fit registers and memory. Bits
of a result depend on the shapes of tiles, so these follow from widths, dtype, the ratio R of heads,
the lengths of blocks and the GPU, and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nsa_kernels.triton.shared.arithmetic import PIECE

# A thread's. Unless it is told, ptxas gives some small kernels few and spills some bytes.
MOST_REGISTERS = 255
# Tokens of a tile in the selected branch, at most: bits of an entry's mask, see selected/lists.py.
MOST_TOKENS = 16
# Elements of a tile of rows that a kernel passes over once.
ROW_TILE_ELEMENTS = 4096


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program and tiles in flight.

    registers: of a thread, where the compiler is told.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


class BandedTiles(NamedTuple):
    """Of the three kernels of the compressed and window branches."""

    forward: Tile
    dq: Tile
    dkv: Tile


class ScoreTile(NamedTuple):
    """columns: (head, token) pairs of a tile of scores; keys: its rows; registers: of a thread.

    halves: 2 where the keys of a selection block, 2 to 16 of them, stand one half in the first 8 of
        16 rows and the other half in the last 8.
    """

    columns: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    halves: int = 1


# The same on every GPU so far.
_BANDED_256 = BandedTiles(forward=Tile(64, 32, 8, 2), dq=Tile(64, 32, 8, 2), dkv=Tile(64, 32, 8, 1))
_BANDED_FLOAT32_128 = BandedTiles(
    forward=Tile(32, 32, 8, 1), dq=Tile(32, 32, 8, 2), dkv=Tile(32, 32, 8, 1)
)
_BANDED_FLOAT32_256 = BandedTiles(
    forward=Tile(32, 16, 8, 1), dq=Tile(32, 16, 8, 2), dkv=Tile(32, 16, 8, 1)
)


class HopperTile(NamedTuple):
    """Query rows and keys of a tile of a kernel with a producer warp, tiles in flight.

    rows: 64 for each consumer. consumer_registers: of a consumer's thread. registers: of all
    threads at the start, from which the producer gives some to the consumers.
    """

    rows: int
    keys: int
    stages: int
    registers: int
    consumer_registers: int


@dataclass(frozen=True)
class Gpu:
    """What one generation of GPUs runs.

    A width is the larger of Dk and Dv, padded to a power of two. 16 bits: float16 and bfloat16.

    banded_64, banded_128: 16 bits at widths up to 64, up to 128.
    banded_odd_ratio: 16 bits at widths up to 128, where R is no power of two: rows are divided by
        it, which takes registers. None: as other ratios.
    banded_dkv_two_masks: stages of dk and dv at widths above 64 where two widths are padded: their
        masks take registers. None: as other widths.
    banded_256, banded_float32_128, banded_float32_256: the larger widths in 16 bits, and float32.
    selected_tma: whether forward and dq of widths up to 128 load whole blocks by TMA, in 16 bits.
    selected_gluon: whether there are kernels in Gluon: see `selected_walk_gluon`.
    selected_dq_keys: most keys of a tile of dq in 16 bits.
    selected_dq_warps: of dq in 16 bits, where programs are small.
    selected_tall_registers: of a thread, where tiles are 64 rows high or more. None: the compiler's
        choice, which is right on Hopper.
    selected_dkv_stages: of dk and dv in 16 bits, where select_block is 128.
    selected_dkv_registers: of a thread, for dk and dv in 16 bits.
    score_columns: of a tile of scores in 16 bits, with many heads and long blocks.
    score_single_columns: of one with a single head and key to sum, where a thread keeps all scores.
    score_registers: of a thread, for scores in 16 bits.
    score_halves: of a tile of score_columns with 16 heads or more, see `ScoreTile`.
    score_two_programs: whether tiles of score_columns have the registers that let two programs
        share a multiprocessor.
    choose_first_registers: of a thread that ranks scores for the first time.
    """

    banded_64: BandedTiles
    banded_128: BandedTiles
    banded_odd_ratio: BandedTiles | None = None
    banded_dkv_two_masks: int | None = None
    banded_256: BandedTiles = _BANDED_256
    banded_float32_128: BandedTiles = _BANDED_FLOAT32_128
    banded_float32_256: BandedTiles = _BANDED_FLOAT32_256
    selected_tma: bool = False
    selected_gluon: bool = False
    selected_dq_keys: int = 64
    selected_dq_warps: int = 8
    selected_tall_registers: int | None = MOST_REGISTERS
    selected_dkv_stages: int = 3
    selected_dkv_registers: int | None = None
    score_columns: int = 128
    score_single_columns: int = 128
    score_registers: int | None = None
    score_halves: int = 1
    score_two_programs: bool = False
    choose_first_registers: int | None = None


_HOPPER_64 = BandedTiles(
    forward=Tile(128, 64, 8, 3), dq=Tile(128, 64, 8, 3), dkv=Tile(64, 128, 8, 3)
)
_HOPPER_128 = BandedTiles(
    forward=Tile(128, 64, 8, 3), dq=Tile(128, 32, 8, 3), dkv=Tile(64, 128, 8, 2)
)
_HOPPER_ODD_RATIO = BandedTiles(
    forward=Tile(64, 64, 8, 2), dq=Tile(128, 32, 8, 2), dkv=Tile(32, 64, 8, 2)
)
_SMALL_64 = BandedTiles(forward=Tile(64, 32, 8, 2), dq=Tile(64, 32, 8, 2), dkv=Tile(32, 32, 8, 2))
_SMALL_128 = BandedTiles(forward=Tile(64, 32, 8, 2), dq=Tile(64, 32, 8, 2), dkv=Tile(64, 32, 8, 2))
_BLACKWELL = BandedTiles(
    forward=Tile(64, 64, 8, 2, MOST_REGISTERS),
    dq=Tile(64, 32, 8, 2),
    dkv=Tile(32, 64, 8, 2, MOST_REGISTERS),
)
# Registers are no matter to the interpreter, and large tiles are its fast ones.
_INTERPRETED = BandedTiles(
    forward=Tile(64, 32, 4, 2), dq=Tile(64, 32, 4, 1), dkv=Tile(64, 32, 8, 1)
)

AMPERE = Gpu(
    banded_64=_SMALL_64,
    banded_128=_SMALL_128,
    selected_dq_keys=32,
    selected_dkv_stages=2,
    score_registers=MOST_REGISTERS,
)
HOPPER = Gpu(
    banded_64=_HOPPER_64,
    banded_128=_HOPPER_128,
    banded_odd_ratio=_HOPPER_ODD_RATIO,
    banded_dkv_two_masks=1,
    selected_tma=True,
    selected_gluon=True,
    # Two programs of 112 and 96 KB fit a multiprocessor; elsewhere dq would spill.
    selected_dq_warps=4,
    selected_tall_registers=None,
    score_columns=256,
    score_halves=2,
    score_two_programs=True,
)
BLACKWELL = Gpu(
    banded_64=_BLACKWELL,
    banded_128=_BLACKWELL,
    selected_dkv_registers=MOST_REGISTERS,
    score_columns=256,
    score_single_columns=64,
    score_registers=MOST_REGISTERS,
    choose_first_registers=MOST_REGISTERS,
)
OTHER = Gpu(banded_64=_SMALL_64, banded_128=_SMALL_128)
INTERPRETER = Gpu(
    banded_64=_HOPPER_64,
    banded_128=_HOPPER_128,
    banded_odd_ratio=_HOPPER_ODD_RATIO,
    banded_dkv_two_masks=1,
    banded_256=_INTERPRETED,
    banded_float32_128=_INTERPRETED,
    banded_float32_256=_INTERPRETED,
    selected_dq_warps=4,
    score_columns=256,
    score_halves=2,
)
# By the major number of the compute capability. GPUs that are not here are OTHER.
GPUS = {8: AMPERE, 9: HOPPER, 10: BLACKWELL}


def gpu_of(x: Tensor) -> Gpu:
    """The row of the GPU that x is on."""
    if not x.is_cuda:
        return INTERPRETER
    return GPUS.get(capability(x.device)[0], OTHER)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, asked once: every operator wants it several times a call."""
    return torch.cuda.get_device_capability(device)


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own, which kernels may call, takes the host fifty times as long.

    So does its next power of two.
    """
    return -(-x // y)


def power_of_two(x: int) -> int:
    """The smallest one of at least x, which is at least 1."""
    return 1 << (x - 1).bit_length()


def padded(width: int) -> int:
    """The power of two, at least 16, that a tile's columns are padded to."""
    return max(16, power_of_two(width))


def _padded_width(q: Tensor, v: Tensor) -> int:
    return max(padded(q.shape[-1]), padded(v.shape[-1]))


def _ratio_is_power_of_two(q: Tensor, v: Tensor) -> bool:
    """Whether R is, the heads of q [.., H, Dk] for each of v [.., G, Dv]."""
    ratio = q.shape[1] // v.shape[1]
    return ratio & (ratio - 1) == 0


def banded_tiles(q: Tensor, v: Tensor) -> BandedTiles:
    """Of the compressed and window branches."""
    gpu, width = gpu_of(q), _padded_width(q, v)
    if q.dtype == torch.float32:
        return gpu.banded_float32_128 if width <= 128 else gpu.banded_float32_256
    if width > 128:
        return gpu.banded_256
    if gpu.banded_odd_ratio is not None and not _ratio_is_power_of_two(q, v):
        return gpu.banded_odd_ratio
    if width <= 64:
        return gpu.banded_64
    tiles = gpu.banded_128
    masked = {x.shape[-1] for x in (q, v) if x.shape[-1] != padded(x.shape[-1])}
    if gpu.banded_dkv_two_masks is not None and len(masked) == 2:
        tiles = tiles._replace(dkv=tiles.dkv._replace(stages=gpu.banded_dkv_two_masks))
    return tiles


# Kernels that Gluon compiles: their names in it are those of these versions.
_GLUON = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6)
_HOPPER_FORWARD = HopperTile(192, 64, 4, registers=128, consumer_registers=160)
_HOPPER_FORWARD_192 = HopperTile(192, 64, 2, registers=128, consumer_registers=160)


def _runs_gluon(q: Tensor, v: Tensor) -> bool:
    """Whether kernels in Gluon take this GPU, dtype and ratio of heads, which must divide 64."""
    return (
        gpu_of(q) is HOPPER
        and _GLUON
        and q.dtype != torch.float32
        and _ratio_is_power_of_two(q, v)
        and q.shape[1] // v.shape[1] <= 32
    )


def hopper_forward_tile(q: Tensor, v: Tensor) -> HopperTile | None:
    """Of the forward of the compressed and window branches on Hopper; None: the plain kernel runs.

    For widths and ratios that need no padding.
    """
    dk, dv = q.shape[-1], v.shape[-1]
    if not (_runs_gluon(q, v) and dk in (64, 128, 192) and dv in (64, 128)):
        return None
    return _HOPPER_FORWARD_192 if dk == 192 else _HOPPER_FORWARD


def runs_hopper_backward(q: Tensor, v: Tensor) -> bool:
    """Whether banded/hopper_backward.py computes gradients of the compressed and window branches.

    For widths and ratios that need no padding.
    """
    return _runs_gluon(q, v) and q.shape[-1] in (64, 128, 192) and v.shape[-1] in (64, 128)


class WalkTile(NamedTuple):
    """Keys of a tile, the warps of a program, the tiles in flight.

    apart: whether the tiles of a block are summed by themselves, for too many to add in a row.
    registers: of a thread, where the compiler is told. tma: whether whole blocks are loaded by it.
    """

    keys: int
    warps: int
    stages: int
    apart: bool
    registers: int | None = None
    tma: bool = False


def token_tile(ratio: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a tile and rows of its matrix: 64 rows fill a Hopper matrix instruction.

    Groups of one or two heads take fewer: tokens that choose differently share little.
    """
    tokens = min(MOST_TOKENS, (32 if dtype == torch.float32 else 64) // ratio)
    return tokens, max(16, power_of_two(tokens * ratio))


def walk_tiles(q: Tensor, v: Tensor, num: int, select_block: int) -> tuple[WalkTile, WalkTile]:
    """Of forward and dq of the selected branch, with `num` chosen blocks."""
    gpu, width = gpu_of(q), _padded_width(q, v)
    keys = min(16 if q.dtype == torch.float32 else 32 if width > 128 else 64, select_block)
    apart = num * select_block > PIECE * keys
    if q.dtype == torch.float32:
        tile = WalkTile(keys, 4, 1, apart)
        return tile, tile
    dq_keys = min(keys, gpu.selected_dq_keys)
    dq_apart = num * select_block > PIECE * dq_keys
    tall = token_tile(q.shape[1] // v.shape[1], q.dtype)[1] >= 64
    registers = gpu.selected_tall_registers if tall else MOST_REGISTERS
    if width > 128:
        registers = None
    tma = gpu.selected_tma and width <= 128
    if width > 128 or apart:
        return (
            WalkTile(keys, 8, 3, apart, registers, tma),
            WalkTile(dq_keys, 8, 3, dq_apart, registers, tma),
        )
    # What divides rows by a ratio that is no power of two would spill with fewer warps.
    forward_warps = 4 if _ratio_is_power_of_two(q, v) else 8
    return (
        WalkTile(keys, forward_warps, 3, apart, registers, tma),
        WalkTile(dq_keys, gpu.selected_dq_warps, 2, dq_apart, registers, tma),
    )


def _selected_gluon(q: Tensor, v: Tensor, select_block: int) -> bool:
    """Whether kernels of the selected branch in Gluon take this GPU, dtype, widths and blocks."""
    return (
        gpu_of(q).selected_gluon
        and q.dtype != torch.float32
        and q.shape[-1] in (64, 128, 192)
        and v.shape[-1] in (64, 128)
        and select_block == 64
    )


def selected_walk_gluon(q: Tensor, v: Tensor, select_block: int, walk: WalkTile) -> bool:
    """Whether forward or dq of the selected branch are those of selected/hopper_walk.py.

    walk: what the plain kernel takes else. Sums in pieces are left to it.
    """
    ratio = q.shape[1] // v.shape[1]
    return _selected_gluon(q, v, select_block) and ratio in (4, 8, 16, 32) and not walk.apart


def selected_dkv_gluon(q: Tensor, v: Tensor, select_block: int) -> bool:
    """Whether dk and dv of the selected branch are the kernel's of selected/hopper_dkv.py."""
    return _selected_gluon(q, v, select_block) and q.shape[1] // v.shape[1] in (8, 16, 32)


def selected_dkv_tile(q: Tensor, v: Tensor, select_block: int) -> Tile:
    """Of dk and dv of the selected branch."""
    gpu = gpu_of(q)
    if q.dtype == torch.float32:
        return Tile(32, min(32, select_block), 8, 1)
    if _padded_width(q, v) > 128:
        return Tile(32, min(64, select_block), 8, 2)
    # A tile of queries this small leaves two programs the registers for dk and dv.
    warps = 4 if select_block <= 64 and _ratio_is_power_of_two(q, v) else 8
    stages = gpu.selected_dkv_stages if select_block == 128 else 3
    return Tile(32, select_block, warps, stages, gpu.selected_dkv_registers)


def score_widths(width: int) -> tuple[int, int]:
    """A power of two and another one or 0, of which tiles of `width` channels are made."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = padded(width - first) if width > first else 0
    return (2 * first, 0) if rest == first else (first, rest)


def score_tile(q: Tensor, heads: int, per_block: int) -> ScoreTile:
    """Of scores, with R padded to `heads` and `per_block` keys in each selection block."""
    if q.dtype == torch.float32:
        return ScoreTile(columns=32, keys=64, warps=8, stages=2)
    gpu, widths = gpu_of(q), score_widths(q.shape[-1])
    registers = gpu.score_registers
    # A head and a key by themselves are summed with no other: a thread keeps all scores of a tile.
    columns = gpu.score_single_columns if heads * per_block == 1 else 128
    if widths[1]:
        # With more warps the compiler would lay out the results of the two products differently.
        stages = 3 if sum(widths) <= 128 else 2
        return ScoreTile(columns if heads >= 8 else columns // 2, 64, 4, stages, registers)
    # Few heads or short blocks leave many sums of a tile for a thread.
    if heads < 8 or heads * per_block < 16 or gpu.score_columns == 128:
        return ScoreTile(columns, keys=64, warps=8, stages=2, registers=registers)
    tile = ScoreTile(gpu.score_columns, keys=64, warps=8, stages=2)
    if gpu.score_two_programs and widths[0] <= 128:
        # Two programs fill the registers of a multiprocessor, and with three stages its shared
        # memory, when exchanging a tile's scores between threads takes no more than 1 KiB of it.
        scores = tile.columns // heads * (tile.keys // per_block)
        tile = tile._replace(registers=128, stages=3 if 4 * scores <= 1024 else 2)
    # With fewer heads the more tokens of a tile take the registers.
    if heads >= 16 and 2 <= per_block <= 16:
        tile = tile._replace(halves=gpu.score_halves)
    return tile


# Columns of three consumers.
_HOPPER_SCORES = HopperTile(384, 64, 4, registers=128, consumer_registers=160)
_HOPPER_SCORES_192 = _HOPPER_SCORES._replace(stages=3)


def hopper_score_tile(
    q: Tensor, k: Tensor, block: int, stride: int, select_block: int
) -> HopperTile | None:
    """Of scores on Hopper, with (head, token) pairs as rows; None: the plain kernel runs.

    For the paper's ratios of heads and of lengths, at widths that need no padding.
    """
    if not _runs_gluon(q, k) or (block, select_block) != (2 * stride, 4 * stride):
        return None
    if q.shape[-1] not in (64, 128, 192) or q.shape[1] != 16 * k.shape[1]:
        return None
    return _HOPPER_SCORES_192 if q.shape[-1] == 192 else _HOPPER_SCORES


def choose_registers(scores: Tensor, first: bool) -> int | None:
    """Of a thread that ranks scores, for the first time or among those found before."""
    return gpu_of(scores).choose_first_registers if first else MOST_REGISTERS


class ProductTile(NamedTuple):
    """Rows, columns and depth of a tile of a product, warps of a program and tiles in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def product_tile(x: Tensor, columns: int, depth: int, rows: int = 1 << 30) -> ProductTile:
    """Of the products of compression blocks: by widths and dtype, the same on every GPU."""
    if x.dtype == torch.float32:
        most = ProductTile(64, 64, 32, 4, 2)
    else:
        most = ProductTile(128, 128, 64, 8, 3)
    if (columns % 64 or x.shape[-1] % 64) and x.dtype != torch.float32:
        # Masks and divisions take registers.
        most = most._replace(rows=64)
    return most._replace(
        rows=min(most.rows, padded(rows)),
        columns=min(most.columns, padded(columns)),
        depth=min(most.depth, padded(depth)),
    )


def pooling_warps(block: int, width: int) -> int:
    """Of a program that takes the rows of one compression block."""
    return max(1, min(8, padded(block) * padded(width) // 1024))


def rows_of_tile(width: int) -> int:
    """Of a kernel that passes once over rows of `width`."""
    return max(1, ROW_TILE_ELEMENTS // padded(width))


def decoding_tile(q: Tensor, v: Tensor) -> Tile:
    """Of the kernels for few queries, which read each key once: the same on every GPU."""
    rows = max(16, power_of_two(q.shape[1] // v.shape[1]))
    wide = _padded_width(q, v) > 128
    if q.dtype == torch.float32:
        return Tile(rows, 16, 4, 1, MOST_REGISTERS)
    keys, stages = (32, 2) if wide else (64, 3)
    return Tile(rows, keys, 4, stages, MOST_REGISTERS)

"""Which program does what: tables of query and key tiles, and what the launchers share.

The tables are made on the host from the segments, once for each tile size, and kept with the
host's table of the segments: all layers of a batch use the same ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments, Segment
from nsa_kernels.triton.band import Band

LOG2E = 1.4426950408889634
# Tiles added one after another; more are added in pieces, whose sums are then added.
PIECE = 64
# A thread's. Unless it is told, ptxas gives some small kernels few and spills some bytes.
MOST_REGISTERS = 255
# Tables of how many packings are found again by the values of the segments alone.
REMEMBERED = 8


class QueryTiles(NamedTuple):
    """Runs of at most BT query rows of one segment.

    table: int64 [tiles, 4] on the device: first row, rows, position of the first, row of key 0.
    host: the same on the CPU.
    last: the highest position of a row; -1 without rows.
    """

    table: Tensor
    host: Tensor
    last: int


class KeyTiles(NamedTuple):
    """Runs of at most BN keys with the query tiles that see them, at most PIECE for a program.

    table: int64 [programs, 6] on the device: row of key 0, first key, end of the keys, first query
    tile, end of the query tiles, and the key tile that the program belongs to.
    parts: int32 [key tiles + 1], where each key tile's programs start.
    """

    table: Tensor
    parts: Tensor


class Chunk(NamedTuple):
    """Query rows [begin, end), which tiles [first_tile, end_tile) hold; their highest position."""

    begin: int
    end: int
    first_tile: int
    end_tile: int
    last: int


class Kept(NamedTuple):
    """What is kept; on a GPU, the stream that made it and the event after that."""

    value: Any
    stream: int = 0
    made: Any = None


# Tables by the values [M, 6] of the segments, the latest last.
_remembered: list[tuple[Tensor, dict[Any, Kept]]] = []
_remembering = threading.Lock()


def segments_of(host: Tensor, device: torch.device) -> QuerySegments:
    """The segments whose `host` it is, with their table on `device`.

    What an operator makes of its arguments: tables that were kept are found again, for the same
    tensor and for another one with the same values.
    """
    table = host
    if device.type != "cpu":
        table = _kept(host, device, "table", lambda: to_device(host, device))
    return QuerySegments(host, table, _kept(host, device, "rows", lambda: int(host[:, 1].sum())))


def query_tiles(segments: QuerySegments, size: int, column: str) -> QueryTiles:
    """The tiles of at most `size` query rows, key rows counted by `column` of the segment."""
    return kept(segments, ("query", size, column), lambda: _query_tiles(segments, size, column))


def key_tiles(segments: QuerySegments, band: Band, queries: int, keys: int) -> KeyTiles:
    """The tiles of at most `keys` keys against the tiles of at most `queries` queries."""
    name = ("key", band, queries, keys, PIECE)
    return kept(segments, name, lambda: _key_tiles(segments, band, queries, keys))


def chunks(segments: QuerySegments, size: int, tokens: int, column: str) -> list[Chunk]:
    """The local rows in runs of at most `size`, over the query tiles of at most `tokens` rows."""
    name = ("chunks", size, tokens, column)
    return kept(segments, name, lambda: _chunks(segments, size, tokens, column))


def positions(segments: QuerySegments) -> Tensor:
    """`QuerySegments.positions`."""
    return kept(segments, "positions", lambda: segments.positions)


def selected_bases(segments: QuerySegments) -> Tensor:
    """`QuerySegments.selected_bases`."""
    return kept(segments, "selected_bases", lambda: segments.selected_bases)


def kept(segments: QuerySegments, name: Any, make: Callable[[], Any]) -> Any:
    """What `make` made of these segments under that name, now or before.

    It must not refer to the segments' tensors, or these would keep themselves alive.
    """
    return _kept(segments.host, segments.table.device, name, make)


def _kept(host: Tensor, device: torch.device, name: Any, make: Callable[[], Any]) -> Any:
    return kept_in(_tables_of(host), (device, name), device, make)


def kept_in(
    tables: dict[Any, Kept], name: Any, device: torch.device, make: Callable[[], Any]
) -> Any:
    """What `make` made under that name, a tensor or a tuple with tensors, for any stream."""
    found = tables.get(name)
    if device.type != "cuda":
        if found is None:
            found = tables[name] = Kept(make())
        return found.value
    stream = torch.cuda.current_stream(device)
    if found is None:
        value, made = make(), torch.cuda.Event()
        made.record(stream)
        found = tables[name] = Kept(value, stream.cuda_stream, made)
    elif found.stream != stream.cuda_stream and not torch.cuda.is_current_stream_capturing():
        stream.wait_event(found.made)
        for x in found.value if isinstance(found.value, tuple) else (found.value,):
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(stream)  # Its memory is not taken again before this stream is done.
    return found.value


def _tables_of(host: Tensor) -> dict[Any, Kept]:
    """Kept with the tensor as long as its values are the same."""
    if host.is_inference():  # whose changes are not counted
        return _tables_of_equal(host)
    version, tables = host.__dict__.get("_tables", (None, None))
    if version != host._version:
        tables = _tables_of_equal(host)
        host.__dict__["_tables"] = (host._version, tables)
    return tables


def _tables_of_equal(host: Tensor) -> dict[Any, Kept]:
    """Of the packings that were used last: copies of a tensor, made by whoever, have one set."""
    with _remembering:
        for at, (values, tables) in enumerate(_remembered):
            if torch.equal(values, host):
                _remembered.append(_remembered.pop(at))
                return tables
        tables = {}
        _remembered.append((host.clone(), tables))
        del _remembered[:-REMEMBERED]
        return tables


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, ordered in its stream: nothing waits for what is queued there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _query_tiles(segments: QuerySegments, size: int, column: str) -> QueryTiles:
    start, length, position = segments.host[:, :3].unbind(1)
    base = segments.host[:, Segment._fields.index(column)]
    count = (length + size - 1) // size
    segment, number = _numbered(count)
    done = number * size
    host = torch.stack(
        (
            start[segment] + done,
            (length[segment] - done).clamp(max=size),
            position[segment] + done,
            base[segment],
        ),
        dim=1,
    )
    last = int((host[:, 1] + host[:, 2]).max()) - 1 if len(host) else -1
    return QueryTiles(to_device(host, segments.table.device), host, last)


def _numbered(count: Tensor) -> tuple[Tensor, Tensor]:
    """For `count` [M] items of each owner, one owner after another: owner and number of each."""
    owner = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    return owner, torch.arange(len(owner), device="cpu") - first[owner]


def _key_tiles(segments: QuerySegments, band: Band, queries: int, keys: int) -> KeyTiles:
    _, length, position, base = query_tiles(segments, queries, band.column).host.unbind(1)
    # Neighbouring tiles that count keys from one row see the same keys.
    group = torch.zeros_like(base)
    group[1:] = (base[1:] != base[:-1]).cumsum(0)
    begin, end = band.keys(position, position + length - 1)
    seeing = (begin < end).nonzero().squeeze(1)
    group, begin, end, base = (x[seeing] for x in (group, begin, end, base))
    _, group, count = group.unique_consecutive(return_inverse=True, return_counts=True)
    first_of_group = count.cumsum(0) - count
    low = torch.zeros_like(count).scatter_reduce(0, group, begin, "amin", include_self=False)
    high = torch.zeros_like(count).scatter_reduce(0, group, end, "amax", include_self=False)

    # Where later tiles of a group see earlier keys, all tiles are taken to see all of its keys.
    same = group[1:] == group[:-1]
    descends = ((begin[1:] < begin[:-1]) | (end[1:] < end[:-1])) & same
    mixed = torch.zeros_like(count, dtype=torch.bool)
    mixed[group[1:][descends]] = True
    begin = torch.where(mixed[group], low[group], begin)
    end = torch.where(mixed[group], high[group], end)

    key_group, number = _numbered((high + keys - 1) // keys - low // keys)
    key = (low // keys)[key_group] * keys + number * keys
    stop = torch.minimum(key + keys, high[key_group])
    # One search through all groups: each has a range of numbers of its own.
    apart = int(high.max()) + 1 if len(high) else 1
    first = torch.searchsorted(end + group * apart, key + key_group * apart, right=True)
    until = torch.searchsorted(begin + group * apart, stop + key_group * apart)
    seen = first < until
    key, stop, key_group, first, until = (x[seen] for x in (key, stop, key_group, first, until))
    first_tile, end_tile = seeing[first], seeing[until - 1] + 1

    count = end_tile - first_tile
    programs = (count + PIECE - 1) // PIECE
    key_tile, number = _numbered(programs)
    first_tile, count, shares = first_tile[key_tile], count[key_tile], programs[key_tile]
    table = torch.stack(
        (
            base[first_of_group[key_group]][key_tile],
            torch.maximum(key, low[key_group])[key_tile],
            stop[key_tile],
            first_tile + count * number // shares,
            first_tile + count * (number + 1) // shares,
            key_tile,
        ),
        dim=1,
    )
    parts = torch.zeros(len(programs) + 1, dtype=torch.int32, device="cpu")
    parts[1:] = programs.cumsum(0)
    device = segments.table.device
    return KeyTiles(to_device(table, device), to_device(parts, device))


def _chunks(segments: QuerySegments, size: int, tokens: int, column: str) -> list[Chunk]:
    start, length, position = segments.host[segments.host[:, 1] > 0][:, :3].unbind(1)
    begin = torch.arange(0, segments.num_queries, size, device="cpu")
    end = (begin + size).clamp(max=segments.num_queries)
    # Positions ascend in a segment: the highest of a chunk ends it, or ends a segment in it.
    at_end = torch.searchsorted(start + length, end - 1, right=True)
    last = (position - start)[at_end] + end - 1
    of_end = (start + length - 1) // size
    last = last.scatter_reduce(0, of_end, position + length - 1, "amax")
    first_rows = query_tiles(segments, tokens, column).host[:, 0].contiguous()
    first_tile = torch.searchsorted(first_rows, begin, right=True) - 1
    end_tile = torch.searchsorted(first_rows, end)
    columns = (begin, end, first_tile, end_tile, last)
    return [Chunk(*row) for row in torch.stack(columns, dim=1).tolist()]


def precision(x: Tensor) -> str:
    """How a dot of this dtype is computed: float32 exactly, never in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr, BY_ITSELF: tl.constexpr = False):
    """acc + a b. In float32 the product is summed by itself and then added.

    One running sum through all tiles would round as often as it has terms; a plain addition would
    be made one by the compiler. BY_ITSELF does so in every dtype: for an acc that a loop sets back
    to zero, ptxas would let every wgmma that adds to it wait for the one before.
    """
    if PRECISION == "ieee" or BY_ITSELF:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_tiles(b_sum, p_tile, low, high, stride, mask, PIECE_TILES: tl.constexpr):
    """b_sum + the tiles low..high-1 that stand `stride` elements apart, in pieces."""
    AT_ONCE: tl.constexpr = 8  # Loads that wait together.
    for piece in tl.range(low, high, PIECE_TILES):
        b_piece = tl.zeros_like(b_sum)
        end = tl.minimum(piece + PIECE_TILES, high)
        for first in tl.range(piece, end, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                # Not the scalars' comparison: the interpreter takes that for an integer.
                m_tile = mask & (tl.full(mask.shape, first + i, tl.int64) < end)
                b_piece += tl.load(p_tile + (first + i) * stride, mask=m_tile, other=0.0)
        b_sum += b_piece
    return b_sum


@triton.jit
def power(x, PRECISION: tl.constexpr):
    """2^x, or e^x where a dot is exact: see `logit_scale`."""
    return tl.exp(x) if PRECISION == "ieee" else tl.exp2(x)


def logit_scale(q: Tensor, scale: float) -> float:
    """What logits are multiplied by in kernels, and the log-sum-exp that they keep is counted in.

    Powers of 2 are cheaper; but rounding scale log2(e) loses digits that float32 has to keep.
    """
    return scale if q.dtype == torch.float32 else scale * LOG2E


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


def last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

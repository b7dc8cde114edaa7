"""Parts: fixed pieces of the stream, whose gradients are added in an order that no split changes.

With ``exact_gradients = M`` every row (every document with ``zigzag_per_document``) is cut into 2M
equal parts. A chunk of every layout over 1, 2, 4, ... M ranks is 2M/P or M/P parts: a power of two
of them, from a multiple of it on. So a tree of sums over pairs of parts has a node for each chunk,
and ranks that add their own parts, then one another's chunks, add in the order of that one tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_dist.plan.grid import Grid
from nsa_dist.plan.layout import Layout, chunk_starts, concat_ranges
from nsa_dist.plan.stream import Stream
from nsa_kernels import QuerySegments, Segment

if TYPE_CHECKING:
    from nsa_dist.plan.tables import BlockOwnership


@dataclass(frozen=True, eq=False)
class InParts:
    """An order of rows that has the rows of a part together, and parts in ascending order.

    Attributes:
        order: int64 [rows], which row stands where; None if rows are in that order already.
        back: int64 [rows], its inverse.
        sizes: rows of each part.
    """

    order: Tensor | None
    back: Tensor | None
    sizes: tuple[int, ...]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [rows, ...] by part."""
        if self.order is not None:
            x = x.index_select(0, self.order)
        return x.split(self.sizes)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        x = torch.cat(parts)
        return x if self.back is None else x.index_select(0, self.back)


@dataclass(frozen=True, eq=False)
class Reads:
    """The rows of a buffer that each part reads: gradients of the others are zero.

    Attributes:
        rows: [first, end) of each part.
        segments: the part's, which count the buffer's rows from ``first`` on.
    """

    rows: tuple[tuple[int, int], ...]
    segments: tuple[QuerySegments, ...] = ()


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts that a rank holds.

    Attributes:
        most_ranks: M, the option's value.
        owners: rank of each chunk of the layout, in the order of the stream.
        chunks: this rank's chunks, ascending.
        per_chunk: parts of a chunk, a power of two.
        queries: this rank's local tokens by part.
        blocks: this rank's own compression blocks by part, that of their first token.
        reads: by reader. ``window`` reads rows of its set, ``compressed`` compressed tokens,
            ``selected`` own rows of its set, ``blocks`` (the compression of ``blocks``) rows of
            its set.
        fetches: whether queries of each part may choose blocks of other ranks.
    """

    most_ranks: int
    owners: tuple[int, ...]
    chunks: tuple[int, ...]
    per_chunk: int
    queries: InParts
    blocks: InParts | None
    reads: Mapping[str, Reads]
    fetches: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.chunks) * self.per_chunk


def parts_layout(name: str, most_ranks: int) -> Layout:
    """The layout whose chunks are parts, each owned by its number."""
    return Layout(name, tuple(range(2 * most_ranks)), name == "zigzag_per_document")


def parts_problem(
    name: str, most_ranks: int, batch: int, length: int, cu_seqlens: Tensor | None
) -> str | None:
    """The error for a stream that cannot be cut into equal parts, or None.

    Args:
        cu_seqlens: checked boundaries on the CPU.
    """
    multiple = 2 * most_ranks
    must = (
        f"must be a multiple of {multiple} with exact_gradients={most_ranks} and layout {name!r} "
        "(make_sharding(exact_gradients=) pads to it)"
    )
    if name == "zigzag_per_document" and cu_seqlens is not None:
        rest = cu_seqlens.diff() % multiple
        if not bool(rest.any()):
            return None
        at = int(rest.nonzero()[0])
        got = int(cu_seqlens[at + 1] - cu_seqlens[at])
        return f"document length {must}, got {got} (document {at})"
    return f"sequence length {must}, got {length}" if length % multiple else None


def build_parts(
    stream: Stream,
    layout: Layout,
    rank: int,
    most_ranks: int,
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    segments: QuerySegments,
    window: int | None,
    grids: Mapping[str, Grid],
    blocks: Mapping[str, BlockOwnership],
) -> Parts:
    """A rank's parts. Lengths must have passed ``parts_problem``.

    Args:
        layout: by which the stream is split over ranks.
        segments: all of the rank's.
        window: of the window branch; None without it.
        grids, blocks: by name.
    """
    starts, part_of = chunk_starts(parts_layout(layout.name, most_ranks), batch, length, cu_seqlens)

    def part_at(coordinates: Tensor) -> Tensor:
        return part_of[torch.searchsorted(starts, coordinates, right=True) - 1]

    chunks = tuple(chunk for chunk, owner in enumerate(layout.owners) if owner == rank)
    per_chunk = 2 * most_ranks // len(layout.owners)
    held = torch.tensor([c * per_chunk + i for c in chunks for i in range(per_chunk)])

    def in_parts(coordinates: Tensor) -> tuple[InParts, Tensor]:
        part = torch.searchsorted(held, part_at(coordinates))
        order = part.argsort(stable=True)
        sizes = tuple(torch.bincount(part, minlength=len(held)).tolist())
        if bool((order.diff() == 1).all()):
            return InParts(None, None, sizes), part
        return InParts(order, order.argsort(), sizes), part

    mine = stream.run_rank == rank
    first = stream.run_start[mine]
    queries, part = in_parts(concat_ranges(first, stream.run_end[mine] - first))
    of_parts = _segments_of_parts(segments, part, len(held))
    reads = {}
    if window is not None:

        def of_window(position: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
            return position - window + 1, end

        reads["window"] = _reads(of_parts, "window_base", of_window)
    own_blocks = None
    if "compressed" in grids:
        grid, of = grids["compressed"], blocks["compressed"]

        def of_tokens(_: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(end), (end - grid.block) // grid.stride + 1

        reads["compressed"] = _reads(of_parts, "compressed_base", of_tokens)
        own_blocks, part = in_parts(_block_starts(stream, grid)[of.own_ids])
        reads["blocks"] = Reads(
            tuple(
                (int(rows.min()), int(rows.max()) + grid.block) if len(rows) else (0, 0)
                for rows in (of.own_rows[part == number] for number in range(len(held)))
            )
        )
    fetches: tuple[bool, ...] = ()
    if "selected" in grids:
        reads["selected"], fetches = _choices(of_parts, grids["selected"], blocks["selected"], rank)
    return Parts(
        most_ranks=most_ranks,
        owners=layout.owners,
        chunks=chunks,
        per_chunk=per_chunk,
        queries=queries,
        blocks=own_blocks,
        reads=reads,
        fetches=fetches,
    )


def _reads(
    of_parts: Sequence[Tensor], column: str, keys: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Reads:
    """What parts read of a buffer in which a document's key 0 is at row ``column``.

    Args:
        of_parts: a table of segments of each part.
        keys: (position of the first query, end of the last) -> [first key, end) of a segment.
    """
    at = Segment._fields.index(column)
    rows, segments = [], []
    for table in of_parts:
        low, high = keys(table[:, 2], table[:, 2] + table[:, 1])
        low, sees = low.clamp(min=0), high > low.clamp(min=0)
        first = int((table[:, at] + low)[sees].min()) if bool(sees.any()) else 0
        end = int((table[:, at] + high)[sees].max()) if bool(sees.any()) else 0
        rows.append((first, end))
        shifted = table.clone()
        shifted[:, at] -= first
        segments.append(QuerySegments.from_table(shifted))
    return Reads(tuple(rows), tuple(segments))


def _choices(
    of_parts: Sequence[Tensor], grid: Grid, blocks: BlockOwnership, rank: int
) -> tuple[Reads, tuple[bool, ...]]:
    """Own rows up to the last block that each part may choose, and whether it may choose blocks of
    other ranks."""
    is_other = torch.zeros(blocks.total + 1, dtype=torch.int64)
    is_other[1:] = (blocks.owner != rank).cumsum(0)
    ends = torch.zeros(len(blocks.own_ids) + 1, dtype=torch.int64)
    ends[1:] = (blocks.own_rows + blocks.lengths[blocks.own_ids]).cummax(0).values
    rows, fetches = [], []
    for table in of_parts:
        first = table[:, Segment._fields.index("selected_base")]
        end = first + (table[:, 2] + table[:, 1] - 1) // grid.stride + 1
        last = torch.searchsorted(blocks.own_ids, end)
        rows.append((0, int(ends[last].max()) if len(table) else 0))
        fetches.append(bool((is_other[end] > is_other[first]).any()))
    segments = tuple(QuerySegments.from_table(table) for table in of_parts)
    return Reads(tuple(rows), segments), tuple(fetches)


def _block_starts(stream: Stream, grid: Grid) -> Tensor:
    """Stream coordinate of the first token of each block."""
    per_doc = grid.per_document(stream.doc_length)
    return concat_ranges(torch.zeros_like(per_doc), per_doc) * grid.stride + (
        torch.repeat_interleave(stream.doc_start, per_doc)
    )


def _segments_of_parts(segments: QuerySegments, part: Tensor, count: int) -> list[Tensor]:
    """The segments, cut where parts end, as a table [.., 6] of each part's rows alone.

    Args:
        part: int64 [N], of each local row.
    """
    table = segments.host
    of_row = torch.repeat_interleave(torch.arange(len(table)), table[:, 1])
    opens = torch.ones(len(part), dtype=torch.bool)
    opens[1:] = (part.diff() != 0) | (of_row.diff() != 0)
    start = opens.nonzero().squeeze(1)
    end = torch.cat((start[1:], torch.tensor([len(part)])))[: len(start)]
    cut = table[of_row[start]].clone()
    cut[:, 2] += start - cut[:, 0]
    cut[:, 1] = end - start
    of_parts = []
    for number in range(count):
        own = cut[part[start] == number]
        own[:, 0] = own[:, 1].cumsum(0) - own[:, 1]
        of_parts.append(own)
    return of_parts

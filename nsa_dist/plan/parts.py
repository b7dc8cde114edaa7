"""Parts: fixed pieces of the stream, whose gradients are added in an order that no split changes.

With ``exact_gradients = M`` every row (every document with ``zigzag_per_document``) is cut into 2M
equal parts. A chunk of every layout over 1, 2, 4, ... M ranks is 2M/P or M/P parts: a power of two
of them, from a multiple of it on. So a tree of sums over pairs of parts has a node for each chunk,
and ranks that add their own parts, then one another's chunks, add in the order of that one tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.plan.grid import Grid
from nsa_dist.plan.layout import Layout, chunk_starts, concat_ranges
from nsa_dist.plan.stream import Stream
from nsa_kernels import QuerySegments


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
class Parts:
    """The parts that a rank holds.

    Attributes:
        most_ranks: M, the option's value.
        owners: rank of each chunk of the layout, in the order of the stream.
        chunks: this rank's chunks, ascending.
        per_chunk: parts of a chunk, a power of two.
        queries: this rank's local tokens by part.
        segments: those of each part.
        blocks: this rank's own blocks of each grid by part, that of their first token.
    """

    most_ranks: int
    owners: tuple[int, ...]
    chunks: tuple[int, ...]
    per_chunk: int
    queries: InParts
    segments: tuple[QuerySegments, ...]
    blocks: Mapping[str, InParts]

    def __len__(self) -> int:
        return len(self.segments)


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
    grids: Mapping[str, Grid],
    own_ids: Mapping[str, Tensor],
) -> Parts:
    """A rank's parts. Lengths must have passed ``parts_problem``.

    Args:
        layout: by which the stream is split over ranks.
        segments: all of the rank's.
        own_ids: of its blocks, by grid.
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
    return Parts(
        most_ranks=most_ranks,
        owners=layout.owners,
        chunks=chunks,
        per_chunk=per_chunk,
        queries=queries,
        segments=_segments_of_parts(segments, part, len(held)),
        blocks={
            name: in_parts(_block_starts(stream, grids[name])[own_ids[name]])[0] for name in grids
        },
    )


def _block_starts(stream: Stream, grid: Grid) -> Tensor:
    """Stream coordinate of the first token of each block."""
    per_doc = grid.per_document(stream.doc_length)
    return concat_ranges(torch.zeros_like(per_doc), per_doc) * grid.stride + (
        torch.repeat_interleave(stream.doc_start, per_doc)
    )


def _segments_of_parts(
    segments: QuerySegments, part: Tensor, count: int
) -> tuple[QuerySegments, ...]:
    """The segments, cut where parts end, of each part's rows alone.

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
        of_parts.append(QuerySegments.from_table(own))
    return tuple(of_parts)

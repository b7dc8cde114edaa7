"""The whole stream, split into the pieces that ranks hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.plan.layout import Layout, chunk_starts


@dataclass(frozen=True, eq=False)
class Stream:
    """The whole stream, split into pieces: maximal intervals within one document and one chunk.

    ``piece_*`` are in stream order. ``run_*`` join adjacent pieces of one rank and document,
    ordered by rank, then stream; ``run_row`` is a run's first row on its rank.
    """

    total: int
    doc_start: Tensor
    doc_length: Tensor
    piece_start: Tensor
    piece_end: Tensor
    piece_owner: Tensor
    run_start: Tensor
    run_end: Tensor
    run_rank: Tensor
    run_doc: Tensor
    run_row: Tensor

    def run_positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each run's first and end position in its document, and the document's length."""
        first = self.run_start - self.doc_start[self.run_doc]
        return first, first + (self.run_end - self.run_start), self.doc_length[self.run_doc]

    def owner_of(self, coordinates: Tensor) -> Tensor:
        at = torch.searchsorted(self.piece_start, coordinates, right=True) - 1
        return self.piece_owner[at]


def cut_stream(
    layout: Layout, size: int, batch: int, length: int, cu_seqlens: Tensor | None
) -> Stream:
    """The stream of [batch, length] tokens, split by ``layout`` over ``size`` ranks."""
    if cu_seqlens is None:
        boundaries = torch.arange(batch + 1) * length
    else:
        boundaries = cu_seqlens.long()
    return cut_at(*chunk_starts(layout, batch, length, cu_seqlens), boundaries, size)


def cut_at(starts: Tensor, owners: Tensor, boundaries: Tensor, size: int) -> Stream:
    """The stream, split into chunks that may be unequal.

    Args:
        starts: int64 [chunks], ascending, with empty chunks; the first is 0.
        owners: int64 [chunks], the rank of each.
        boundaries: int64 [documents + 1].
    """
    total = int(boundaries[-1])
    piece_start = torch.unique_consecutive(torch.cat((starts, boundaries)).sort().values)
    piece_start = piece_start[piece_start < total]
    piece_end = torch.cat((piece_start[1:], torch.tensor([total])))[: len(piece_start)]
    # right=True passes over empty chunks and documents, which start where their successor does.
    piece_owner = owners[torch.searchsorted(starts, piece_start, right=True) - 1]
    piece_doc = torch.searchsorted(boundaries, piece_start, right=True) - 1

    order = piece_owner.argsort(stable=True)
    start, end, rank, doc = (x[order] for x in (piece_start, piece_end, piece_owner, piece_doc))
    held = torch.zeros(size, dtype=torch.int64).index_add(0, rank, end - start)
    row = (end - start).cumsum(0) - (end - start) - (held.cumsum(0) - held)[rank]
    joined = (end[:-1] == start[1:]) & (rank[:-1] == rank[1:]) & (doc[:-1] == doc[1:])
    opens = torch.cat((torch.ones(len(start[:1]), dtype=torch.bool), ~joined))
    closes = torch.cat((~joined, torch.ones(len(start[:1]), dtype=torch.bool)))
    return Stream(
        total=total,
        doc_start=boundaries[:-1],
        doc_length=boundaries.diff(),
        piece_start=piece_start,
        piece_end=piece_end,
        piece_owner=piece_owner,
        run_start=start[opens],
        run_end=end[closes],
        run_rank=rank[opens],
        run_doc=doc[opens],
        run_row=row[opens],
    )

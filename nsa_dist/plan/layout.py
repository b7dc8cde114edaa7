"""Layouts: how a stream of tokens is split over ranks.

A layout splits every row (or every document) into equal chunks and gives each chunk an owner.
``build.py`` derives halos, owners of blocks and buffer rows from that alone, so a new layout is a
new tuple of owners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nsa_dist.checks import as_choice

LayoutName = Literal["contiguous", "zigzag", "zigzag_per_document"]


@dataclass(frozen=True)
class Layout:
    """Equal chunks and their owners.

    Args:
        name: the name in options and errors.
        owners: chunk i belongs to rank ``owners[i]``; every rank owns the same number of chunks.
        per_document: split each document instead of each row.
    """

    name: str
    owners: tuple[int, ...]
    per_document: bool = False

    @property
    def multiple(self) -> int:
        """Lengths (of rows, or of documents) must be multiples of this."""
        return len(self.owners)


def make_layout(name: str, size: int) -> Layout:
    """The layout called ``name`` over ``size`` ranks.

    ``zigzag`` gives rank r the chunks r and 2P-1-r of 2P, which balances causal work.
    ``zigzag_per_document`` does so within each document (Megatron's layout of packed batches).
    One rank holds everything in one chunk under any name, so it takes any length.

    Raises:
        ValueError: if the name is unknown.
    """
    name = as_choice("layout", name, get_args(LayoutName))
    forward = tuple(range(size))
    if size == 1:
        return Layout(name, forward)
    if name == "contiguous":
        return Layout(name, forward)
    return Layout(name, forward + forward[::-1], per_document=name == "zigzag_per_document")


def check_cu_seqlens(cu_seqlens: Tensor) -> str | None:
    """The error for document boundaries that are no sorted int32 vector from 0, or None."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        return (
            "cu_seqlens must be an int32 vector of at least two boundaries, got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if int(cu_seqlens[0]) != 0:
        return f"cu_seqlens must start at 0, got first boundary {int(cu_seqlens[0])}"
    steps = cu_seqlens.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        pair = cu_seqlens[at : at + 2].tolist()
        return f"cu_seqlens must be sorted, got {pair[0]} before {pair[1]}"
    return None


def check_batch_size(batch: int) -> str | None:
    """The error for ``cu_seqlens`` of one row with a batch of this size, or None."""
    return None if batch == 1 else f"cu_seqlens must come with batch size 1, got batch size {batch}"


def check_row_starts(batch: int, length: int, cu_seqlens: Tensor) -> str | None:
    """The error for boundaries of a batch in which a document reaches past its row, or None.

    Args:
        length: tokens T of each whole row, over all ranks.
        cu_seqlens: int32 [documents + 1] on the CPU, checked, up to batch * length.
    """
    starts = torch.arange(batch, dtype=cu_seqlens.dtype) * length
    missing = starts[~torch.isin(starts, cu_seqlens)]
    if not missing.numel():
        return None
    return (
        f"cu_seqlens must hold the start of each of the {batch} rows of {length} tokens "
        f"(boundaries count tokens row after row), got none at {int(missing[0])}"
    )


def check_lengths(layout: Layout, batch: int, length: int, cu_seqlens: Tensor | None) -> str | None:
    """The error for a stream of [batch, length] that ``layout`` cannot split, or None.

    Args:
        length: tokens T of each whole row, over all ranks.
        cu_seqlens: int32 [documents + 1] on the CPU, over the rows one after another; None if each
            row is one document.
    """
    if cu_seqlens is not None:
        problem = check_cu_seqlens(cu_seqlens)
        if problem is not None:
            return problem
        if int(cu_seqlens[-1]) != batch * length:
            whole = f"{length}" if batch == 1 else f"{batch * length} ({batch} rows of {length})"
            return (
                f"cu_seqlens must end at the whole stream's length {whole} (add a document for "
                f"the padding), got last boundary {int(cu_seqlens[-1])}"
            )
        problem = check_row_starts(batch, length, cu_seqlens)
        if problem is not None:
            return problem
    multiple = layout.multiple
    if not layout.per_document or cu_seqlens is None:
        if length % multiple:
            return (
                f"sequence length must be a multiple of {multiple} with layout {layout.name!r} "
                f"(shard() pads to it), got {length}"
            )
        return None
    rest = cu_seqlens.diff() % multiple
    if bool(rest.any()):
        at = int(rest.nonzero()[0])
        length = int(cu_seqlens[at + 1] - cu_seqlens[at])
        return (
            f"document length must be a multiple of {multiple} with layout {layout.name!r} "
            f"(shard() pads to it), got {length} (document {at})"
        )
    return None


def chunk_starts(
    layout: Layout, batch: int, length: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The start of each chunk in the whole stream of batch*length tokens, and its owner.

    Args:
        cu_seqlens: int32 [documents + 1] over that stream; None if each row is one document.

    Returns:
        starts int64 [chunks], ascending, with empty chunks; owners int64 [chunks].
    """
    pieces = layout.multiple
    if layout.per_document and cu_seqlens is not None:
        first = cu_seqlens[:-1].long()
        step = cu_seqlens.diff().long() // pieces
    else:
        first = torch.arange(batch) * length
        step = torch.full((batch,), length // pieces)
    starts = first[:, None] + step[:, None] * torch.arange(pieces)
    owners = torch.tensor(layout.owners).expand(first.numel(), pieces)
    return starts.flatten(), owners.flatten()


def local_indices(
    layout: Layout, rank: int, batch: int, length: int, cu_seqlens: Tensor | None
) -> Tensor:
    """Columns of the whole rows that ``rank`` holds, in its order.

    Returns:
        int64 [length / P], equal for all rows of the batch.
    """
    starts, owners = chunk_starts(layout, 1, length, cu_seqlens)
    ends = torch.cat((starts[1:], torch.tensor([length])))
    return concat_ranges(starts[owners == rank], (ends - starts)[owners == rank])


def concat_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated ranges [start, start + length), int64."""
    total = int(lengths.sum())
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths, output_size=total) + torch.arange(
        total
    )

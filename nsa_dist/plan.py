"""Who holds what, worked out on the CPU once for a batch and shared by all its layers.

The plan is a pure function of the config's block grid, the layout, the number of ranks and the
document boundaries: no communication, no device. Every rank computes the same tables for all
ranks, which is how a sender knows what a receiver lacks without being asked.

Letters: N local tokens, P ranks, C compressed tokens of the whole stream, B selection blocks of
the whole stream, E rows of a halo-extended buffer. A *stream coordinate* counts the tokens of the
whole batch, row after row. A block belongs to the rank that holds its first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist.config import BRANCHES, NSAConfig
from nsa_dist.layout import Layout, chunk_starts, concat_ranges
from nsa_dist.statement import Statement
from nsa_kernels import QuerySegments


@dataclass(frozen=True, eq=False)
class Halo:
    """One exchange of the tokens around local runs, and the buffer that it fills.

    Attributes:
        num_rows: E.
        own_rows: int64 [N], row of the extended buffer at which each local token stands.
        send_rows: int64 [sum(send_counts)], local tokens to send, by receiving rank.
        send_counts: tokens for each rank.
        recv_rows: int64 [sum(recv_counts)], rows at which received tokens stand, by sending rank.
        recv_counts: tokens from each rank.
        is_local: no rank needs any token of another.
        is_identity: and the extended buffer is the local tensor as it stands.
    """

    num_rows: int
    own_rows: Tensor
    send_rows: Tensor
    send_counts: tuple[int, ...]
    recv_rows: Tensor
    recv_counts: tuple[int, ...]
    is_local: bool
    is_identity: bool


@dataclass(frozen=True, eq=False)
class BlockOwnership:
    """All blocks of one grid (compression or selection) over the whole stream, and their owners.

    Blocks are numbered through the stream, document after document.

    Attributes:
        counts: blocks of each rank.
        owner: int64 [blocks].
        by_rank: int64 [blocks], block ids ordered by owner, then id.
        gathered_rows: int64 [blocks], where each stands in a gather of runs padded to max(counts).
        lengths: int64 [blocks], tokens of each; a document's last selection block may be short.
        own_ids: int64 [counts[rank]].
        own_index: int64 [counts[rank]], number of each own block within its document.
        own_rows: int64 [counts[rank]], row of the extended buffer at which each own block starts.
    """

    counts: tuple[int, ...]
    owner: Tensor
    by_rank: Tensor
    gathered_rows: Tensor
    lengths: Tensor
    own_ids: Tensor
    own_index: Tensor
    own_rows: Tensor

    @property
    def total(self) -> int:
        """Blocks of the whole stream."""
        return sum(self.counts)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that one rank's forward and backward need to know about the split.

    Attributes:
        config, rank, size: what it was made for.
        batch, local_length: rows and tokens a row that this rank holds; N is their product.
        longest: tokens of the longest document.
        segments: runs of local queries at consecutive positions (see ``nsa_kernels``).
        positions: int64 [N], position of each local token in its document.
        documents: int64 [N], number of its document.
        selected_base: int64 [N], id of its document's selection block 0.
        halos: one for each key branch; the same object for all where K, V is shared.
        compressed: the compression blocks; None where no branch needs them.
        selected: the selection blocks; None where the branch is not used.
        statement: everything that all ranks must agree on, printed.
    """

    config: NSAConfig
    rank: int
    size: int
    batch: int
    local_length: int
    longest: int
    segments: QuerySegments
    positions: Tensor
    documents: Tensor
    selected_base: Tensor
    halos: Mapping[str, Halo]
    compressed: BlockOwnership | None
    selected: BlockOwnership | None
    statement: Statement = field(default_factory=lambda: Statement({}))

    def __str__(self) -> str:
        """The call and the batch, as errors name them."""
        return str(self.statement)

    def to(self, device: torch.device) -> Plan:
        """The same plan with its index tensors on ``device``."""
        memo: dict[int, Any] = {}
        return _move(self, device, memo)


def _move(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    """Move every tensor of a nested plan, once for each object that is shared."""
    if id(value) in memo:
        return memo[id(value)]
    moved: Any
    if isinstance(value, (Tensor, QuerySegments)):
        moved = value.to(device)
    elif isinstance(value, Mapping):
        moved = {k: _move(v, device, memo) for k, v in value.items()}
    elif isinstance(value, (Plan, Halo, BlockOwnership)):
        moved = replace(
            value, **{f.name: _move(getattr(value, f.name), device, memo) for f in fields(value)}
        )
    else:
        return value
    memo[id(value)] = moved
    return moved


@dataclass(frozen=True, eq=False)
class _Stream:
    """The whole stream cut into pieces: maximal runs of one document and one chunk.

    ``piece_*`` are in stream order. ``run_*`` are pieces joined where a rank holds both sides of
    a cut, ordered by rank, then stream; ``run_row`` is a run's first row on its rank.
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

    def owner_of(self, coordinates: Tensor) -> Tensor:
        at = torch.searchsorted(self.piece_start, coordinates, right=True) - 1
        return self.piece_owner[at]


def _cut_stream(
    layout: Layout, size: int, batch: int, length: int, cu_seqlens: Tensor | None
) -> _Stream:
    total = batch * length
    if cu_seqlens is None:
        boundaries = torch.arange(batch + 1) * length
    else:
        boundaries = cu_seqlens.long()
    starts, owners = chunk_starts(layout, batch, length, cu_seqlens)

    cuts = starts
    if not (layout.per_document and cu_seqlens is not None):
        cuts = torch.cat((starts, boundaries)).sort().values
    piece_start = torch.unique_consecutive(cuts)
    piece_start = piece_start[piece_start < total]
    piece_end = torch.cat((piece_start[1:], torch.tensor([total])))[: len(piece_start)]
    # right=True passes over empty chunks and documents, which start where their successor does.
    piece_owner = owners[torch.searchsorted(starts, piece_start, right=True) - 1]
    piece_doc = torch.searchsorted(boundaries, piece_start, right=True) - 1

    order = piece_owner.argsort(stable=True)
    start, end, rank, doc = (x[order] for x in (piece_start, piece_end, piece_owner, piece_doc))
    row = (end - start).cumsum(0) - (end - start) - rank * (total // size)
    joined = (end[:-1] == start[1:]) & (rank[:-1] == rank[1:]) & (doc[:-1] == doc[1:])
    opens = torch.cat((torch.ones(len(start[:1]), dtype=torch.bool), ~joined))
    closes = torch.cat((~joined, torch.ones(len(start[:1]), dtype=torch.bool)))
    return _Stream(
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


def _reach(stream: _Stream, config: NSAConfig, branch: str) -> tuple[Tensor, Tensor]:
    """Tokens that each run needs for a branch, itself included, as document positions [lo, hi)."""
    first = stream.run_start - stream.doc_start[stream.run_doc]
    end = first + (stream.run_end - stream.run_start)
    length = stream.doc_length[stream.run_doc]
    if branch == "window":
        return (first - config.window + 1).clamp(min=0), end
    if branch == "compressed":
        block, stride = config.compress_block, config.compress_stride
        # The last block that starts inside the run and has all its tokens.
        last = torch.minimum((end - 1) // stride, (length - block) // stride) * stride
        block_end = last + block
    else:
        block = config.select_block
        last = (end - 1) // block * block
        block_end = torch.minimum(last + block, length)
    return first, torch.where(last >= first, torch.maximum(end, block_end), end)


def _overlaps(
    starts: Tensor, ends: Tensor, wanted_start: Tensor, wanted_end: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs (wanted interval, given interval) that share tokens; both inputs sorted, disjoint."""
    low = torch.searchsorted(ends, wanted_start, right=True)
    count = (torch.searchsorted(starts, wanted_end) - low).clamp(min=0)
    wanted = torch.repeat_interleave(torch.arange(len(count)), count)
    return wanted, concat_ranges(low, count)


class _HaloBuilder:
    """Extended buffers of one need: intervals of the stream on every rank, rows on this one."""

    def __init__(self, stream: _Stream, reaches: list[tuple[Tensor, Tensor]], rank: int) -> None:
        base = stream.doc_start[stream.run_doc]
        low = torch.stack([lo for lo, _ in reaches]).amin(0) + base
        high = torch.stack([hi for _, hi in reaches]).amax(0) + base
        # Runs that need common tokens share one interval, so that a token stands in one row and
        # its gradient has one place. Offsetting by rank keeps the running maximum within a rank.
        apart = (stream.total + 1) * stream.run_rank
        reached = (high + apart).cummax(0).values
        opens = torch.ones(len(low), dtype=torch.bool)
        opens[1:] = (low + apart)[1:] > reached[:-1]
        closes = torch.ones(len(low), dtype=torch.bool)
        closes[:-1] = opens[1:]
        self.rank_of = stream.run_rank[opens]
        self.start = low[opens]
        self.end = (reached - apart)[closes]
        mine = self.rank_of == rank
        self.own_start, self.own_end = self.start[mine], self.end[mine]
        lengths = self.own_end - self.own_start
        self.own_offset = lengths.cumsum(0) - lengths
        self.num_rows = int(lengths.sum())
        self.stream, self.rank = stream, rank

    def rows(self, coordinates: Tensor) -> Tensor:
        """Rows of this rank's buffer at which tokens of the stream stand."""
        at = torch.searchsorted(self.own_start, coordinates, right=True) - 1
        return self.own_offset[at] + coordinates - self.own_start[at]

    def build(self, size: int) -> Halo:
        stream, rank = self.stream, self.rank
        mine = stream.run_rank == rank
        run_start, run_end = stream.run_start[mine], stream.run_end[mine]
        own_rows = concat_ranges(self.rows(run_start), run_end - run_start)
        is_local = int((self.end - self.start).sum()) == stream.total
        empty = torch.zeros(0, dtype=torch.int64)
        if is_local:
            in_order = bool((own_rows == torch.arange(len(own_rows))).all())
            none = (0,) * size
            return Halo(self.num_rows, own_rows, empty, none, empty, none, True, in_order)

        wanted, piece = _overlaps(
            stream.piece_start, stream.piece_end, self.own_start, self.own_end
        )
        remote = stream.piece_owner[piece] != rank
        wanted, piece = wanted[remote], piece[remote]
        order = stream.piece_owner[piece].argsort(stable=True)
        wanted, piece = wanted[order], piece[order]
        start = torch.maximum(stream.piece_start[piece], self.own_start[wanted])
        count = torch.minimum(stream.piece_end[piece], self.own_end[wanted]) - start
        recv_rows = concat_ranges(self.rows(start), count)
        recv_counts = _totals(stream.piece_owner[piece], count, size)

        others = self.rank_of != rank
        asker, low, high = self.rank_of[others], self.start[others], self.end[others]
        wanted, run = _overlaps(run_start, run_end, low, high)
        start = torch.maximum(run_start[run], low[wanted])
        count = torch.minimum(run_end[run], high[wanted]) - start
        first_row = stream.run_row[mine][run] + start - run_start[run]
        send_rows = concat_ranges(first_row, count)
        send_counts = _totals(asker[wanted], count, size)
        return Halo(
            self.num_rows, own_rows, send_rows, send_counts, recv_rows, recv_counts, False, False
        )


def _totals(rank: Tensor, count: Tensor, size: int) -> tuple[int, ...]:
    total = torch.zeros(size, dtype=torch.int64).index_add_(0, rank, count)
    return tuple(total.tolist())


def _own_blocks(
    stream: _Stream, halo: _HaloBuilder, per_doc: Tensor, step: int, block: int, size: int
) -> BlockOwnership:
    """Number the blocks of a grid with ``per_doc`` blocks a document, ``step`` tokens apart."""
    total = int(per_doc.sum())
    doc = torch.repeat_interleave(torch.arange(len(per_doc)), per_doc, output_size=total)
    index = torch.arange(total) - (per_doc.cumsum(0) - per_doc)[doc]
    start = stream.doc_start[doc] + index * step
    owner = stream.owner_of(start)
    counts = torch.bincount(owner, minlength=size)
    by_rank = owner.argsort(stable=True)
    within = torch.arange(total) - (counts.cumsum(0) - counts)[owner[by_rank]]
    gathered_rows = torch.empty(total, dtype=torch.int64)
    gathered_rows[by_rank] = owner[by_rank] * int(counts.max()) + within
    own_ids = (owner == halo.rank).nonzero().squeeze(1)
    return BlockOwnership(
        counts=tuple(counts.tolist()),
        owner=owner,
        by_rank=by_rank,
        gathered_rows=gathered_rows,
        lengths=(stream.doc_length[doc] - index * step).clamp(max=block),
        own_ids=own_ids,
        own_index=index[own_ids],
        own_rows=halo.rows(start[own_ids]),
    )


def build_plan(
    config: NSAConfig,
    layout: Layout,
    rank: int,
    size: int,
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
) -> Plan:
    """Work out one rank's plan. Lengths must have passed ``layout.check_lengths``.

    Args:
        length: tokens T of each whole row, over all ranks.
        cu_seqlens: int32 [documents + 1] on the CPU, or None for one document a row.

    Returns:
        A plan on the CPU.
    """
    stream = _cut_stream(layout, size, batch, length, cu_seqlens)
    branches = config.key_branches
    reaches = {b: _reach(stream, config, b) for b in branches}
    if config.independent_kv:
        builders = {b: _HaloBuilder(stream, [reaches[b]], rank) for b in branches}
        halos = {b: builder.build(size) for b, builder in builders.items()}
    else:
        builder = _HaloBuilder(stream, list(reaches.values()), rank)
        builders = dict.fromkeys(branches, builder)
        halos = dict.fromkeys(branches, builder.build(size))

    block, stride, select = config.compress_block, config.compress_stride, config.select_block
    compressed_per_doc = ((stream.doc_length - block) // stride + 1).clamp(min=0)
    selected_per_doc = (stream.doc_length + select - 1) // select
    compressed = selected = None
    if "compressed" in builders:
        compressed = _own_blocks(
            stream, builders["compressed"], compressed_per_doc, stride, block, size
        )
    if "selected" in builders:
        selected = _own_blocks(stream, builders["selected"], selected_per_doc, select, select, size)

    mine = stream.run_rank == rank
    doc, start = stream.run_doc[mine], stream.run_start[mine]
    count = stream.run_end[mine] - start
    position = start - stream.doc_start[doc]
    selected_base = (selected_per_doc.cumsum(0) - selected_per_doc)[doc]
    compressed_base = (compressed_per_doc.cumsum(0) - compressed_per_doc)[doc]
    window_base = torch.zeros_like(position)
    if "window" in builders:
        window_base = builders["window"].rows(start) - position
    table = torch.stack(
        (stream.run_row[mine], count, position, compressed_base, selected_base, window_base), dim=1
    )
    num_queries = batch * (length // size)

    def of_tokens(values: Tensor) -> Tensor:
        return torch.repeat_interleave(values, count, output_size=num_queries)

    return Plan(
        config=config,
        rank=rank,
        size=size,
        batch=batch,
        local_length=length // size,
        longest=max(stream.doc_length.tolist(), default=0),
        segments=QuerySegments.from_table(table),
        positions=concat_ranges(position, count),
        documents=of_tokens(doc),
        selected_base=of_tokens(selected_base),
        halos={b: halos[b] for b in BRANCHES if b in halos},
        compressed=compressed,
        selected=selected,
    )

"""Build the plan of a batch on the CPU; all layers share it.

It is a pure function of the block grids, the layout, the number of ranks and the document
boundaries, without communication or device. Every rank computes the tables of all ranks, so a
sender knows what a receiver needs without a request.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.plan.grid import Grid, all_grids, key_sets
from nsa_dist.plan.halo import HaloBuilder, grid_reach, window_reach
from nsa_dist.plan.layout import Layout, concat_ranges
from nsa_dist.plan.parts import build_parts
from nsa_dist.plan.stream import Stream, cut_stream
from nsa_dist.plan.tables import BlockOwnership, Plan, VisibleBlocks
from nsa_kernels import QuerySegments


def build_plan(
    config: NSAConfig,
    layout: Layout,
    rank: int,
    size: int,
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    grids: Mapping[str, Grid] | None = None,
    exact_gradients: int = 0,
) -> Plan:
    """Build one rank's plan. Lengths must have passed ``layout.check_lengths``.

    With ``exact_gradients`` they must have passed ``parts_problem`` too.

    Args:
        length: tokens T of each whole row, over all ranks.
        cu_seqlens: int32 [documents + 1] on the CPU; None if each row is one document.
        grids: the blocks that are read, by name; None for NSA's own.
        exact_gradients: up to how many ranks gradients have the same bits; 0 for this one alone.

    Returns:
        A plan on the CPU.
    """
    stream = cut_stream(layout, size, batch, length, cu_seqlens)
    grids = all_grids(config) if grids is None else grids
    names = key_sets(config, grids)
    reaches = {
        name: [grid_reach(stream, grid) for grid in grids.values() if grid.keys == name]
        for name in names
    }
    if "window" in config.branches:
        reaches["window"].append(window_reach(stream, config.window))
    if config.independent_kv:
        builders = {name: HaloBuilder(stream, reaches[name], rank) for name in names}
        halos = {name: builder.build(size) for name, builder in builders.items()}
    else:
        builder = HaloBuilder(stream, [x for name in names for x in reaches[name]], rank)
        builders = dict.fromkeys(names, builder)
        halos = dict.fromkeys(names, builder.build(size))

    mine = stream.run_rank == rank
    doc, start = stream.run_doc[mine], stream.run_start[mine]
    count = stream.run_end[mine] - start
    position = start - stream.doc_start[doc]
    num_queries = batch * (length // size)

    def of_tokens(values: Tensor) -> Tensor:
        return torch.repeat_interleave(values, count, output_size=num_queries)

    blocks, bases = {}, {}
    for name, grid in grids.items():
        per_doc = grid.per_document(stream.doc_length)
        bases[name] = (per_doc.cumsum(0) - per_doc)[doc]
        blocks[name] = _own_blocks(
            stream, builders[grid.keys], grid, per_doc, of_tokens(bases[name]), size
        )
    window_base = torch.zeros_like(position)
    if "window" in builders:
        window_base = builders["window"].rows(start) - position
    unused = torch.zeros_like(position)
    compressed_base = bases.get("compressed", unused)
    selected_base = bases.get("selected", unused)
    table = torch.stack(
        (stream.run_row[mine], count, position, compressed_base, selected_base, window_base), dim=1
    )
    segments = QuerySegments.from_table(table)
    parts = None
    if exact_gradients:
        parts = build_parts(
            stream,
            layout,
            rank,
            exact_gradients,
            batch,
            length,
            cu_seqlens,
            segments,
            config.window if "window" in config.branches else None,
            grids,
            blocks,
        )
    return Plan(
        config=config,
        rank=rank,
        size=size,
        batch=batch,
        local_length=length // size,
        longest=max(stream.doc_length.tolist(), default=0),
        segments=segments,
        positions=concat_ranges(position, count),
        documents=of_tokens(doc),
        halos=halos,
        grids=blocks,
        visible=_visible_blocks(stream, grids["selected"], blocks["selected"], rank, size)
        if size > 1 and "selected" in grids
        else None,
        parts=parts,
    )


def _visible_blocks(
    stream: Stream, grid: Grid, blocks: BlockOwnership, rank: int, size: int
) -> VisibleBlocks:
    """A rank may choose the blocks that begin before its last query of their document ends."""
    num_docs = len(stream.doc_length)
    per_doc = grid.per_document(stream.doc_length)
    doc = torch.repeat_interleave(torch.arange(num_docs), per_doc, output_size=blocks.total)
    start = (torch.arange(blocks.total) - (per_doc.cumsum(0) - per_doc)[doc]) * grid.stride
    _, end, _ = stream.run_positions()
    last = torch.zeros(size * num_docs, dtype=torch.int64)
    last = last.scatter_reduce(0, stream.run_rank * num_docs + stream.run_doc, end, "amax")
    visible = start < last.view(size, num_docs)[:, doc]
    visible &= blocks.owner != torch.arange(size)[:, None]
    owner, visible = blocks.owner[blocks.by_rank], visible[:, blocks.by_rank]
    tokens = visible * blocks.lengths[blocks.by_rank]
    recv = torch.zeros(size, dtype=torch.int64).index_add(0, owner, tokens[rank])
    return VisibleBlocks(
        by_reader=visible,
        send_tokens=tuple(tokens[:, owner == rank].sum(-1).tolist()),
        recv_tokens=tuple(recv.tolist()),
        send_blocks=tuple(visible[:, owner == rank].sum(-1).tolist()),
    )


def _own_blocks(
    stream: Stream, halo: HaloBuilder, grid: Grid, per_doc: Tensor, bases: Tensor, size: int
) -> BlockOwnership:
    """Number the blocks of a grid with ``per_doc`` blocks per document, and find their owners."""
    total = int(per_doc.sum())
    doc = torch.repeat_interleave(torch.arange(len(per_doc)), per_doc, output_size=total)
    index = torch.arange(total) - (per_doc.cumsum(0) - per_doc)[doc]
    start = stream.doc_start[doc] + index * grid.stride
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
        lengths=(stream.doc_length[doc] - index * grid.stride).clamp(max=grid.block),
        own_ids=own_ids,
        own_index=index[own_ids],
        own_rows=halo.rows(start[own_ids]),
        bases=bases,
    )

"""The plan, worked out on the CPU once for a batch and shared by all its layers.

It is a pure function of the config's block grids, the layout, the number of ranks and the document
boundaries: no communication, no device. Every rank computes the same tables for all ranks, which
is how a sender knows what a receiver lacks without being asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_dist.config import BRANCHES, NSAConfig
from nsa_dist.plan.halo import HaloBuilder, reach
from nsa_dist.plan.layout import Layout, concat_ranges
from nsa_dist.plan.stream import Stream, cut_stream
from nsa_dist.plan.tables import BlockOwnership, Plan
from nsa_kernels import QuerySegments


def _own_blocks(
    stream: Stream, halo: HaloBuilder, per_doc: Tensor, step: int, block: int, size: int
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
    stream = cut_stream(layout, size, batch, length, cu_seqlens)
    branches = config.key_branches
    reaches = {b: reach(stream, config, b) for b in branches}
    if config.independent_kv:
        builders = {b: HaloBuilder(stream, [reaches[b]], rank) for b in branches}
        halos = {b: builder.build(size) for b, builder in builders.items()}
    else:
        builder = HaloBuilder(stream, list(reaches.values()), rank)
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

"""How many tokens of selected blocks each rank fetches from each other, by simulation.

Letters: P ranks, G KV heads, B selection blocks of the whole stream, S its tokens, n chosen blocks
of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_dist.comm.nodes import Nodes
from nsa_dist.plan.layout import concat_ranges
from nsa_dist.plan.stream import Stream

Choices = Literal["all", "random", "coherent"]
FRESH = 1.2 / 7
"""Of coherent choices, the share of n that a query chooses otherwise than its neighbour: eight
neighbours choose 2.2 times the blocks of one (docs/benchmarks.md), the first one's and seven times
this share."""
SURE = 1 - 1e-12


def fetched_tokens(
    config: NSAConfig, stream: Stream, size: int, choices: Choices | Tensor
) -> Tensor:
    """Tokens that a rank receives of each owner: float64 [P, owner, G], 0 of its own.

    A rank fetches, for each KV head, the blocks of others that any of its queries chooses.

    Args:
        stream: split over ``size`` ranks.
        choices: how queries choose: ``all`` visible blocks; at ``random`` beside the forced ones,
            as the mean over draws; ``coherent``, as random, but most blocks are the neighbour's; or
            recorded ones, integer [S, G, n] of the whole stream, blocks counted from their
            document's start, ascending, then -1.
    """
    heads = config.num_kv_heads
    result = torch.zeros(size, size, heads, dtype=torch.float64)
    if size == 1 or "selected" not in config.branches:
        return result
    blocks = _Blocks.of(config, stream)
    for rank in range(size):
        wanted = _wanted(config, stream, rank, choices, blocks)
        result[rank].index_add_(0, blocks.owner, wanted * blocks.lengths[:, None])
        result[rank, rank] = 0
    return result


def carried_tokens(
    config: NSAConfig, stream: Stream, nodes: Nodes, choices: Choices | Tensor
) -> Tensor:
    """Tokens that a rank receives of owners in other nodes for all ranks of its own: float64
    [P, owner, G].

    A block that some rank of a node wants comes once, to the rank with its owner's place.

    Args:
        stream, choices: as for ``fetched_tokens``, over the ranks of the nodes.
    """
    size, heads = len(nodes.of_rank), config.num_kv_heads
    result = torch.zeros(size, size, heads, dtype=torch.float64)
    if "selected" not in config.branches:
        return result
    blocks = _Blocks.of(config, stream)
    for ranks in nodes.members:
        missed = torch.ones(blocks.total, heads, dtype=torch.float64)
        for rank in ranks:
            missed *= 1 - _wanted(config, stream, rank, choices, blocks)
        tokens = torch.zeros(size, heads, dtype=torch.float64)
        tokens.index_add_(0, blocks.owner, (1 - missed) * blocks.lengths[:, None])
        for rank in ranks:
            others = [owner for owner in nodes.counterparts(rank) if owner != rank]
            result[rank, others] = tokens[others]
    return result


def full_gather_tokens(stream: Stream, size: int) -> float:
    """Tokens that a rank receives of one KV head where all are gathered, mean of ranks."""
    return stream.total * (1 - 1 / size)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Selection blocks of the whole stream.

    Attributes:
        bases: int64 [documents], number of the first block of each.
        index: int64 [B], within its document.
        ends: int64 [B], one past the last block of its document.
        lengths, owner: int64 [B], tokens and rank of each.
    """

    bases: Tensor
    index: Tensor
    ends: Tensor
    lengths: Tensor
    owner: Tensor

    @classmethod
    def of(cls, config: NSAConfig, stream: Stream) -> _Blocks:
        select = config.select_block
        per_document = (stream.doc_length + select - 1) // select
        ends = per_document.cumsum(0)
        doc = torch.repeat_interleave(torch.arange(len(per_document)), per_document)
        index = torch.arange(len(doc)) - (ends - per_document)[doc]
        first = index * select
        lengths = (stream.doc_length[doc] - first).clamp(max=select)
        owner = stream.owner_of(stream.doc_start[doc] + first)
        return cls(ends - per_document, index, ends[doc], lengths, owner)

    @property
    def total(self) -> int:
        return len(self.index)


def _wanted(
    config: NSAConfig, stream: Stream, rank: int, choices: Choices | Tensor, blocks: _Blocks
) -> Tensor:
    """The probability that a rank wants each block, float64 [B, G]."""
    if isinstance(choices, Tensor):
        return _union(choices, stream, rank, blocks)
    of_blocks = _probability(config, stream, rank, choices, blocks)
    return of_blocks[:, None].expand(-1, config.num_kv_heads)


def _union(choices: Tensor, stream: Stream, rank: int, blocks: _Blocks) -> Tensor:
    """Whether some query of a rank chose each block: float64 [B, G]."""
    mine = stream.run_rank == rank
    start, count = stream.run_start[mine], (stream.run_end - stream.run_start)[mine]
    chosen = choices[concat_ranges(start, count)]
    bases = torch.repeat_interleave(blocks.bases[stream.run_doc[mine]], count)
    wanted = torch.zeros(chosen.shape[1], blocks.total + 1, dtype=torch.float64)
    ids = torch.where(chosen >= 0, chosen + bases[:, None, None], blocks.total).long()
    wanted.scatter_(1, ids.transpose(0, 1).flatten(1), 1.0)
    return wanted[:, :-1].T


def _probability(
    config: NSAConfig, stream: Stream, rank: int, choices: Choices, blocks: _Blocks
) -> Tensor:
    """The probability that a query of a rank chooses each block, float64 [B]."""
    select, index = config.select_block, blocks.index
    mine = stream.run_rank == rank
    position = (stream.run_start - stream.doc_start[stream.run_doc])[mine]
    count, base = (stream.run_end - stream.run_start)[mine], blocks.bases[stream.run_doc[mine]]

    def later(values: Tensor, ahead: int) -> Tensor:
        """Of each block, the sum over those at least ``ahead`` after it in its document."""
        sums = torch.cat((values.new_zeros(1), values.cumsum(0)))
        here = torch.arange(blocks.total) + ahead
        return sums[blocks.ends] - sums[torch.minimum(here, blocks.ends)]

    own = torch.repeat_interleave(base, count) + concat_ranges(position, count) // select
    queries = torch.bincount(own, minlength=blocks.total).double()
    visible = later(queries, 0) > 0
    if choices == "all":
        return visible.double()
    local = config.num_local_blocks
    forced = config.num_init_blocks + local
    eligible = (index + 1 - forced).clamp(min=1).double()
    free = float(config.num_selected - forced)
    drawn = free if choices == "random" else min(free, FRESH * config.num_selected)
    certain = index + 1 <= config.num_selected  # A query with no more blocks takes all.
    miss = torch.log1p(-torch.where(certain, SURE, (drawn / eligible).clamp(max=SURE)))
    misses = torch.where(queries > 0, queries * miss, 0.0)
    if choices == "coherent":  # The first query of each run chooses anew.
        at = base + position // select
        misses.index_add_(0, at, torch.log1p(-(free / eligible[at]).clamp(max=SURE)))
    near = later(queries, 0) - later(queries, local) > 0.5
    wanted = 1 - torch.exp(later(misses, local))
    wanted[near | (index < config.num_init_blocks)] = 1.0
    return wanted * visible

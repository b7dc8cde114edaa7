"""How many tokens of selected blocks each rank fetches from each other, from plans alone.

Letters: P ranks, G KV heads, B selection blocks of the whole stream, n chosen blocks of a query,
N local tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_dist.plan import Plan

Choices = Literal["all", "random", "coherent"]
FRESH = 1.2 / 7
"""Of coherent choices, the share of n that a query chooses otherwise than its neighbour: eight
neighbours choose 2.2 times the blocks of one (docs/benchmarks.md), the first one's and seven times
this share."""
SURE = 1 - 1e-12


def fetched_tokens(
    config: NSAConfig, plans: Sequence[Plan], choices: Choices | Tensor, boundaries: Tensor
) -> Tensor:
    """Tokens that a rank receives of each owner: float64 [P, owner, G], 0 of its own.

    Args:
        plans: of all ranks.
        choices: how queries choose: ``all`` visible blocks; at ``random`` beside the forced ones,
            as the mean over draws; ``coherent``, as random, but most blocks are the neighbour's; or
            recorded ones, integer [token, G, n] of one document, blocks ascending, then -1.
        boundaries: int64 [documents + 1] of the whole stream.
    """
    size, heads = plans[0].size, config.num_kv_heads
    result = torch.zeros(size, size, heads, dtype=torch.float64)
    if size == 1 or "selected" not in config.branches:
        return result
    for plan in plans:
        blocks = plan.grids["selected"]
        if isinstance(choices, Tensor):
            wanted = _union(choices[plan.positions], blocks.total)
        else:
            wanted = _probability(config, plan, choices, boundaries)[:, None].expand(-1, heads)
        tokens = wanted * blocks.lengths[:, None]
        result[plan.rank].index_add_(0, blocks.owner, tokens)
        result[plan.rank, plan.rank] = 0
    return result


def full_gather_tokens(plan: Plan) -> int:
    """Tokens that a rank receives of one KV head where all are gathered."""
    return plan.batch * plan.local_length * (plan.size - 1)


def _union(chosen: Tensor, total: int) -> Tensor:
    """Whether some query chose each block: float64 [B, G] of integer [N, G, n]."""
    wanted = torch.zeros(chosen.shape[1], total + 1, dtype=torch.float64)
    ids = torch.where(chosen >= 0, chosen, total).long()
    wanted.scatter_(1, ids.transpose(0, 1).flatten(1), 1.0)
    return wanted[:, :total].T


def _probability(config: NSAConfig, plan: Plan, choices: Choices, boundaries: Tensor) -> Tensor:
    """The probability that a query of this rank chooses each block, float64 [B]."""
    blocks, select = plan.grids["selected"], config.select_block
    per_document = (boundaries.diff() + select - 1) // select
    ends = per_document.cumsum(0).repeat_interleave(per_document)
    index = torch.arange(blocks.total) - (ends - per_document.repeat_interleave(per_document))

    def later(values: Tensor, ahead: int) -> Tensor:
        """Of each block, the sum over those at least ``ahead`` after it in its document."""
        sums = torch.cat((values.new_zeros(1), values.cumsum(0)))
        return sums[ends] - sums[torch.minimum(torch.arange(blocks.total) + ahead, ends)]

    own = blocks.bases + plan.positions // select
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
        for segment in plan.segments.rows:
            at = segment.selected_base + segment.position // select
            misses[at] += torch.log1p(-(free / eligible[at]).clamp(max=SURE))
    near = later(queries, 0) - later(queries, local) > 0.5
    wanted = 1 - torch.exp(later(misses, local))
    wanted[near | (index < config.num_init_blocks)] = 1.0
    return wanted * visible

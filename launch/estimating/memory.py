"""Memory of one attention call on one rank, by formulas (docs/distributed.md, 'Memory').

The test in tests/distributed/test_kept_memory.py holds what is kept to 10%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.estimating.traffic import SplitOptions
from nsa_dist import NSAConfig
from nsa_dist.attention.call import HEADS_IN_FLIGHT
from nsa_dist.plan import Plan

WORKSPACE = 200 << 20
"""What kernels take beside their results (docs/performance.md)."""
BYTES_A_HEAD = 32
"""Tables, log-sum-exps and gates' gradients of a token, for each of its query heads (there)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one attention call on one rank, over its inputs.

    Attributes:
        parts: what is kept until backward: ``output``; ``results`` of branches with their
            log-sum-exps; ``choices`` of blocks; keys and values with ``halos``; ``compressed``
            ones; ``fetched`` ones.
        peak: the most at one time, in backward.
    """

    parts: Mapping[str, float]
    peak: float

    @property
    def kept(self) -> float:
        """All that is kept."""
        return sum(self.parts.values())


def attention_memory(
    config: NSAConfig,
    plan: Plan,
    element_size: int,
    options: SplitOptions,
    *,
    fetched: float = 0.0,
    sent: float = 0.0,
) -> Memory:
    """Memory of a call of the Triton kernels.

    Args:
        fetched, sent: tokens that the rank fetches, and that others fetch of it, added over KV
            heads.
    """
    tokens = plan.batch * plan.local_length
    branches = len(config.branches)
    output = float(tokens * config.num_heads * config.value_dim * element_size)
    width = (config.head_dim + config.value_dim) * element_size
    row = config.num_kv_heads * width
    halos = [*plan.halos.values()] if config.independent_kv else [*plan.halos.values()][:1]
    parts = dict.fromkeys(("output", "results", "choices", "halos", "compressed", "fetched"), 0.0)
    parts["output"] = output
    kept = branches - len(set(options.recompute_branches) & set(config.branches))
    parts["results"] = kept * (output + tokens * config.num_heads * 4)
    if "selected" in config.branches:
        parts["choices"] = float(tokens * config.num_kv_heads * config.num_selected * 4)
        if not options.fetches_again(config, plan.size):
            parts["fetched"] = fetched * width
    parts["halos"] = float(sum(halo.num_rows * row for halo in halos if not halo.is_identity))
    if config.uses_compression:
        parts["compressed"] = float(plan.grids["compressed"].total * row)

    # The output; the branches' results, in whose place the gradients of queries come, one for each
    # branch; and one of these more, or in the end their sum.
    query = float(tokens * config.num_heads * config.head_dim * element_size)
    large = output + max(kept * output, branches * query) + query
    tables = tokens * config.num_heads * BYTES_A_HEAD
    # Until all are there, those that came stay: of compressed keys, of the selected branch, and of
    # the window, over ranks with what was gathered of neighbours.
    gradients = parts["compressed"] + row * tokens * ("selected" in config.branches)
    if plan.size == 1:
        gradients += row * tokens * ("window" in config.branches)
        return Memory(parts, large + WORKSPACE + tables + gradients)
    gathered = parts["halos"] + parts["compressed"]
    gradients += parts["halos"]
    fetching = in_flight(config, fetched, sent, options, plan.size) * width
    return Memory(parts, large + WORKSPACE + tables + gathered + gradients + fetching)


def in_flight(
    config: NSAConfig, fetched: float, sent: float, options: SplitOptions, size: int
) -> float:
    """Tokens of fetched blocks and of their gradients in memory at one time in backward, at most.

    That is at the second head in backward's order: its blocks and those of all heads to come (of
    the next one alone, if blocks are fetched again), its gradients, and the two ends of the first
    head's message: what this rank returns, and what others return to it.
    """
    heads = config.num_kv_heads
    of_head, returned = fetched / heads, sent / heads
    if heads == 1:
        return of_head + max(of_head, returned)
    blocks = heads - 1
    if options.fetches_again(config, size):
        blocks = min(blocks, HEADS_IN_FLIGHT)
    return (blocks + 2) * of_head + returned

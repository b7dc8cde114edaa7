"""Bytes between ranks of one attention call, by kind, from the plans of all ranks.

The kinds and the counting are those of ``CommunicationCounter``: what a rank receives from others,
with the padding that a collective needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_dist.attention.call import fetches_again
from nsa_dist.comm.nodes import Nodes
from nsa_dist.plan import Plan, build_plan
from nsa_dist.plan.layout import check_lengths, make_layout
from nsa_dist.plan.stream import Stream, cut_stream

FORWARD = ("plan", "halo", "gather", "request", "fetch", "share")
BACKWARD = (
    *("plan_grad", "halo_grad", "gather_grad"),
    *("fetch_again", "share_again", "share_grad", "fetch_grad"),
)
"""In forward and in backward. The counter adds backward's plan and second fetch to forward's."""
PLAN_BYTES = 16
EQUAL = ("owner", "by_rank", "gathered_rows", "lengths")
"""Tables of ``BlockOwnership`` that do not depend on the rank."""


@dataclass(frozen=True)
class SplitOptions:
    """How a call over ranks trades bytes, memory and time, as of ``NativeSparseAttention``."""

    fetch: str = "chosen"
    fetch_again: bool | None = None
    recompute_branches: tuple[str, ...] = ()

    def fetches_again(self, config: NSAConfig, size: int) -> bool:
        """Whether backward fetches blocks again, over ``size`` ranks."""
        return fetches_again(config, self.fetch_again, size)


def plans_of_all(
    config: NSAConfig, layout: str, size: int, length: int, boundaries: Tensor | None
) -> list[Plan]:
    """The plan of every rank for one stream of ``length`` tokens.

    Raises:
        ValueError: if the layout cannot split it, with the multiple that it needs.
    """
    cut = make_layout(layout, size)
    problem = check_lengths(cut, 1, length, boundaries)
    if problem is not None:
        raise ValueError(problem)
    plans: list[Plan] = []
    for rank in range(size):
        plan = build_plan(config, cut, rank, size, 1, length, boundaries)
        # Tables that are equal on all ranks are kept once: a hundred copies would fill the host.
        grids = {
            name: replace(grid, **{field: getattr(plans[0].grids[name], field) for field in EQUAL})
            if plans
            else grid
            for name, grid in plan.grids.items()
        }
        plans.append(replace(plan, grids=grids))
    return plans


def split_stream(layout: str, size: int, length: int, boundaries: Tensor | None) -> Stream:
    """The stream of ``plans_of_all``."""
    return cut_stream(make_layout(layout, size), size, 1, length, boundaries)


@dataclass(frozen=True, eq=False)
class Traffic:
    """What ranks receive of one call, in bytes.

    Attributes:
        received: by kind, float64 [P, P]: from the rank of the second index.
    """

    received: dict[str, Tensor]

    def of_rank(self, kind: str) -> Tensor:
        """float64 [P], from all others."""
        return self.received[kind].sum(1)

    def total(self, kinds: Sequence[str]) -> Tensor:
        """float64 [P], of several kinds."""
        return torch.stack([self.of_rank(kind) for kind in kinds]).sum(0)

    def across(self, kind: str, node: int) -> Tensor:
        """float64 [P], what comes from ranks outside of a rank's ``node`` neighbouring ranks."""
        places = torch.arange(len(self.received[kind])) // node
        return (self.received[kind] * (places[:, None] != places)).sum(1)


def count_traffic(
    config: NSAConfig,
    plans: Sequence[Plan],
    fetched: Tensor,
    element_size: int,
    options: SplitOptions,
    nodes: Nodes | None = None,
    carried: Tensor | None = None,
) -> Traffic:
    """Bytes of one forward and backward.

    Args:
        plans: of all ranks.
        fetched: tokens [P, owner, G], from ``choices.fetched_tokens``.
        element_size: bytes of an element of keys and values.
        options: what is fetched, and how often.
        nodes: where links have two levels and chosen blocks are fetched once a node.
        carried: tokens [P, owner, G] of these, from ``choices.carried_tokens``.
    """
    size, heads = len(plans), config.num_kv_heads
    nothing = torch.zeros(size, size, dtype=torch.float64)
    received = {kind: nothing.clone() for kind in (*FORWARD, *BACKWARD)}
    if size == 1:
        return Traffic(received)
    others = 1 - torch.eye(size, dtype=torch.float64)
    for kind in ("plan", "plan_grad"):
        received[kind] += PLAN_BYTES * others

    halos = dict(plans[0].halos) if config.independent_kv else dict([*plans[0].halos.items()][:1])
    for name in halos:
        in_use = name in config.branches or not config.independent_kv
        width = heads * (config.head_dim + (config.value_dim if in_use else 0)) * element_size
        counts = [plan.halos[name].recv_counts for plan in plans]
        moved = width * torch.tensor(counts, dtype=torch.float64)
        received["halo"] += moved
        received["halo_grad"] += moved.T

    if config.uses_compression:
        in_use = "compressed" in config.branches
        width = heads * (config.head_dim + (config.value_dim if in_use else 0)) * element_size
        owned = torch.tensor(plans[0].grids["compressed"].counts, dtype=torch.float64)
        received["gather"] += width * owned.max() * others
        received["gather_grad"] += width * owned[:, None] * others
    if "selected" in config.branches:
        owned = torch.tensor(plans[0].grids["selected"].counts, dtype=torch.float64)
        width = (config.head_dim + config.value_dim) * element_size
        moved, shared = fetched.sum(-1) * width, nothing
        asked = owned[:, None] * others
        if nodes is not None:
            assert carried is not None
            moved, shared = _over_nodes(moved, carried.sum(-1) * width, nodes)
            asked = _asked_over_nodes(owned, nodes)
        if options.fetch != "full":
            received["request"] += heads * asked
        again = options.fetches_again(config, size)
        for kind, tokens in (("fetch", moved), ("share", shared)):
            received[kind] += tokens
            received[f"{kind}_grad"] += tokens.T
            if again:
                received[f"{kind}_again"] += tokens
    return Traffic(received)


def _over_nodes(wanted: Tensor, carried: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """What is fetched of owners and shared by carriers, [P, P] by receiver and sender.

    Args:
        wanted, carried: [P, owner], for a rank itself and for its node.
    """
    fetched, shared = carried.clone(), torch.zeros_like(wanted)
    for rank in range(len(wanted)):
        mates = list(nodes.mates(rank))
        fetched[rank, mates] = wanted[rank, mates]
        for mate in mates:
            if mate != rank:
                owners = [owner for owner in nodes.counterparts(mate) if owner != mate]
                shared[rank, mate] = wanted[rank, owners].sum()
    return fetched, shared


def _asked_over_nodes(owned: Tensor, nodes: Nodes) -> Tensor:
    """Blocks of a head that a rank is asked for, [P, P] by receiver and sender of the requests."""
    asked = torch.zeros(len(owned), len(owned), dtype=torch.float64)
    for rank in range(len(owned)):
        counterparts = list(nodes.counterparts(rank))
        asked[rank, list(nodes.mates(rank))] = owned[counterparts].sum()
        asked[rank, counterparts] = owned[rank]
        asked[rank, rank] = 0
    return asked

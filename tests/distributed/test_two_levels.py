"""The fetch over nodes of several ranks: once a node, then shared inside it.

Nodes are emulated: ``ranks_per_node`` says which ranks of one machine are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import BRANCHES
from nsa_dist.comm.nodes import Nodes, nodes_of_neighbours
from tests.distributed.layer_case import (
    LayerCase,
    LayerResult,
    assert_results_close,
    run_built_layer,
    run_layer,
    token_owners,
    variants,
)
from tests.distributed.ranks import Ranks
from tests.distributed.test_communication import padded_length

RanksOf = Callable[[int], Ranks]

HEADS = 4
PACKED = (1, 60, 3, 97, 0, 45, 11)
CASE = variants(LayerCase(lengths=PACKED), num_kv_heads=HEADS, num_heads=2 * HEADS)
LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
SPLITS = {"2x2": (4, 2), "2x4": (8, 4), "4x2": (8, 2)}
"""Nodes x ranks of each, as (ranks, ranks of a node)."""
OPTIONS: dict[str, dict[str, Any]] = {
    "kept": {"fetch_again": False},
    "fetched-again": {"fetch_again": True},
    "recomputed": {"fetch_again": True, "recompute_branches": BRANCHES},
}
CASES = {
    f"{layout}-{name}": replace(CASE, layout=layout, lengths=lengths)
    for layout in LAYOUTS
    for name, lengths in (("one-document", None), ("packed", PACKED))
}
EMPTY = {
    "nobody-fetches": (40,) * 4,
    "one-fetches": (40, 40, 60, 20),
    "no-block-of-compression": (*[3] * 40, 40),
    "padding-alone": (5,),
    "ranks-without-tokens": (3, 1),
}
"""Documents in contiguous chunks."""


def equal(a: LayerResult, b: LayerResult) -> bool:
    tensors = [(a.output, b.output), (a.grad_input, b.grad_input)]
    tensors += [(a.grads[name], b.grads[name]) for name in a.grads]
    return all(torch.equal(x, y) for x, y in tensors)


@dataclass
class Found:
    """Of one rank: whether the forward's bits are those of one level, whether two runs have the
    same bits, and the result on rank 0."""

    same_forward: bool
    repeats: bool
    result: LayerResult | None


def over_nodes(case: LayerCase, ranks_per_node: int, options: dict[str, Any]) -> Found:
    group = dist.group.WORLD
    one_level = run_layer(case, group, ranks_per_node=1, **options)
    results = [run_layer(case, group, ranks_per_node=ranks_per_node, **options) for _ in range(2)]
    same = torch.equal(results[0].output, one_level.output)
    return Found(same, equal(*results), results[0] if dist.get_rank() == 0 else None)


# --- bytes ----------------------------------------------------------------------------------------

COUNTED = replace(CASE, lengths=(48, 64, 48))


@dataclass
class Counted:
    """Choices of the whole stream, and what one rank received and sent, in bytes by kind."""

    selected: Tensor
    received: dict[str, int]
    far: dict[str, int]
    far_sent: dict[str, int]


def counted(case: LayerCase, ranks_per_node: int, options: dict[str, Any]) -> Counted:
    group = dist.group.WORLD
    layer = case.layer(group, ranks_per_node=ranks_per_node, **options)
    result = run_built_layer(layer, case, group)
    assert result.selected is not None
    counter = layer.communication
    return Counted(
        result.selected,
        dict(counter.received),
        dict(counter.received_between_nodes),
        dict(counter.sent_between_nodes),
    )


def chosen_tokens(selected: Tensor, case: LayerCase, size: int) -> list[dict[tuple[int, ...], int]]:
    """Of each rank, the tokens of the blocks that it chose, by (head, document, block, owner)."""
    owner, select = token_owners(case, size), case.config.select_block
    assert case.cu_seqlens is not None
    found: list[dict[tuple[int, ...], int]] = [{} for _ in range(size)]
    for d, start in enumerate(case.cu_seqlens[:-1].tolist()):
        for t, rank in enumerate(owner[d]):
            for g in range(HEADS):
                for j in set(selected[0, start + t, g].tolist()) - {-1}:
                    tokens = min(select, padded_length(case, size, d) - j * select)
                    found[rank][g, d, j, owner[d][j * select]] = tokens
    return found


def expected_tokens(chosen: list[dict[tuple[int, ...], int]], nodes: Nodes, rank: int) -> list[int]:
    """What a rank receives of its node's owners, of other nodes, and shared by its node."""
    wanted = chosen[rank]
    near = sum(n for key, n in wanted.items() if key[-1] != rank and nodes.together(key[-1], rank))
    union: dict[tuple[int, ...], int] = {}
    for mate in nodes.mates(rank):
        union |= chosen[mate]
    carries = set(nodes.counterparts(rank)) - {rank}
    far = sum(n for key, n in union.items() if key[-1] in carries)
    shared = sum(
        n
        for key, n in wanted.items()
        if not nodes.together(key[-1], rank) and key[-1] not in carries
    )
    return [near, far, shared]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_crosses_nodes_once_for_all_who_chose_it(
    layout: str, split: str, ranks_of: RanksOf
) -> None:
    (size, ranks_per_node), case = SPLITS[split], replace(COUNTED, layout=layout)
    nodes = nodes_of_neighbours(ranks_per_node, size)
    assert nodes is not None
    found = ranks_of(size).run(counted, case, ranks_per_node, {"fetch_again": False})
    chosen = chosen_tokens(found[0].selected, case, size)
    width = (case.config.head_dim + case.config.value_dim) * case.dtype.itemsize
    for rank, one in enumerate(found):
        near, far, shared = expected_tokens(chosen, nodes, rank)
        assert one.received["fetch"] == width * (near + far)
        assert one.far["fetch"] == width * far
        assert one.received["share"] == width * shared
        assert one.far["share"] == one.far["share_grad"] == 0
        # Gradients return by the way that the blocks came.
        assert one.far_sent["fetch_grad"] == one.far["fetch"]
        assert one.far["fetch_grad"] == one.far_sent["fetch"]
    assert sum(one.received["share"] for one in found) > 0
    assert sum(one.received["share_grad"] for one in found) > 0


def test_bytes_between_nodes_are_counted_on_one_level_too(ranks_of: RanksOf) -> None:
    """``fetch="full"`` stays on one level, beside which two are compared."""
    nodes = nodes_of_neighbours(2, 4)
    assert nodes is not None
    full = ranks_of(4).run(counted, COUNTED, 2, {"fetch": "full", "fetch_again": False})
    two = ranks_of(4).run(counted, COUNTED, 2, {"fetch_again": False})
    for rank, (one, by_nodes) in enumerate(zip(full, two, strict=True)):
        assert "share" not in one.received and "request" not in one.received
        # Each kind between nodes is a part of all that was received; halos and gathers as before.
        assert all(one.far[kind] <= one.received[kind] for kind in one.far)
        assert one.received["gather"] == by_nodes.received["gather"]
        others = 4 - len(nodes.mates(rank))
        assert one.far["gather"] * 3 == one.received["gather"] * others
    far = sum(one.far["fetch"] for one in full)
    assert sum(one.received["fetch"] for one in full) > far
    assert far > sum(one.far["fetch"] for one in two) > 0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_two_levels_change_no_bit_of_forward(name: str, split: str, ranks_of: RanksOf) -> None:
    size, ranks_per_node = SPLITS[split]
    found = ranks_of(size).run(over_nodes, CASES[name], ranks_per_node, OPTIONS["kept"])
    assert all(one.same_forward and one.repeats for one in found)
    assert_results_close(found[0].result, run_layer(CASES[name]), 1e-12)

"""Nodes: which ranks of a group share the fast level of links.

Links inside a node are several times as fast as those between nodes. A ``Nodes`` says which ranks
are together, by the ``ranks_per_node`` of the layer, by a DeviceMesh with the dimensions
``MESH_DIMENSIONS``, or by the hosts that the ranks of a group find themselves on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MESH_DIMENSIONS = ("node", "local")
"""Names of the dimensions of a DeviceMesh of nodes and their ranks."""


@dataclass(frozen=True)
class Nodes:
    """Two nodes or more of equally many ranks, at least two.

    Attributes:
        of_rank: the node of each rank of the group, counted from 0.
    """

    of_rank: tuple[int, ...]

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node, ascending."""
        found: list[list[int]] = [[] for _ in range(max(self.of_rank) + 1)]
        for rank, node in enumerate(self.of_rank):
            found[node].append(rank)
        return tuple(map(tuple, found))

    def mates(self, rank: int) -> tuple[int, ...]:
        """The ranks of a rank's node, itself included."""
        return self.members[self.of_rank[rank]]

    def counterparts(self, rank: int) -> tuple[int, ...]:
        """The ranks with the same place in their node, itself included, node after node."""
        place = self.mates(rank).index(rank)
        return tuple(ranks[place] for ranks in self.members)

    def together(self, a: int, b: int) -> bool:
        """Whether two ranks are in one node."""
        return self.of_rank[a] == self.of_rank[b]


def ranks_per_node_problem(ranks_per_node: object, size: int, *, of_mesh: bool) -> str | None:
    """The error in a number of ranks a node, for a group of ``size`` ranks, or None.

    Args:
        of_mesh: whether the group says by itself which ranks are a node.
    """
    if ranks_per_node is None:
        return None
    if of_mesh:
        return (
            f"ranks_per_node must be None with a DeviceMesh of {MESH_DIMENSIONS}, which says it "
            f"itself, got {ranks_per_node!r}"
        )
    if type(ranks_per_node) is not int or ranks_per_node < 1 or size % ranks_per_node:
        return (
            f"ranks_per_node must be None or a divisor of the group's {size} ranks (1, one level, "
            f"where nodes have unequally many), got {ranks_per_node!r}"
        )
    return None


def nodes_of_neighbours(ranks_per_node: int, size: int) -> Nodes | None:
    """Nodes of as many consecutive ranks; None if that leaves one level."""
    return grouped([rank // ranks_per_node for rank in range(size)])


def grouped(names: Sequence[object]) -> Nodes | None:
    """Nodes of ranks with equal names; None if not all have equally many ranks, or if there is
    one level: one node, or one rank in each."""
    numbers: dict[object, int] = {}
    of_rank = tuple(numbers.setdefault(name, len(numbers)) for name in names)
    sizes = {of_rank.count(node) for node in range(len(numbers))}
    if len(numbers) < 2 or len(sizes) > 1 or sizes == {1}:
        return None
    return Nodes(of_rank)

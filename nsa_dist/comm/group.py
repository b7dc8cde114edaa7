"""The argument ``group=``: its process group, rank, size and device."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from nsa_dist.comm.nodes import MESH_DIMENSIONS

GroupLike = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True, eq=False)
class ContextGroup:
    """The ranks that share one sequence.

    The process group is referenced weakly, since torch holds every group until
    ``destroy_process_group``. Otherwise a layer, or the graph behind a loss, would keep a destroyed
    group and its threads. Such a thread may still hold the last reference to a tensor when the
    interpreter exits, and then aborts the process. Deep copies of a module share the group.

    Attributes:
        reference: to the process group; None for one rank.
        rank: the rank within the group, not the global one.
        size: number of ranks.
        node_of_rank: the node of each rank, where a DeviceMesh says it.
    """

    reference: weakref.ref[dist.ProcessGroup] | None
    rank: int
    size: int
    node_of_rank: tuple[int, ...] | None = None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group; None for one rank.

        Raises:
            ValueError: if it was destroyed.
        """
        if self.reference is None:
            return None
        group = self.reference()
        if group is None:
            raise ValueError("group must be a process group in use, got one that was destroyed")
        return group

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextGroup:
        return self

    @property
    def device(self) -> torch.device:
        """The device of small tensors that this group's backend can send."""
        group = self.process_group
        if group is not None and "nccl" in dist.get_backend(group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


SINGLE = ContextGroup(None, 0, 1)


def context_group(group: GroupLike | ContextGroup) -> ContextGroup:
    """Resolve a process group, a DeviceMesh, or None (one rank).

    A mesh has one dimension, or those of ``MESH_DIMENSIONS``: nodes and the ranks of each. Of the
    latter all ranks are the group, which is made at its first use, a collective of the root mesh.

    Raises:
        ValueError: if a mesh has other dimensions, if this rank is not in the group, or if the
            group is not in use.
    """
    node_of: dict[int, int] | None = None
    if group is None:
        return SINGLE
    if isinstance(group, ContextGroup):
        return group
    if isinstance(group, DeviceMesh):
        of_nodes = group.mesh_dim_names == MESH_DIMENSIONS
        if group.ndim != 1 and not of_nodes:
            raise ValueError(
                'group must be a process group, a one-dimensional DeviceMesh such as mesh["cp"], '
                f"one with dimensions {MESH_DIMENSIONS}, or None, got a mesh with dimensions "
                f"{group.mesh_dim_names or group.ndim}"
            )
        if group.get_coordinate() is None:
            raise ValueError(
                f"group must hold this rank (global rank {dist.get_rank()}), got a DeviceMesh of "
                f"ranks {group.mesh.tolist()}"
            )
        if of_nodes:
            rows = enumerate(group.mesh.tolist())
            node_of = {member: node for node, members in rows for member in members}
            group = group._flatten()
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "group must be a process group that holds this rank, a one-dimensional DeviceMesh or "
            f"None, got {group!r}"
        )
    try:
        rank = dist.get_rank(group)
    except ValueError as error:  # The group was destroyed or is of another job.
        raise ValueError(f"group must be a process group in use, got {group!r}") from error
    if rank < 0:
        raise ValueError(
            f"group must hold this rank (global rank {dist.get_rank()}), got {group!r} without it"
        )
    nodes = None
    if node_of is not None:
        nodes = tuple(node_of[member] for member in dist.get_process_group_ranks(group))
    return ContextGroup(weakref.ref(group), rank, dist.get_world_size(group), nodes)

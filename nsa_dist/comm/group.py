"""The argument ``group=``: its process group, rank, size and device."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

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
    """

    reference: weakref.ref[dist.ProcessGroup] | None
    rank: int
    size: int

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
    """Resolve a process group, a one-dimensional DeviceMesh, or None (one rank).

    Raises:
        ValueError: if a mesh has several dimensions, if this rank is not in the group, or if the
            group is not in use.
    """
    if group is None:
        return SINGLE
    if isinstance(group, ContextGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                'group must be a process group, a one-dimensional DeviceMesh such as mesh["cp"] '
                f"or None, got a mesh with dimensions {group.mesh_dim_names or group.ndim}"
            )
        if group.get_coordinate() is None:
            raise ValueError(
                f"group must hold this rank (global rank {dist.get_rank()}), got a DeviceMesh of "
                f"ranks {group.mesh.tolist()}"
            )
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
    return ContextGroup(weakref.ref(group), rank, dist.get_world_size(group))

"""What ``group=`` accepts, reduced to the four things the attention needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

GroupLike = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True, eq=False)
class ContextGroup:
    """The ranks that share one sequence.

    ``rank`` counts within the group: collectives over a subgroup never see global ranks.
    Deep copies of a module keep pointing at the same group.
    """

    process_group: dist.ProcessGroup | None
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextGroup:
        return self

    @property
    def device(self) -> torch.device:
        """Where small tensors of the plan's agreement must live for this group's backend."""
        if self.process_group is not None and "nccl" in dist.get_backend(self.process_group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


SINGLE = ContextGroup(None, 0, 1)


def context_group(group: GroupLike | ContextGroup) -> ContextGroup:
    """Resolve a process group, a one-dimensional DeviceMesh, or None (one rank).

    Raises:
        ValueError: if the mesh has several dimensions, this rank is not in the group, or it is
            none that is in use.
    """
    if group is None:
        return SINGLE
    if isinstance(group, ContextGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: found a DeviceMesh with dimensions {group.mesh_dim_names or group.ndim}; "
                'a one-dimensional mesh such as mesh["cp"], a process group or None works'
            )
        if group.get_coordinate() is None:
            raise ValueError(
                f"group: found a DeviceMesh of ranks {group.mesh.tolist()} without this rank "
                f"(global rank {dist.get_rank()}); one with this rank in it works"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: found {group!r} on a rank that is not its member, or not a group at all; "
            "a process group with this rank in it, a one-dimensional DeviceMesh or None works"
        )
    try:
        rank = dist.get_rank(group)
    except ValueError as error:  # Destroyed, or of another job.
        raise ValueError(f"group: found {group!r}; a process group in use works") from error
    if rank < 0:
        raise ValueError(
            f"group: found a group without this rank (global rank {dist.get_rank()}); "
            "a process group with this rank in it works"
        )
    return ContextGroup(group, rank, dist.get_world_size(group))

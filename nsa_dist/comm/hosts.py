"""Which ranks of a group share a host."""

from __future__ import annotations

import socket
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from nsa_dist.comm.collectives import name_failures
from nsa_dist.comm.group import ContextGroup
from nsa_dist.comm.nodes import Nodes, grouped, nodes_of_neighbours

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FEWEST_RANKS = 4
"""Of a group whose ranks can be on two hosts, two on each."""

_nodes_of_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Nodes | None] = (
    weakref.WeakKeyDictionary()
)


def find_nodes(group: ContextGroup, ranks_per_node: int | None, about: object) -> Nodes | None:
    """The nodes of a group: as told, else as its mesh says, else its hosts; None for one level.

    The group's ranks agree on what they are told. A collective the first time, if by hosts.

    Args:
        about: describes this rank's call in errors.
    """
    if group.size < FEWEST_RANKS:
        return None
    if ranks_per_node is not None:
        return nodes_of_neighbours(ranks_per_node, group.size)
    if group.node_of_rank is not None:
        return grouped(group.node_of_rank)
    return _nodes_of_hosts(group, about)


# Hidden from selective checkpointing: only the first call of a group sends a message.
@torch.compiler.disable
@_disable_current_modes()
def _nodes_of_hosts(group: ContextGroup, about: object) -> Nodes | None:
    """Ranks tell each other the names of their hosts, once a group. No counter has it."""
    process_group = group.process_group
    assert process_group is not None
    if process_group not in _nodes_of_groups:
        names: list[object] = [None] * group.size
        with name_failures("hosts", group, about):
            dist.all_gather_object(names, host_name(), group=process_group)
        _nodes_of_groups[process_group] = grouped(names)
    return _nodes_of_groups[process_group]


def host_name() -> str:
    """A name of this machine, or of the container that stands for one."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
    return f"{socket.gethostname()} {boot}"

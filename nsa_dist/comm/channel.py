"""The channel of a call: the group, the byte counter, and a description for errors."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.comm.nodes import Nodes


@dataclass(frozen=True, eq=False)
class Channel:
    """Sends one call's messages between the ranks of a group.

    Attributes:
        about: describes the call in errors; a ``Plan`` or a ``Statement``.
        nodes: which ranks share the fast level of links; None for one level.
    """

    group: ContextGroup
    counter: CommunicationCounter
    about: object
    nodes: Nodes | None = None

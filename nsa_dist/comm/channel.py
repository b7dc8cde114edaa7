"""Where messages go, how they are counted, and what errors say of them."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup


@dataclass(frozen=True, eq=False)
class Channel:
    """One call's messages between the ranks of a group.

    Attributes:
        about: printed by errors, to tell what the call was; a ``Plan`` or a ``Statement``.
    """

    group: ContextGroup
    counter: CommunicationCounter
    about: object

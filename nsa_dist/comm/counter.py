"""Counts of bytes sent between ranks, by kind of communication."""

from __future__ import annotations

from collections import defaultdict

KINDS = (
    "plan",
    "halo",
    "gather",
    "request",
    "fetch",
    "share",
    "share_grad",
    "fetch_grad",
    "gather_grad",
    "halo_grad",
    "weight_grad",
)
"""The kinds of the attention's messages; dense layers add ``ring`` and ``ring_grad``."""


class CommunicationCounter:
    """Bytes that this rank sent to and received from other ranks since the last ``reset``.

    Kinds: ``plan`` (the agreement before each forward and backward), ``halo``, ``gather``
    (compressed tokens), ``request`` (ids of selected blocks), ``fetch`` (selected blocks), and
    ``halo_grad``, ``gather_grad``, ``fetch_grad`` (gradients on the way back). With two levels of
    links ``share`` and ``share_grad`` are what ranks of a node pass on to each other; with
    ``exact_gradients`` ``weight_grad`` are gradients of the compressors' weights. Dense layers
    add ``ring`` (keys and values in forward) and ``ring_grad`` (all of backward). Padding that a
    collective needs is counted; data that a rank sends to itself is not.

    Attributes:
        sent, received: by kind.
        sent_between_nodes, received_between_nodes: what of these crosses nodes, where the nodes of
            a call are known; without the 16 bytes of an agreement.
        fetched_per_head: of ``fetch`` and ``share`` received, by KV head.
    """

    def __init__(self) -> None:
        self.sent: defaultdict[str, int] = defaultdict(int)
        self.received: defaultdict[str, int] = defaultdict(int)
        self.sent_between_nodes: defaultdict[str, int] = defaultdict(int)
        self.received_between_nodes: defaultdict[str, int] = defaultdict(int)
        self.fetched_per_head: defaultdict[int, int] = defaultdict(int)

    def add(self, kind: str, sent: int, received: int) -> None:
        """Count one transfer, in bytes."""
        self.sent[kind] += sent
        self.received[kind] += received

    def add_between_nodes(self, kind: str, sent: int, received: int) -> None:
        """Count what of a transfer crosses nodes, in bytes; ``add`` has it too."""
        self.sent_between_nodes[kind] += sent
        self.received_between_nodes[kind] += received

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.sent.clear()
        self.received.clear()
        self.sent_between_nodes.clear()
        self.received_between_nodes.clear()
        self.fetched_per_head.clear()

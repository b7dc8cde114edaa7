"""Counts of bytes sent between ranks, by kind of communication."""

from __future__ import annotations

from collections import defaultdict

KINDS = (
    "plan",
    "halo",
    "gather",
    "request",
    "fetch",
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
    ``halo_grad``, ``gather_grad``, ``fetch_grad`` (gradients on the way back); with
    ``exact_gradients`` also ``weight_grad`` (those of the compressors' weights). Dense layers add
    ``ring`` (keys and values in forward) and ``ring_grad`` (all of backward). Padding that a
    collective needs is counted; data that a rank sends to itself is not.
    """

    def __init__(self) -> None:
        self.sent: defaultdict[str, int] = defaultdict(int)
        self.received: defaultdict[str, int] = defaultdict(int)
        self.fetched_per_head: defaultdict[int, int] = defaultdict(int)

    def add(self, kind: str, sent: int, received: int) -> None:
        """Count one transfer, in bytes."""
        self.sent[kind] += sent
        self.received[kind] += received

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.sent.clear()
        self.received.clear()
        self.fetched_per_head.clear()

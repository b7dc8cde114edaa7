"""Bytes that crossed between ranks, by kind of communication."""

from __future__ import annotations

from collections import defaultdict


class CommunicationCounter:
    """Bytes this rank sent to and received from other ranks since the last ``reset``.

    Kinds: ``plan`` (agreement on what is done, before each forward and backward), ``halo``,
    ``gather`` (compressed tokens), ``request`` (which blocks are wanted), ``fetch`` (blocks), and
    ``halo_grad``, ``gather_grad``, ``fetch_grad`` for their returns; of dense layers ``ring`` (keys
    and values, forward) and ``ring_grad`` (all of backward). What a rank keeps for itself is not
    counted. Padding that a collective needs is.
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

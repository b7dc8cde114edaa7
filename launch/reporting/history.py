"""Loss, norm and bytes of the latest steps, read from the device in batches."""

from __future__ import annotations

from collections import deque
from itertools import islice

import torch
from torch import Tensor

COMMUNICATION_KINDS = (
    *("plan", "halo", "gather", "request", "fetch"),
    *("halo_grad", "gather_grad", "fetch_grad", "weight_grad", "ring", "ring_grad"),
)
"""What layers count, in the order in which a step's vector has it."""
KEPT = 100_000
"""Latest steps whose loss, norm and operations are kept: at most 10 MB."""
UNREAD = 1000
"""Steps whose numbers may stay on the device at most."""


class History:
    """Each step's vector, as ``train_step`` returns it.

    Attributes:
        losses, grad_norms, flops: of the steps read, the latest ``KEPT``.
        last: the whole vector of the last step read.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=KEPT)
        self.grad_norms: deque[float] = deque(maxlen=KEPT)
        self.flops: deque[float] = deque(maxlen=KEPT)
        self.last: list[float] = []
        self._unread: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take a step's vector; waits for the device every ``UNREAD`` steps."""
        self._unread.append(values)
        if len(self._unread) >= UNREAD:
            self.read()

    def read(self) -> None:
        """Read what has not been read; waits for the device."""
        if not self._unread:
            return
        rows = torch.stack(self._unread).tolist()
        self._unread.clear()
        self.losses.extend(row[0] for row in rows)
        self.grad_norms.extend(row[1] for row in rows)
        self.flops.extend(row[-1] for row in rows)
        self.last = rows[-1]

    def latest_losses(self, count: int) -> list[float]:
        """Losses of the last ``count`` steps read, or of as many as are kept."""
        return _latest(self.losses, count)

    def latest_flops(self, count: int) -> float:
        """Operations of the last ``count`` steps read, of which as many as are kept are taken for
        all."""
        latest = _latest(self.flops, count)
        return sum(latest) * count / len(latest)

    def received(self) -> dict[str, int]:
        """Bytes that all layers on all ranks received in the last step read, by kind."""
        received = map(int, self.last[3:-1])
        return dict(zip(COMMUNICATION_KINDS, received, strict=bool(self.last)))


def _latest(values: deque[float], count: int) -> list[float]:
    return list(islice(values, max(0, len(values) - count), None))

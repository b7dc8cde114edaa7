"""A second stream on CUDA, for work that must not wait for what the first one gets later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class Fork:
    """A point of the current stream from which a side stream goes on by itself.

    Work in ``run`` starts when the current stream has reached the point. What the current stream
    gets after it does not delay that work. Each stream has memory of its own: ``run`` names what
    the side stream reads, ``join`` what the current stream takes over, so that the allocator gives
    no memory away that the other stream still uses. On the CPU everything runs where it stands.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = _side_stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def run(self, *reads: Tensor) -> Iterator[None]:
        """Queue what follows on the side stream. It may read ``reads`` of the current stream."""
        if self._stream is None:
            yield
            return
        for tensor in reads:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    @staticmethod
    def hand_over(result: Tensor, *others: Tensor) -> Tensor:
        """``result``, once the current stream waits for the message that used these tensors.

        It need not wait for the side stream, whose memory they may be in.
        """
        if result.device.type == "cuda":
            for tensor in (result, *others):
                tensor.record_stream(torch.cuda.current_stream(result.device))
        return result

    def join(self, *results: Tensor) -> None:
        """Let the current stream wait for the side stream, whose ``results`` it may then use."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in results:
            tensor.record_stream(current)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Small kernels, which the host or a message waits for: ahead of the attention in any queue.
    return torch.cuda.Stream(device, priority=-1)

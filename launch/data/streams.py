"""Streams of packed documents, and what a split of a corpus answers wherever its tokens lie.

A stream is [1, T] tokens with the document boundaries inside it (``cu_seqlens``). A document cut
by a stream's end continues in another stream as a document of its own: nothing attends across.
Which tokens stream i holds depends on the data, the length and the seed alone, never on ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stream:
    """Packed documents.

    Args:
        tokens: int64 [1, T].
        cu_seqlens: int32 [documents + 1] on the CPU, where each document starts; the last is T.
    """

    tokens: Tensor
    cu_seqlens: Tensor


class Streams(Protocol):
    """An endless sequence of packed streams, addressed in any order.

    Attributes:
        per_epoch: streams until the documents come again.
    """

    per_epoch: int

    def __getitem__(self, index: int) -> Stream: ...


class Split(Protocol):
    """The documents to train on, or those held out."""

    @property
    def num_documents(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def streams(self, length: int, seed: int | None) -> Streams:
        """The documents as packed streams of ``length`` tokens.

        Raises:
            ValueError: if the split has fewer tokens.
        """
        ...

    def counts(self, vocab_size: int) -> Tensor:
        """float64 [vocab_size], how often each token is there."""
        ...


def join(streams: Sequence[Stream]) -> Stream:
    """Streams end to end as one; the documents stay the same."""
    offsets = torch.tensor([0, *(stream.tokens.numel() for stream in streams)]).cumsum(0)
    pieces = [s.cu_seqlens[1:] + offset for s, offset in zip(streams, offsets, strict=False)]
    cu_seqlens = torch.cat([torch.zeros(1), *pieces]).to(torch.int32)
    return Stream(torch.cat([stream.tokens for stream in streams], dim=1), cu_seqlens)

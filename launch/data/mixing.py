"""Sources of documents mixed by weight, into one endless sequence of streams.

Streams are dealt to sources in blocks of ``BLOCK``. In every block each source has the same number
of places, its share, and which places these are is a keyed permutation (permutation.py). So stream
i names its source, and which of that source's own streams it is, by arithmetic alone: nothing is
stored, and nothing depends on what was read before. Each source goes through its own epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from launch.data.permutation import Permutation
from launch.data.streams import Split, Stream, Streams
from launch.seeds import mix_seed
from nsa_dist.checks import check

BLOCK = 10_000
"""Streams within which shares are exact."""


def shares(weights: Sequence[float], option: str) -> list[int]:
    """Places of each source in a block, which add up to ``BLOCK``.

    Args:
        weights: positive; only their ratios count.
        option: that named them.

    Raises:
        ValueError: if a weight is so small that its source would have no place.
    """
    # Of the largest, so that no sum overflows.
    parts = [weight / max(weights) for weight in weights]
    exact = [part / sum(parts) * BLOCK for part in parts]
    least = min(range(len(exact)), key=exact.__getitem__)
    must = f"at least 1 / {BLOCK:,} of the sum of all weights"
    check(exact[least] >= 1, f"{option}[{least}]", weights[least], must)
    places = [int(share) for share in exact]
    # What is left goes to those that lost most by rounding down, the first of equals.
    losses = sorted(range(len(exact)), key=lambda at: (places[at] - exact[at], at))
    for at in losses[: BLOCK - sum(places)]:
        places[at] += 1
    return places


class MixedSplit:
    """The documents of several splits, of one vocabulary.

    Args:
        places: of each split in a block, as ``shares`` gives them.
    """

    def __init__(self, splits: Sequence[Split], places: Sequence[int]) -> None:
        assert sum(places) == BLOCK and len(places) == len(splits)
        self._splits, self._places = splits, places

    @property
    def num_documents(self) -> int:
        return sum(split.num_documents for split in self._splits)

    @property
    def num_tokens(self) -> int:
        return sum(split.num_tokens for split in self._splits)

    def streams(self, length: int, seed: int | None) -> MixedStreams:
        """Packed streams of ``length`` tokens, each of one source.

        Args:
            seed: which a mixture must have.
        """
        assert seed is not None
        each = [
            split.streams(length, mix_seed(seed, "source", at))
            for at, split in enumerate(self._splits)
        ]
        return MixedStreams(each, self._places, seed)

    def counts(self, vocab_size: int) -> Tensor:
        """float64 [vocab_size], how often each token is in as many tokens of the mixture."""
        total = torch.zeros(vocab_size, dtype=torch.float64)
        for split, places in zip(self._splits, self._places, strict=True):
            total += split.counts(vocab_size) * (places / BLOCK / split.num_tokens)
        return total * self.num_tokens


class MixedStreams:
    """``Streams`` of several sources, dealt by their places in each block.

    Attributes:
        per_epoch: streams until some source's documents come again.
    """

    def __init__(self, sources: Sequence[Streams], places: Sequence[int], seed: int) -> None:
        self.sources, self.places, self.seed = sources, places, seed
        self.per_epoch = max(
            1,
            min(
                source.per_epoch * BLOCK // own for source, own in zip(sources, places, strict=True)
            ),
        )

    def place_of(self, index: int) -> tuple[int, int]:
        """The source of a stream, and the number of it among that source's streams."""
        block, at = divmod(index, BLOCK)
        place = Permutation(BLOCK, mix_seed(self.seed, "block", block))[at]
        for source, own in enumerate(self.places):
            if place < own:
                return source, block * own + place
            place -= own
        raise AssertionError("places fill a block")

    def __getitem__(self, index: int) -> Stream:
        source, number = self.place_of(index)
        return self.sources[source][number]

"""Grids: the blocks of a document that a part of the attention reads, declared by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.config import BRANCHES, NSAConfig


@dataclass(frozen=True)
class Grid:
    """Blocks of every document: block i holds tokens i*stride to i*stride + block - 1.

    Args:
        keys: name of the set of keys and values with these blocks, as in ``Plan.halos``.
        block, stride: in tokens.
        whole: leave out blocks that reach past the document's end. Otherwise the last block may be
            short, and ``stride`` must equal ``block``.
    """

    keys: str
    block: int
    stride: int
    whole: bool

    def per_document(self, lengths: Tensor) -> Tensor:
        """Number of blocks of documents with ``lengths`` tokens, int64 of the same shape."""
        if self.whole:
            return ((lengths - self.block) // self.stride + 1).clamp(min=0)
        return (lengths + self.stride - 1) // self.stride

    def reach(self, first: Tensor, end: Tensor, length: Tensor) -> Tensor:
        """The end of the last block that starts in each run [first, end) of a document.

        All arguments are positions in a document of ``length`` tokens. The result is at least
        ``end``.
        """
        if self.whole:
            last = torch.minimum((end - 1) // self.stride, (length - self.block) // self.stride)
            last = last * self.stride
            block_end = last + self.block
        else:
            last = (end - 1) // self.stride * self.stride
            block_end = torch.minimum(last + self.block, length)
        return torch.where(last >= first, torch.maximum(end, block_end), end)


def compression_grid(config: NSAConfig) -> Grid:
    """The blocks that are compressed to one token each."""
    return Grid("compressed", config.compress_block, config.compress_stride, whole=True)


def num_blocks(length: int, config: NSAConfig) -> int:
    """Number of compression blocks of a document of ``length`` tokens."""
    return max(0, (length - config.compress_block) // config.compress_stride + 1)


def selection_grid(config: NSAConfig) -> Grid:
    """The blocks that queries select from."""
    return Grid("selected", config.select_block, config.select_block, whole=False)


def all_grids(config: NSAConfig, of_selector: Mapping[str, Grid] | None = None) -> dict[str, Grid]:
    """All grids of a call, by name.

    Args:
        of_selector: the selector's grids; None for NSA's own, ``compressed``.

    Raises:
        ValueError: if a selector's grid has the reserved name ``selected``.
    """
    if of_selector is None:
        of_selector = {"compressed": compression_grid(config)} if config.uses_compression else {}
    if "selected" in of_selector:
        names = sorted(of_selector)
        raise ValueError(f"selector grids must not use the name 'selected', got {names}")
    chosen = {"selected": selection_grid(config)} if "selected" in config.branches else {}
    return {**of_selector, **chosen}


def key_sets(config: NSAConfig, grids: Mapping[str, Grid]) -> tuple[str, ...]:
    """The sets of keys and values that a call reads, in the order of ``BRANCHES``, others last."""
    read = [grid.keys for grid in grids.values()]
    if "window" in config.branches:
        read.append("window")
    known = tuple(name for name in BRANCHES if name in read)
    return known + tuple(sorted(set(read) - set(BRANCHES)))

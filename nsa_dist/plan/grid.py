"""Which blocks of its documents something reads, declared by name; the plan works out the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.config import BRANCHES, NSAConfig


@dataclass(frozen=True)
class Grid:
    """Blocks of every document: block i holds its tokens i*stride to i*stride + block - 1.

    Args:
        keys: the set of keys and values that the blocks are made of; a name of ``Plan.halos``.
        block, stride: tokens.
        whole: leave out blocks that reach past the document's end; otherwise the last is short,
            and ``stride`` must be ``block``.
    """

    keys: str
    block: int
    stride: int
    whole: bool

    def per_document(self, lengths: Tensor) -> Tensor:
        """Blocks of documents of ``lengths`` tokens, int64 of the same shape."""
        if self.whole:
            return ((lengths - self.block) // self.stride + 1).clamp(min=0)
        return (lengths + self.stride - 1) // self.stride

    def reach(self, first: Tensor, end: Tensor, length: Tensor) -> Tensor:
        """Where the blocks end that start in runs [first, end) of documents of ``length`` tokens.

        Positions in the document; no less than ``end``.
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
    """The blocks that compression makes one token of."""
    return Grid("compressed", config.compress_block, config.compress_stride, whole=True)


def selection_grid(config: NSAConfig) -> Grid:
    """The blocks that queries choose among."""
    return Grid("selected", config.select_block, config.select_block, whole=False)


def all_grids(config: NSAConfig, of_selector: Mapping[str, Grid] | None = None) -> dict[str, Grid]:
    """Every grid of a call, by name.

    Args:
        of_selector: those that choosing blocks needs; None for NSA's, ``compressed``.

    Raises:
        ValueError: if a selector's grid is called ``selected``, as the blocks to choose among are.
    """
    if of_selector is None:
        of_selector = {"compressed": compression_grid(config)} if config.uses_compression else {}
    if "selected" in of_selector:
        raise ValueError("selector grids must not be called 'selected', got one that is")
    chosen = {"selected": selection_grid(config)} if "selected" in config.branches else {}
    return {**of_selector, **chosen}


def key_sets(config: NSAConfig, grids: Mapping[str, Grid]) -> tuple[str, ...]:
    """The sets of keys and values that a call reads, in the order of ``BRANCHES``, others last."""
    read = [grid.keys for grid in grids.values()]
    if "window" in config.branches:
        read.append("window")
    known = tuple(name for name in BRANCHES if name in read)
    return known + tuple(sorted(set(read) - set(BRANCHES)))

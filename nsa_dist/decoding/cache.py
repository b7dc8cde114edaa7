"""The cache of one layer: keys, values and compressed tokens, in rows as operators read them.

With B rows of a batch, each a document that starts after its left padding:

    keys, values                       [B, capacity, sets * KV heads, D]
    compressed_keys, compressed_values [B, blocks of capacity tokens, KV heads, D], block i of each
                                       row's document

What lies behind a row's tokens and blocks is undefined. New tokens are written in place, and so is
a compressed token, once, when the last token of its block arrives. A cache that is too small grows
by an eighth, so that a token costs its share of a copy and not a copy of everything. A cache with a
most never grows, and its tensors stay where they are: a CUDA graph can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.plan.grid import num_blocks

if TYPE_CHECKING:
    from nsa_dist.decoding.step import Step

ROUND = 64
"""Capacities are multiples of this many tokens."""


def capacity_for(length: int, capacity: int) -> int:
    """The tokens that a cache of ``capacity`` tokens has room for once it holds ``length``."""
    return capacity if length <= capacity else -(-(length + length // 8) // ROUND) * ROUND


class LayerCache:
    """The cached tokens of one layer.

    Args:
        most: tokens of each row, at most, for which room is made at once; None for a cache that
            grows.

    Attributes:
        length: cached tokens of each row, with padding.
        starts: for each row, the column of its first token after left padding; empty before the
            first tokens.
        capacity: tokens that there is room for; 0 before the first tokens.
        keys, values, compressed_keys, compressed_values: see the module docstring; None before the
            first tokens, the compressed ones also if the config does not use them. The values of
            compressed tokens have width 0 if only selection reads them.
    """

    def __init__(self, config: NSAConfig, most: int | None = None) -> None:
        self.config, self.most = config, most
        self.forget()

    def room_for(self, new: int) -> int:
        """The capacity once ``new`` more tokens are in it.

        Raises:
            ValueError: if they do not fit.
        """
        length = self.length + new
        if self.most is None:
            return capacity_for(length, self.capacity)
        if length > self.most:
            raise ValueError(
                f"max_cache_len of past_key_values must be at least {length}, the cached and new "
                f"tokens, got {self.most}"
            )
        return max(self.most, self.config.compress_block)  # A step reads a whole block.

    def forget(self) -> None:
        """Remove all tokens and free their memory."""
        self.length, self.capacity = 0, 0
        self.starts: tuple[int, ...] = ()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None
        # Whether a graph may hold them for its backward.
        self._in_graph = self._compressed_in_graph = False

    def empty(self) -> None:
        """Remove all tokens; a cache with a most keeps its memory."""
        if self.most is None:
            self.forget()
        self.length, self.starts = 0, ()

    def check_starts(self, starts: tuple[int, ...]) -> None:
        """Raise ValueError if the start of a row has changed and it was not all padding so far."""
        if self.length == 0:
            return
        same = all(
            new == old or min(new, old) >= self.length
            for new, old in zip(starts, self.starts, strict=True)
        )
        if not same:
            raise ValueError(
                f"attention_mask must be one whose rows start at {list(self.starts)} as in the "
                f"cache, got rows that start at {list(starts)}"
            )

    def append(
        self, k: Tensor, v: Tensor, step: Step
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Add new tokens.

        Args:
            k, v: [B, new, sets * G, D].

        Returns:
            The rows [B * capacity, G, D] of keys and values, by branch; a shared set is one object.
        """
        assert self.length == step.past, (self.length, step.past)
        if self.length == 0 and self.keys is not None and not _alike(self.keys, k):
            self.forget()  # An emptied cache with a most, for another batch.
        config, past, end = self.config, step.past, step.past + k.shape[1]
        keys = _with_room(self.keys, k, past, step.capacity, self._in_graph)
        values = _with_room(self.values, v, past, step.capacity, self._in_graph)
        if step.column is None:
            keys[:, past:end] = k
            values[:, past:end] = v
        else:
            keys.index_copy_(1, step.column, k)
            values.index_copy_(1, step.column, v)
        self.keys, self.values = keys, values
        self.length, self.starts, self.capacity = end, step.starts, step.capacity
        self._in_graph = torch.is_grad_enabled()
        return (
            _rows_by_branch(keys, config.key_branches, config.num_key_sets),
            _rows_by_branch(values, config.branches, config.num_value_sets),
        )

    def store_compressed(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Add the compressed tokens [new blocks, G, D] of blocks that have become complete.

        Returns:
            The compressed keys and values of all rows, [B * blocks of capacity, G, D].
        """
        stored = []
        for new, old in ((k, self.compressed_keys), (v, self.compressed_values)):
            like = new[:0].expand(len(step.starts), *new[:0].shape)
            used = 0 if old is None else min(old.shape[1], step.block_capacity)
            whole = _with_room(old, like, used, step.block_capacity, self._compressed_in_graph)
            if len(new):
                whole.flatten(0, 1).index_copy_(0, step.new_slots, new)
            stored.append(whole)
        self.compressed_keys, self.compressed_values = stored
        self._compressed_in_graph = torch.is_grad_enabled()
        return stored[0].flatten(0, 1), stored[1].flatten(0, 1)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of each row, with padding."""
        self.length = length
        if length == 0:
            self.empty()

    def take_rows(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]`` (int64 [new B]); with a most, in place.

        Raises:
            ValueError: for another number of rows of a cache with a most.
        """
        batch = len(self.starts)
        if self.most is not None and len(rows) != batch:
            raise ValueError(
                f"rows of past_key_values must stay {batch} with a static cache, got {len(rows)}"
            )
        for name in ("keys", "values", "compressed_keys", "compressed_values"):
            x = getattr(self, name)
            if x is not None:
                taken = x.index_select(0, rows.to(x.device))
                setattr(self, name, taken if self.most is None else x.copy_(taken))
        self.starts = tuple(self.starts[row] for row in rows.tolist())

    def num_compressed(self) -> int:
        """Compressed tokens of the row that has most."""
        return num_blocks(self.length - min(self.starts, default=self.length), self.config)


def _alike(buffer: Tensor, k: Tensor) -> bool:
    """Whether a buffer is one for rows as these."""
    same = buffer.dtype == k.dtype and buffer.device == k.device
    return same and len(buffer) == len(k)


def _with_room(
    buffer: Tensor | None, like: Tensor, used: int, capacity: int, in_graph: bool
) -> Tensor:
    """A buffer [B, capacity, heads, D] to write to, which holds the first ``used`` rows.

    It is a new one where this one is too small, or where a graph needs its values for backward.
    """
    if buffer is not None and buffer.shape[1] == capacity and not in_graph:
        # What was made in inference mode cannot be written to outside of it.
        is_writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
        if is_writable:
            return buffer
    room = like.new_empty(len(like), capacity, *like.shape[2:])
    if buffer is not None:
        room[:, :used] = buffer[:, :used]
    return room


def _rows_by_branch(x: Tensor, branches: tuple[str, ...], sets: int) -> dict[str, Tensor]:
    rows = x.flatten(0, 1)
    if sets == 1:
        return dict.fromkeys(branches, rows)
    return dict(zip(branches, rows.chunk(sets, dim=1), strict=True))

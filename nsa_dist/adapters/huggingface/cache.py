"""Keys, values and compressed tokens of past tokens, as a layer of transformers' ``Cache``.

A row's document starts after its left padding, so blocks of different rows may start at different
columns:

    keys, values                       [B, sets * KV heads, T, D], with padding
    compressed_keys, compressed_values [B, C, KV heads, D], block i of each row's document;
                                       undefined after the last block of a row with fewer than C

A compressed token is computed once, when the last token of its block arrives. The number of blocks
of a row follows from T and its start, so cropping only drops compressed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from nsa_dist.checks import check, type_name
from nsa_dist.config import NSAConfig


def num_blocks(length: int, config: NSAConfig) -> int:
    """Number of compression blocks of a document of ``length`` tokens."""
    return max(0, (length - config.compress_block) // config.compress_stride + 1)


class NSACacheLayer(DynamicLayer):
    """The cache of one layer with Native Sparse Attention; grows like ``DynamicLayer``.

    Attributes:
        starts: for each row, the column of its first token after left padding; empty before the
            first update.
        compressed_keys, compressed_values: see the module docstring; None before the first update,
            and if the config does not use them.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.config = config
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.starts: tuple[int, ...] = ()
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None

    def check_starts(self, starts: tuple[int, ...]) -> None:
        """Raise ValueError if the start of a row has changed and it was not all padding so far."""
        length = self.get_seq_length()
        if length == 0:
            return
        same = all(
            new == old or min(new, old) >= length
            for new, old in zip(starts, self.starts, strict=True)
        )
        if not same:
            raise ValueError(
                f"attention_mask must be one whose rows start at {list(self.starts)} as in the "
                f"cache, got rows that start at {list(starts)}"
            )

    def store_compressed(self, keys: Tensor, values: Tensor, starts: tuple[int, ...]) -> None:
        """Replace ``compressed_keys``, ``compressed_values`` and ``starts``."""
        self.compressed_keys, self.compressed_values, self.starts = keys, values, starts

    def reset(self) -> None:
        """Remove all tokens."""
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the argument is that of ``DynamicLayer.crop``."""
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        if length == 0:
            self._forget()
        elif self.compressed_keys is not None and self.compressed_values is not None:
            max_blocks = num_blocks(length - min(self.starts), self.config)
            self.compressed_keys = self.compressed_keys[:, :max_blocks]
            self.compressed_values = self.compressed_values[:, :max_blocks]

    def _take_rows(self, rows: Tensor) -> None:
        for name in ("keys", "values", "compressed_keys", "compressed_values"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.index_select(0, rows.to(x.device)))
        self.starts = tuple(self.starts[row] for row in rows.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        rows = torch.arange(len(self.starts)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, which are integers or a mask."""
        if self.get_seq_length() > 0:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().squeeze(1)
            self._take_rows(indices)


def adopt_cache(cache: Any, nsa_layers: tuple[int, ...], config: NSAConfig, batch: int) -> None:
    """Replace each empty layer of ``nsa_layers`` by an ``NSACacheLayer``.

    Args:
        batch: number of rows of the call.

    Raises:
        ValueError: for a cache that is not a ``DynamicCache`` on the model's device, or one that
            other layers or another number of rows filled.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            "past_key_values must be a DynamicCache (for generate: cache_implementation=None or "
            f"'dynamic'), got {type_name(cache)}"
        )
    if cache.offloading:
        raise ValueError("past_key_values must be a cache on the device, got offloading=True")
    for index in nsa_layers:
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if isinstance(layer, NSACacheLayer):
            check(
                layer.config == config,
                "past_key_values",
                layer.config,
                f"a cache of this model, {config}",
            )
            if layer.get_seq_length() > 0 and len(layer.starts) != batch:
                raise ValueError(
                    f"past_key_values must be empty or of {batch} rows, the batch size, got "
                    f"tokens of {len(layer.starts)} rows"
                )
        elif type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            cache.layers[index] = NSACacheLayer(config)
        else:
            raise ValueError(
                "past_key_values must be an empty DynamicCache or one that this model filled, got "
                f"{type_name(layer)} with {layer.get_seq_length()} tokens as layer {index}"
            )

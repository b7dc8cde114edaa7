"""Layers of transformers' ``Cache`` that hold a ``LayerCache``, and caches of such layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from nsa_dist.checks import check, type_name
from nsa_dist.config import NSAConfig
from nsa_dist.decoding.cache import LayerCache
from nsa_dist.decoding.static import StaticTables


class NSACacheLayer(DynamicLayer):
    """The cache of one layer with Native Sparse Attention.

    The converted attention writes to ``rows``. What transformers reads are views of it:

    Attributes:
        rows: keys, values and compressed tokens, in the layout of the operators.
        keys, values: [B, sets * KV heads, T, D], with padding; None before the first tokens.
        compressed_keys, compressed_values: [B, C, KV heads, D], block i of each row's document;
            undefined after the last block of a row with fewer than C. None before the first tokens,
            and if the config does not use them.
        starts: for each row, the column of its first token after left padding.
    """

    def __init__(self, config: NSAConfig) -> None:
        self.rows = LayerCache(config)
        super().__init__()

    @property
    def config(self) -> NSAConfig:
        """The attention that filled it."""
        return self.rows.config

    @property
    def starts(self) -> tuple[int, ...]:
        """See the class."""
        return self.rows.starts

    @property
    def keys(self) -> Tensor | None:
        """See the class."""
        return self._shown(self.rows.keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        _refuse_to_set("keys", value)

    @property
    def values(self) -> Tensor | None:
        """See the class."""
        return self._shown(self.rows.values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        _refuse_to_set("values", value)

    @property
    def is_initialized(self) -> bool:
        """Whether it has tokens."""
        return self.rows.length > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """transformers' constructor sets it to what it is."""

    @property
    def compressed_keys(self) -> Tensor | None:
        """See the class."""
        return self._shown_compressed(self.rows.compressed_keys)

    @property
    def compressed_values(self) -> Tensor | None:
        """See the class."""
        return self._shown_compressed(self.rows.compressed_values)

    def _shown(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, : self.rows.length].transpose(1, 2)

    def _shown_compressed(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, : self.rows.num_compressed()]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Only the converted attention adds tokens: it needs the tables of the batch.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "past_key_values must be filled by calls of the converted model, got update()"
        )

    def get_seq_length(self) -> int:
        """Cached tokens of each row, with padding."""
        return self.rows.length

    def reset(self) -> None:
        """Remove all tokens."""
        self.rows.empty()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the argument is that of ``DynamicLayer.crop``."""
        length = self.rows.length
        # Older versions of transformers give the length to keep.
        keep = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if keep < length:
            self.rows.crop(max(0, keep))

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
            self.rows.take_rows(indices)


class NSAStaticCacheLayer(NSACacheLayer):
    """The cache of one layer with room for ``max_cache_len`` tokens, whose tensors stay in place.

    Attributes:
        max_cache_len: tokens of each row, at most, with padding.
    """

    is_compileable = True  # transformers then asks the model for a compiled call.

    def __init__(self, config: NSAConfig, max_cache_len: int) -> None:
        super().__init__(config)
        self.rows = LayerCache(config, max_cache_len)
        self.max_cache_len = max_cache_len
        self._tables: StaticTables | None = None

    def get_max_length(self) -> int:
        """``max_cache_len``."""
        return self.max_cache_len

    def tables(self) -> StaticTables | None:
        """What steps of one token have in common, or None where the host has to plan them.

        That is an empty cache, or one with a row that was all padding so far.
        """
        rows = self.rows
        if rows.keys is None or max(rows.starts, default=rows.length) >= rows.length:
            return None
        made, device = self._tables, rows.keys.device
        if made is None or made.starts != rows.starts or made.device != device:
            self._tables = StaticTables(rows.config, rows.starts, rows.capacity, device)
        return self._tables


def _refuse_to_set(name: str, value: Tensor | None) -> None:
    if value is not None:  # transformers' constructor sets None.
        raise ValueError(
            f"{name} of past_key_values must be written by calls of the converted model, got a "
            "tensor (crop, reorder_cache and batch_select_indices keep parts of it)"
        )


def adopt_cache(
    cache: Any,
    nsa_layers: tuple[int, ...],
    config: NSAConfig,
    batch: int,
    static_problem: str | None,
) -> None:
    """Replace each empty layer of ``nsa_layers`` by an ``NSACacheLayer``.

    Args:
        batch: number of rows of the call.
        static_problem: the error of a ``StaticCache``, or None.

    Raises:
        ValueError: for a cache that is not a ``DynamicCache`` or ``StaticCache`` on the model's
            device, or one that other layers or another number of rows filled.
    """
    is_static = isinstance(cache, StaticCache)
    if not isinstance(cache, (DynamicCache, StaticCache)):
        raise ValueError(
            "past_key_values must be a DynamicCache or a StaticCache (for generate: "
            f"cache_implementation=None, 'dynamic' or 'static'), got {type_name(cache)}"
        )
    if cache.offloading:
        raise ValueError("past_key_values must be a cache on the device, got offloading=True")
    if is_static and static_problem is not None:
        raise ValueError(static_problem)
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
        elif type(layer) is StaticLayer and int(layer.get_seq_length()) == 0:
            cache.layers[index] = NSAStaticCacheLayer(config, layer.max_cache_len)
        else:
            raise ValueError(
                "past_key_values must be an empty cache or one that this model filled, got "
                f"{type_name(layer)} with {layer.get_seq_length()} tokens as layer {index}"
            )

"""Llama and Qwen3 with Native Sparse Attention, as subclasses of transformers' classes.

The classes give checkpoints a ``model_type`` of their own, so that they cannot be loaded as dense
models, and their ``forward`` reads a batch's padding, documents and cache. Everything else is
transformers', including ``forward`` of the decoder and its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa_dist.adapters.huggingface.attention import NSAAttention
from nsa_dist.adapters.huggingface.batch import (
    Batch,
    Runtime,
    cache_tables,
    check_position_ids,
    check_positions_count_on,
    packed_boundaries,
    plan_stream,
    read_mask,
)
from nsa_dist.adapters.huggingface.cache import adopt_cache
from nsa_dist.adapters.huggingface.checks import (
    check_attention,
    check_call,
    check_config,
    check_layers,
)
from nsa_dist.adapters.huggingface.parallelism import split_without_group
from nsa_dist.checks import describe
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.plan.layout import make_layout

SPARSE = "native_sparse_attention"
"""The name of these layers in ``layer_types`` of configs that older versions saved."""

MARK = f" with {SPARSE} (nsa_dist.adapters.huggingface.from_pretrained loads this model)"
"""Suffix of ``hidden_act`` in a saved config. A dense model looks this name up and so raises
KeyError with these words before it loads weights. transformers' base config, with which tokenizers
and the Trainer read ``config.json``, accepts any string."""


class _NSAConfigMixin:
    """Two more fields, and a ``hidden_act`` in the file that dense models refuse."""

    hidden_act: str
    nsa: dict[str, Any] | None
    nsa_layers: list[int] | None

    def to_dict(self) -> dict[str, Any]:
        """As in the dense config, with ``hidden_act`` marked."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if self.nsa is not None:
            values["hidden_act"] = self.hidden_act + MARK
        return values

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_act = self.hidden_act.removesuffix(MARK)
        super().__post_init__(**kwargs)  # type: ignore[misc]


class NSALlamaConfig(_NSAConfigMixin, LlamaConfig):
    """``LlamaConfig`` with ``nsa``, the fields of an ``NSAConfig``, and ``nsa_layers``."""

    model_type = "nsa_llama"
    nsa: dict[str, Any] | None = None
    nsa_layers: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if SPARSE in (kwargs.get("layer_types") or ()):
            del kwargs["layer_types"]  # Older versions wrote it; Llama itself has none.
        super().__post_init__(**kwargs)


class NSAQwen3Config(_NSAConfigMixin, Qwen3Config):
    """``Qwen3Config`` with ``nsa``, the fields of an ``NSAConfig``, and ``nsa_layers``."""

    model_type = "nsa_qwen3"
    nsa: dict[str, Any] | None = None
    nsa_layers: list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is not None:  # Older versions named NSA layers there.
            self.layer_types = ["full_attention" if x == SPARSE else x for x in self.layer_types]
        super().__post_init__(**kwargs)


class _NSAMixin:
    """Attributes and methods that both families add to their dense class."""

    nsa_config: NSAConfig
    nsa_layers: tuple[int, ...]
    nsa_runtime: Runtime

    def _become_sparse(
        self, config: NSAConfig, attention: Mapping[int, NSAAttention], runtime: Runtime
    ) -> None:
        """Install attention modules, by layer index."""
        self.nsa_config, self.nsa_layers, self.nsa_runtime = config, tuple(attention), runtime
        decoder: Any = self.model  # type: ignore[attr-defined]
        for index, module in attention.items():
            decoder.layers[index].self_attn = module

    def use_group(
        self,
        group: GroupLike | ContextGroup = None,
        *,
        layout: str = "zigzag",
        backend: str = "auto",
    ) -> None:
        """Set the ranks over which sequences are split, and the layout.

        Args:
            group: process group or one-dimensional DeviceMesh; None if each rank has whole
                sequences, which overrides accelerate's and DeepSpeed's settings.
            layout: "contiguous", "zigzag" or "zigzag_per_document", as given to ``shard_batch``.
            backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.

        Raises:
            ValueError: if an argument has a value that is not allowed.
        """
        self._use(group, layout, backend, group_is_set=True)

    def _use(
        self, group: GroupLike | ContextGroup, layout: str, backend: str, *, group_is_set: bool
    ) -> None:
        model: Any = self
        runtime = make_runtime(
            group,
            layout,
            backend,
            self.nsa_layers,
            model.config.num_hidden_layers,
            group_is_set=group_is_set,
        )
        first = model.model.layers[self.nsa_layers[0]].self_attn
        check_attention(self.nsa_config, backend, first)
        self.nsa_runtime = runtime

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the dense model; on a split sequence, for this rank's part of the batch.

        Args:
            input_ids, inputs_embeds, labels, logits_to_keep: as in the dense model. Labels of a
                split sequence cannot be shifted here: also pass ``shift_labels`` and
                ``num_items_in_batch`` from ``shard_batch``. The loss is then this rank's share.
            attention_mask: [B, cached and new tokens], zeros only before and after a row's tokens.
            position_ids: positions in the document, [B, L]; computed by default. Positions that
                start again within a row mark packed documents, as in the dense model; these allow
                neither padding nor a cache.
            past_key_values: a ``DynamicCache``, empty or filled by this model.
            use_cache: default ``config.use_cache`` outside of training with one document per row,
                else False.
            cu_seqlens: int32 boundaries of packed documents, of the whole padded stream, equal on
                all ranks, with B = 1. The collators' name ``cu_seq_lens_q`` is accepted too; if
                both are given they must be equal.

        Raises:
            ValueError: if an argument has a value that is not allowed.
        """
        tokens = inputs_embeds if inputs_embeds is not None else input_ids
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ValueError(
                "input_ids must be integers [batch, tokens] where inputs_embeds is None, got "
                f"{describe(input_ids)}"
            )
        with torch.device("cpu"):  # Tables are made on the host; the default device may be another.
            batch, positions, past_key_values, attention_mask = self._read_batch(
                tokens,
                attention_mask,
                position_ids,
                past_key_values,
                use_cache,
                cu_seqlens,
                labels,
                kwargs,
            )
        if len(self.nsa_layers) == self.config.num_hidden_layers:  # type: ignore[attr-defined]
            # transformers passes on a mask of four dimensions, and so makes no L x L mask.
            attention_mask = tokens.new_zeros(1, 1, 1, 1)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=past_key_values is not None,
            logits_to_keep=logits_to_keep,
            nsa_batch=batch,
            **kwargs,
        )

    def _read_batch(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        cu_seqlens: Tensor | None,
        labels: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Batch, Tensor, Any, Tensor | None]:
        """The batch, its positions, the cache in use, and the mask if there is padding."""
        model: Any = self
        runtime, config, hf_config = self.nsa_runtime, self.nsa_config, model.config
        rows, length = tokens.shape[:2]
        split = runtime.context.size > 1
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        problem = None if runtime.group_is_set else split_without_group()
        problem = problem or check_call(
            hf_config,
            split=split,
            rows=rows,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            labels=labels,
            kwargs=kwargs,
        )
        problem = problem or check_position_ids(position_ids, (rows, length))
        # On a split sequence all ranks raise together, when they make the plan.
        if problem is not None and not split:
            raise ValueError(problem)
        caching = past_key_values is not None or use_cache
        if caching and model.training and model.is_gradient_checkpointing and not split:
            raise ValueError(
                "use_cache must be False with gradient checkpointing in training, got True"
            )
        documents, ranges, past = cu_seqlens, None, 0
        if not split:
            if past_key_values is not None:
                adopt_cache(past_key_values, self.nsa_layers, config, rows)
                past = past_key_values.get_seq_length(self.nsa_layers[0])
            ranges = read_mask(attention_mask, rows, past + length)
            if ranges is None:
                # Dense layers look for packed documents only without a mask.
                attention_mask = None
            if position_ids is not None and cu_seqlens is None:
                if ranges is None and past_key_values is None:
                    documents = packed_boundaries(position_ids, rows)
                else:
                    check_positions_count_on(position_ids, rows, ranges, past)
            if documents is not None and use_cache:
                raise ValueError(
                    "use_cache must be False with packed documents (cu_seqlens, or position_ids "
                    "that start again at 0), got True"
                )
        if use_cache is None:
            use_cache = hf_config.use_cache and not model.training and documents is None
        if split or (past_key_values is None and not use_cache):
            batch, positions = plan_stream(
                config,
                runtime,
                tokens,
                ranges,
                documents,
                position_ids,
                exact_positions=cu_seqlens is not None,
                dtype=model.dtype,
                problem=problem,
            )
            return batch, positions, None, attention_mask
        if past_key_values is None:
            past_key_values = DynamicCache(config=hf_config)
            adopt_cache(past_key_values, self.nsa_layers, config, rows)
        batch, positions = cache_tables(config, runtime, tokens, ranges, past)
        if position_ids is not None:
            positions = position_ids
        return batch, positions, past_key_values, attention_mask


class NSALlamaForCausalLM(_NSAMixin, LlamaForCausalLM):
    """``LlamaForCausalLM`` with Native Sparse Attention in the layers ``config.nsa_layers``."""

    config_class = NSALlamaConfig

    def __init__(self, config: NSALlamaConfig) -> None:
        super().__init__(config)
        nsa, layers, runtime = read_config(config)
        self._become_sparse(nsa, make_attention(self, nsa, layers), runtime)


class NSAQwen3ForCausalLM(_NSAMixin, Qwen3ForCausalLM):
    """``Qwen3ForCausalLM`` with Native Sparse Attention in the layers ``config.nsa_layers``."""

    config_class = NSAQwen3Config

    def __init__(self, config: NSAQwen3Config) -> None:
        super().__init__(config)
        nsa, layers, runtime = read_config(config)
        self._become_sparse(nsa, make_attention(self, nsa, layers), runtime)


FAMILIES: Mapping[type, tuple[Any, Any]] = {
    LlamaForCausalLM: (NSALlamaForCausalLM, NSALlamaConfig),
    Qwen3ForCausalLM: (NSAQwen3ForCausalLM, NSAQwen3Config),
}
"""Dense model classes, and the model and config classes of their converted models."""


def make_attention(
    model: Any, config: NSAConfig, layers: tuple[int, ...]
) -> dict[int, NSAAttention]:
    """New attention modules by layer index; ``model`` does not change."""
    return {i: NSAAttention(model.model.layers[i].self_attn, config) for i in layers}


def make_runtime(
    group: GroupLike | ContextGroup,
    layout: str,
    backend: str,
    layers: tuple[int, ...],
    num_layers: int,
    *,
    group_is_set: bool,
) -> Runtime:
    """A ``Runtime`` from checked arguments.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    context = context_group(group)
    make_layout(layout, context.size)
    if context.size > 1 and len(layers) < num_layers:
        raise ValueError(
            f"layers must be all {num_layers} to split a sequence over {context.size} ranks "
            f"(transformers' dense layers need whole sequences), got {len(layers)}"
        )
    return Runtime(context, layout, backend, CommunicationCounter(), group_is_set)


def read_config(config: Any) -> tuple[NSAConfig, tuple[int, ...], Runtime]:
    """The attention, layers and runtime (for one rank) of a converted model's config.

    Raises:
        ValueError: if the config has no or wrong settings of the attention.
    """
    if config.nsa is None or config.nsa_layers is None:
        raise ValueError(
            "nsa must be set, as in the config of a model that convert_to_nsa made, got None in a "
            f"{type(config).__name__}"
        )
    nsa, layers = NSAConfig(**config.nsa), check_layers(config.nsa_layers, config)
    check_config(nsa, config, nsa.gate_init)
    runtime = make_runtime(
        None, "zigzag", "auto", layers, config.num_hidden_layers, group_is_set=False
    )
    return nsa, layers, runtime


def write_config(dense: Any, config_type: type, nsa: NSAConfig, layers: tuple[int, ...]) -> Any:
    """A config of ``config_type`` with all fields of ``dense``, including private ones."""
    config: Any = copy.deepcopy(dense)
    config.__class__ = config_type
    config.nsa = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(nsa).items()}
    config.nsa_layers = list(layers)
    return config

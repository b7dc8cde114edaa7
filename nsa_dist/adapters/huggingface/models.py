"""Llama and Qwen3 with Native Sparse Attention, as classes of their own beside transformers'.

A class of its own gives the checkpoint a ``model_type`` of its own, so that nothing takes it for
the dense model, and a place where a batch's padding, documents and cache are read. Everything else,
``forward`` of the decoder and of its layers included, is transformers'.
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
from nsa_dist.adapters.huggingface.parallelism import stated_split
from nsa_dist.checks import describe
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.plan.layout import make_layout

SPARSE = "native_sparse_attention"
"""What older versions called our layers in ``layer_types`` of a saved config."""

MARK = f" with {SPARSE} (nsa_dist.adapters.huggingface.from_pretrained loads this model)"
"""Behind ``hidden_act`` of a saved config. A dense model, which looks for a function of that name,
raises KeyError with these words before it has a weight; transformers' base class, by which
tokenizers and the Trainer read ``config.json``, takes any string."""


class _NSAConfigMixin:
    """Two fields more, and a ``hidden_act`` in the file that no dense model can be built with."""

    hidden_act: str
    nsa: dict[str, Any] | None
    nsa_layers: list[int] | None

    def to_dict(self) -> dict[str, Any]:
        """As of the dense config, with ``hidden_act`` marked."""
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
            del kwargs["layer_types"]  # Of an older version: Llama has one kind of dense layer.
        super().__post_init__(**kwargs)


class NSAQwen3Config(_NSAConfigMixin, Qwen3Config):
    """``Qwen3Config`` with ``nsa``, the fields of an ``NSAConfig``, and ``nsa_layers``."""

    model_type = "nsa_qwen3"
    nsa: dict[str, Any] | None = None
    nsa_layers: list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is not None:  # Of an older version, which named our layers there.
            self.layer_types = ["full_attention" if x == SPARSE else x for x in self.layer_types]
        super().__post_init__(**kwargs)


class _NSAMixin:
    """What both families' models add to their dense class."""

    nsa_config: NSAConfig
    nsa_layers: tuple[int, ...]
    nsa_runtime: Runtime

    def _become_sparse(
        self, config: NSAConfig, attention: Mapping[int, NSAAttention], runtime: Runtime
    ) -> None:
        """Take over attention modules, by the index of their layer."""
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
        """Say over which ranks sequences are split from now on, and how.

        Args:
            group: process group or one-dimensional DeviceMesh; None for one rank, which holds
                whole sequences whatever accelerate or DeepSpeed say.
            layout: "contiguous", "zigzag" or "zigzag_per_document", as given to ``shard_batch``.
            backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.

        Raises:
            ValueError: naming the option, the value found and the values that work.
        """
        self._use(group, layout, backend, told=True)

    def _use(
        self, group: GroupLike | ContextGroup, layout: str, backend: str, *, told: bool
    ) -> None:
        model: Any = self
        runtime = make_runtime(
            group, layout, backend, self.nsa_layers, model.config.num_hidden_layers, told=told
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
        """As of the dense model, on this rank's part of the batch where the sequence is split.

        Args:
            input_ids, inputs_embeds, labels, logits_to_keep: as of the dense model. Labels of a
                split sequence cannot be shifted here: give ``shift_labels`` and
                ``num_items_in_batch`` too, of ``shard_batch``; the loss is this rank's share then.
            attention_mask: [B, cached and new tokens], zeros before and behind each row's tokens.
            position_ids: positions in the document, [B, L]; worked out when None. Rows whose
                positions start anew are packed documents, as for the dense model; without padding
                and without a cache.
            past_key_values: a ``DynamicCache``, empty or filled by this model.
            use_cache: when None, ``config.use_cache`` outside of training and for one document a
                row, else False.
            cu_seqlens: int32 boundaries of packed documents, of the whole padded stream on every
                rank, with B = 1; ``cu_seq_lens_q`` as transformers' collators name it works too,
                and must be the same where both are given.

        Raises:
            ValueError: naming the option, the value found and the values that work.
        """
        tokens = inputs_embeds if inputs_embeds is not None else input_ids
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ValueError(
                "input_ids must be integers [batch, tokens] where inputs_embeds is None, got "
                f"{describe(input_ids)}"
            )
        with torch.device("cpu"):  # Whatever the default device is: tables are made on the host.
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
            # A mask of four dimensions is passed on as it is, and no L x L one is made.
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
        """The batch, its positions, the cache in use, and the mask where it shows padding."""
        model: Any = self
        runtime, config, hf_config = self.nsa_runtime, self.nsa_config, model.config
        rows, length = tokens.shape[:2]
        split = runtime.context.size > 1
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        problem = None if runtime.told else stated_split()
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
        # On a split sequence all ranks raise together, where the plan is made.
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
                # Dense layers look for packed documents only where there is no mask.
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
"""Dense model classes, and the model and config class that a conversion makes of them."""


def make_attention(
    model: Any, config: NSAConfig, layers: tuple[int, ...]
) -> dict[int, NSAAttention]:
    """New attention modules by the index of their layer; ``model`` stays as it is."""
    return {i: NSAAttention(model.model.layers[i].self_attn, config) for i in layers}


def make_runtime(
    group: GroupLike | ContextGroup,
    layout: str,
    backend: str,
    layers: tuple[int, ...],
    num_layers: int,
    *,
    told: bool,
) -> Runtime:
    """Checked settings of how a model runs; ``told`` as of ``Runtime``.

    Raises:
        ValueError: naming the option, the value found and the values that work.
    """
    context = context_group(group)
    make_layout(layout, context.size)
    if context.size > 1 and len(layers) < num_layers:
        raise ValueError(
            f"layers must be all {num_layers} to split a sequence over {context.size} ranks "
            f"(transformers' dense layers need whole sequences), got {len(layers)}"
        )
    return Runtime(context, layout, backend, CommunicationCounter(), told)


def read_config(config: Any) -> tuple[NSAConfig, tuple[int, ...], Runtime]:
    """What a config of a converted model says, for one rank.

    Raises:
        ValueError: for one that says nothing of the attention, or what is refused.
    """
    if config.nsa is None or config.nsa_layers is None:
        raise ValueError(
            "nsa must be set, as in the config of a model that convert_to_nsa made, got None in a "
            f"{type(config).__name__}"
        )
    nsa, layers = NSAConfig(**config.nsa), check_layers(config.nsa_layers, config)
    check_config(nsa, config, nsa.gate_init)
    runtime = make_runtime(None, "zigzag", "auto", layers, config.num_hidden_layers, told=False)
    return nsa, layers, runtime


def write_config(dense: Any, config_type: type, nsa: NSAConfig, layers: tuple[int, ...]) -> Any:
    """A config of ``config_type`` with all that ``dense`` holds, private settings included."""
    config: Any = copy.deepcopy(dense)
    config.__class__ = config_type
    config.nsa = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(nsa).items()}
    config.nsa_layers = list(layers)
    return config

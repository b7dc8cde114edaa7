"""The decoder of a converted model, which reads a batch for its attention layers.

Everything that runs a model calls its decoder: the language model's own head, heads for
classification, and libraries that take the hidden states for a loss of their own (TRL, Liger). So
padding, documents, the cache and the split of a sequence are read here, once a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from nsa_dist.adapters.huggingface.attention import NSAAttention
from nsa_dist.adapters.huggingface.batch import (
    Batch,
    Runtime,
    check_position_ids,
    check_positions_count_on,
    packed_boundaries,
    plan_cached,
    plan_static,
    plan_stream,
    read_mask,
    starts_of_step,
)
from nsa_dist.adapters.huggingface.cache import NSAStaticCacheLayer, adopt_cache
from nsa_dist.adapters.huggingface.checks import (
    check_attention,
    check_call,
    refuse_export,
    static_problem,
)
from nsa_dist.adapters.huggingface.initial_weights import start_missing
from nsa_dist.adapters.huggingface.parallelism import Split, find_split, unknown_split
from nsa_dist.adapters.huggingface.split import documents_of_split
from nsa_dist.checks import describe
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.decoding.static import StaticTables
from nsa_dist.host_tables import on_cpu
from nsa_dist.plan.layout import make_layout
from nsa_kernels import get_backend


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


class SparseDecoder:
    """Attributes and methods that a decoder class of transformers gets.

    Attributes:
        nsa_config: the attention.
        nsa_layers: indices of the layers that have it.
        nsa_runtime: group, layout and backend, as set.
    """

    nsa_config: NSAConfig
    nsa_layers: tuple[int, ...]
    nsa_runtime: Runtime

    def become_sparse(
        self, config: NSAConfig, attention: Mapping[int, NSAAttention], runtime: Runtime
    ) -> None:
        """Install attention modules, by layer index."""
        self.nsa_config, self.nsa_layers, self.nsa_runtime = config, tuple(attention), runtime
        decoder: Any = self
        for index, module in attention.items():
            decoder.layers[index].self_attn = module

    def _init_weights(self, module: nn.Module) -> None:
        """As in the dense decoder, and what a checkpoint lacks of this attention."""
        super()._init_weights(module)  # type: ignore[misc]
        if hasattr(self, "nsa_layers"):  # It is still dense in transformers' constructor.
            decoder: Any = self
            start_missing(module, decoder.layers[self.nsa_layers[0]].self_attn.q_proj)

    def use_runtime(
        self, group: GroupLike | ContextGroup, layout: str, backend: str, *, group_is_set: bool
    ) -> None:
        """As ``use_group`` of the model; ``group_is_set`` False still takes others' groups."""
        decoder: Any = self
        runtime = make_runtime(
            group,
            layout,
            backend,
            self.nsa_layers,
            decoder.config.num_hidden_layers,
            group_is_set=group_is_set,
        )
        check_attention(self.nsa_config, backend, decoder.layers[self.nsa_layers[0]].self_attn)
        self.nsa_runtime = replace(runtime, batch_invariant=self.nsa_runtime.batch_invariant)

    def split_of_call(self) -> tuple[Runtime, Split | None]:
        """How the next forward runs, and who splits its sequences where ``use_group`` did not.

        Raises:
            ValueError: on every rank, if dense layers stand beside sparse ones; under torch.export.
        """
        refuse_export()
        return self._find_split()

    @torch.compiler.disable  # It asks who has replaced functions, which no graph can hold.
    def _find_split(self) -> tuple[Runtime, Split | None]:
        runtime, split = self.nsa_runtime, None
        model: Any = self
        if not runtime.group_is_set:
            split = find_split(model.config._attn_implementation, model.training)
        if split is None:
            return runtime, None
        found = make_runtime(
            split.group,
            split.layout,
            runtime.backend,
            self.nsa_layers,
            model.config.num_hidden_layers,
            group_is_set=False,
        )
        found = replace(found, batch_invariant=runtime.batch_invariant)
        return replace(found, communication=runtime.communication), split

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        nsa_problem: str | None = None,
        nsa_tables: StaticTables | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the dense decoder; on a split sequence, for this rank's part of the batch.

        Args:
            input_ids, inputs_embeds: as in the dense decoder.
            attention_mask, position_ids, past_key_values, use_cache, cu_seqlens: as in the
                converted model's ``forward``.
            nsa_problem: an error of the model's head, raised here on every rank.
            nsa_tables: of a step that was begun and that needs no checks, while it is captured.

        Raises:
            ValueError: if an argument has a value that is not allowed.
        """
        tokens = inputs_embeds if inputs_embeds is not None else input_ids
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ValueError(
                "input_ids must be integers [batch, tokens] where inputs_embeds is None, got "
                f"{describe(input_ids)}"
            )
        refuse_export()
        if nsa_tables is not None:
            past = past_key_values.get_seq_length(self.nsa_layers[0])
            batch, positions = plan_static(self.nsa_runtime, nsa_tables, past)
            positions = positions if position_ids is None else position_ids
        else:
            batch, positions, past_key_values, attention_mask = self._read_batch(
                tokens,
                attention_mask,
                position_ids,
                past_key_values,
                use_cache,
                cu_seqlens,
                nsa_problem,
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
            use_cache=past_key_values is not None,
            nsa_batch=batch,
            **kwargs,
        )

    def _adopt(self, cache: Any, rows: int, runtime: Runtime) -> None:
        """``adopt_cache`` for a call of ``rows`` rows."""
        problem = None
        if isinstance(cache, StaticCache):
            model: Any = self
            backend = get_backend(runtime.backend, model.device)
            layers, invariant = len(self.nsa_layers), runtime.batch_invariant
            problem = static_problem(model.config, layers, backend, invariant)
        adopt_cache(cache, self.nsa_layers, self.nsa_config, rows, problem)

    @torch.compiler.disable  # Lengths become tables, and each length would be compiled anew.
    def _read_batch(self, *arguments: Any) -> tuple[Batch, Tensor, Any, Tensor | None]:
        """As ``_read``, on the host."""
        with on_cpu():
            return self._read(*arguments)

    def _read(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        cu_seqlens: Tensor | None,
        problem: str | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Batch, Tensor, Any, Tensor | None]:
        """The batch, its positions, the cache in use, and the mask if there is padding."""
        model: Any = self
        runtime, by_others = self.split_of_call()
        config, hf_config = self.nsa_config, model.config
        rows, length = tokens.shape[:2]
        dtype = model.norm.weight.dtype  # A replica of DataParallel has no parameters to ask.
        split = runtime.context.size > 1
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        if by_others is None and not runtime.group_is_set:
            starts = position_ids if past_key_values is None else None
            problem = problem or unknown_split(model.training, starts, kwargs.get("shift_labels"))
        problem = problem or check_call(
            hf_config,
            split=split,
            rows=rows,
            length=length,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            kwargs=kwargs,
        )
        problem = problem or check_position_ids(position_ids, (rows, length))
        # On a split sequence all ranks raise together, when they agree.
        if problem is not None and not split:
            raise ValueError(problem)
        if split:
            documents = documents_of_split(
                runtime, (rows, length), position_ids, attention_mask, cu_seqlens, problem
            )
            batch, positions = plan_stream(
                config,
                runtime,
                tokens,
                None,
                documents,
                position_ids,
                exact_positions=cu_seqlens is not None,
                dtype=dtype,
            )
            return batch, positions, None, None
        caching = past_key_values is not None or use_cache
        if caching and model.training and model.is_gradient_checkpointing:
            raise ValueError(
                "use_cache must be False with gradient checkpointing in training, got True "
                "(generate asks for a cache: call eval() before)"
            )
        documents, past = cu_seqlens, 0
        if past_key_values is not None:
            self._adopt(past_key_values, rows, runtime)
            past = past_key_values.get_seq_length(self.nsa_layers[0])
        first_columns, ranges = None, None
        if past > 0 and length == 1:
            cached = past_key_values.layers[self.nsa_layers[0]].starts
            first_columns = starts_of_step(attention_mask, cached, past)
        if first_columns is None:
            ranges = read_mask(attention_mask, rows, past + length)
            first_columns = (0,) * rows
            if ranges is not None:
                first_columns = tuple(start for start, _ in ranges)
        if ranges is None and not any(first_columns):
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
        if past_key_values is None and not use_cache:
            batch, positions = plan_stream(
                config,
                runtime,
                tokens,
                ranges,
                documents,
                position_ids,
                exact_positions=cu_seqlens is not None,
                dtype=dtype,
            )
            return batch, positions, None, attention_mask
        if past_key_values is None:
            past_key_values = DynamicCache(config=hf_config)
            self._adopt(past_key_values, rows, runtime)
        layer = past_key_values.layers[self.nsa_layers[0]]
        capacity, tables = layer.rows.room_for(length), None
        if isinstance(layer, NSAStaticCacheLayer) and length == 1:
            tables = layer.tables()
        if tables is not None and tables.starts == first_columns:
            tables.begin(past)
            batch, positions = plan_static(runtime, tables, past)
        else:
            batch, positions = plan_cached(config, runtime, tokens, first_columns, past, capacity)
        if position_ids is not None:
            positions = position_ids
        return batch, positions, past_key_values, attention_mask

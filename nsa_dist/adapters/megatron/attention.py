"""Megatron's self-attention with Native Sparse Attention as its core.

Megatron's ``Attention.forward`` is unchanged: it rotates, recomputes the core, handles packed
batches and projects the output. It passes only queries, keys and values to the core, and
recomputation saves only tensors. So these tensors carry all input of the core:

    query  [s, b, own heads, d]
    key    [s, b, key sets * own KV heads, d]: sets of independent keys are extra heads, which
           rotary treats like the others
    value  [s, b, own KV heads, value sets * d + gates]: the values of a KV head, then the gate
           logits of its query heads; Megatron does not change values on the way
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import set_save_original_input
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nsa_dist.adapters.megatron.checks import (
    check_build,
    check_call,
    check_experts,
    check_from_dense,
    check_no_mask,
)
from nsa_dist.adapters.megatron.masks import check_mask
from nsa_dist.adapters.megatron.modules import (
    Norm,
    ParallelCompressor,
    local_gate_logits,
    make_parallel_gate,
)
from nsa_dist.adapters.megatron.packed import (
    LAYOUTS,
    check_packed,
    for_layer,
    layout_of,
    stream_angles,
)
from nsa_dist.attention.functional import native_sparse_attention
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import SINGLE, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.plan.statement import Statement

GATE_MULTIPLE = 8
"""Gate logits are padded to a multiple of this, to keep rows of values aligned."""


def local_config(config: NSAConfig, tp_size: int) -> NSAConfig:
    """The config with the heads of one tensor parallel rank."""
    return replace(
        config,
        num_heads=config.num_heads // tp_size,
        num_kv_heads=config.num_kv_heads // tp_size,
    )


class NSACoreAttention(MegatronModule):
    """The three branches for a rank's own heads; queries and keys come rotated.

    ``NSASelfAttention`` checks ``config`` and builds it with the arguments of Megatron's core
    attentions.

    Attributes:
        communication: bytes sent between context parallel ranks, by kind, since its last reset.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        nsa_config: NSAConfig,
        backend: str,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.backend = layer_number, backend
        self.tp_group = pg_collection.tp
        cp_group = pg_collection.cp
        self.context = context_group(cp_group) if cp_group.size() > 1 else SINGLE
        self.nsa_config = local_config(nsa_config, self.tp_group.size())
        self.communication = CommunicationCounter()

        def compressor(needed: bool, dim: int) -> nn.Module | None:
            if not needed:
                return None
            return ParallelCompressor(
                self.nsa_config, dim, whole=nsa_config, megatron=config, tp_group=self.tp_group
            )

        in_use = "compressed" in nsa_config.branches
        self.k_compressor = compressor(nsa_config.uses_compression, nsa_config.head_dim)
        self.v_compressor = compressor(in_use, nsa_config.value_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally within documents.

        Args:
            query, key, value: as in the module's docstring; without b for packed batches.
            attention_mask: ignored; ``NSASelfAttention`` has checked it.
            packed_seq_params: as ``packed.for_layer`` makes them.

        Returns:
            [s, b, own heads * d]; [t, own heads * d] for packed batches.
        """
        config = self.nsa_config
        packed: Any = packed_seq_params  # As ``packed.for_layer`` makes them.
        if packed is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        # [s, b, ...] -> [b, s, ...]
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        width = config.num_value_sets * config.value_dim
        keys = key.unflatten(2, (config.num_key_sets, config.num_kv_heads)).unbind(2)
        values = value[..., :width].unflatten(-1, (config.num_value_sets, -1)).unbind(3)
        logits = value[..., width : width + config.heads_per_group * len(config.branches)]
        logits = logits.unflatten(-1, (config.heads_per_group, -1)).flatten(2, 3)
        gates = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        shared = not config.independent_kv
        out = native_sparse_attention(
            query,
            keys[0] if shared else dict(zip(config.key_branches, keys, strict=True)),
            values[0] if shared else dict(zip(config.branches, values, strict=True)),
            gates,
            self.k_compressor,
            self.v_compressor,
            config=config,
            cu_seqlens=None if packed is None else packed.nsa_cu_seqlens,
            layout="zigzag" if packed is None else packed.nsa_layout,
            group=self.context,
            backend=self.backend,
            communication=self.communication,
        )
        out = out.transpose(0, 1).flatten(2)
        return out if packed is None else out.squeeze(1)

    def refuse(self, error: ValueError) -> None:
        """Raise the error in this rank's input on every rank of the group."""
        agree(Statement({"call": "forward"}), str(error), self.context, self.communication, error)


class NSASelfAttention(Attention):
    """Native Sparse Attention that replaces Megatron's ``SelfAttention``.

    Args:
        config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection: as in
            Megatron.
        nsa_config: the attention; its heads and widths must be those of ``config``.
        backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.
        experts: whether the layer's MLP is a mixture of experts; None if unknown.
        from_dense: start gates as constants, at ``nsa_config.gate_init``, and compressors as the
            mean of a block, for the weights of a dense model.

    Raises:
        ValueError: if an option has a value that is not allowed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        nsa_config: NSAConfig,
        backend: str = "auto",
        experts: bool | None = None,
        from_dense: bool = False,
        **_: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        check_build(config, nsa_config, submodules, attn_mask_type, pg_collection, backend)
        check_experts(config, layer_number, experts)
        check_from_dense(nsa_config, from_dense)
        core = ModuleSpec(
            module=submodules.core_attention,
            params={"nsa_config": nsa_config, "backend": backend},
        )
        super().__init__(
            config=config,
            submodules=replace(submodules, core_attention=core),
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.nsa_config = local_config(nsa_config, self.tp_group.size())
        self.split_sequence = config.sequence_parallel and self.tp_group.size() > 1
        sets = nsa_config.num_key_sets + nsa_config.num_value_sets
        self.linear_qkv_out_dim = self.query_projection_size + sets * self.kv_projection_size
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            self.linear_qkv_out_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
        )
        norm: dict[str, Any] = {
            "hidden_size": self.hidden_size_per_attention_head,
            "config": config,
            "eps": config.layernorm_epsilon,
        }
        self.q_layernorm = self.k_layernorm = None
        if submodules.q_layernorm is not None:
            self.q_layernorm = build_module(submodules.q_layernorm, **norm)
        if submodules.k_layernorm is not None:
            # The weight sets the temperature of a branch's softmax: one per set of keys.
            if nsa_config.independent_kv and _module_of(submodules.k_layernorm) is Norm:
                norm["num_sets"] = nsa_config.num_key_sets
            self.k_layernorm = build_module(submodules.k_layernorm, **norm)
        self.gate = make_parallel_gate(nsa_config, config)
        if from_dense:
            self._start_from_dense()

    @torch.no_grad()
    def _start_from_dense(self) -> None:
        for name, parameter in self.gate.named_parameters():
            if name in ("proj.weight", "down.weight"):
                parameter.zero_()
        core: Any = self.core_attention
        for compressor in (core.k_compressor, core.v_compressor):
            if compressor is not None:
                compressor.start_as_mean()

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As in Megatron's ``Attention``: [s, b, hidden_size] to (the same shape, bias or None).

        Args:
            attention_mask: None or a causal mask; None for packed batches.

        Raises:
            ValueError: for a KV cache, keys and values of another layer, an attention bias, or a
                mask that is not plain causal.
        """
        core: Any = self.core_attention
        packed = kwargs.get("packed_seq_params")
        try:
            check_call(kwargs)
            if attention_mask is not None:
                check_no_mask(attention_mask, kwargs)
            if packed is not None:
                check_packed(packed, predicts_more=self.config.mtp_num_layers is not None)
        except ValueError as error:
            core.refuse(error)
        tokens = hidden_states.shape[0] * (self.tp_group.size() if self.split_sequence else 1)
        if attention_mask is not None:
            check_mask(attention_mask, tokens, core.context, core.communication)
        if packed is not None:
            kwargs = self._for_packed(kwargs, tokens * core.context.size, hidden_states.device)
        output, bias = super().forward(hidden_states, attention_mask, **kwargs)
        return output, bias

    def _for_packed(
        self, given: dict[str, Any], length: int, device: torch.device
    ) -> dict[str, Any]:
        """Arguments of Megatron's forward for a packed stream of ``length`` tokens."""
        packed: PackedSeqParams = given["packed_seq_params"]
        core: Any = self.core_attention
        # On one rank both layouts are the stream itself.
        layout = LAYOUTS[0] if core.context.size == 1 else layout_of(packed)
        own: Any = for_layer(packed, layout, length, device)
        changed = given | {"packed_seq_params": own}
        angles = given.get("rotary_pos_emb")
        if layout == "zigzag" and angles is not None:
            pair = angles if isinstance(angles, tuple) else (angles,) * 2
            changed["rotary_pos_emb"] = tuple(
                None if x is None else stream_angles(x, own.nsa_cu_seqlens, length) for x in pair
            )
        return changed

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project, normalise, and append the gate logits to the values (see the module docstring).

        Args:
            hidden_states: [s, b, hidden_size], or [s/tp, b, hidden_size] under sequence parallel.
        """
        config, dim = self.nsa_config, self.hidden_size_per_attention_head
        queries, kv_heads = config.heads_per_group, config.num_kv_heads
        mixed, _bias = self.linear_qkv(hidden_states)
        tokens = mixed.shape[:2]
        widths = [x * dim for x in (queries, config.num_key_sets, config.num_value_sets)]
        query, key, value = mixed.unflatten(-1, (kv_heads, -1)).split(widths, dim=-1)
        query = query.reshape(*tokens, config.num_heads, dim)
        key = key.unflatten(-1, (config.num_key_sets, dim))
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        key = key.transpose(2, 3).reshape(*tokens, -1, dim)

        logits = local_gate_logits(
            self.gate, hidden_states, tokens, self.tp_group, split=self.split_sequence
        )
        logits = logits.unflatten(-1, (kv_heads, -1))
        logits = F.pad(logits, (0, -logits.shape[-1] % GATE_MULTIPLE))
        return query, key, torch.cat((value, logits.to(value.dtype)), dim=-1)

    def set_for_recompute_input_layernorm(self) -> None:
        """Let the projection keep its input, which recomputation of the norm before it restores,
        instead of a copy in 8 bits. Megatron calls it for FP8 alone."""
        set_save_original_input(self.linear_qkv)

    def extra_repr(self) -> str:
        return f"nsa_config={self.nsa_config}"


def _module_of(spec: ModuleSpec | type) -> type:
    return spec.module if isinstance(spec, ModuleSpec) else spec

"""The attention module of a converted model, which replaces the dense one.

It keeps the dense module's projections and norms and the model's rotary embedding, and adds gates
and compressors. Without a cache it calls ``native_sparse_attention``, with one the same steps over
cached rows (``nsa_dist.decoding``). What differs between models is in ``families``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.adapters.huggingface.batch import Batch
from nsa_dist.adapters.huggingface.cache import NSACacheLayer
from nsa_dist.adapters.huggingface.families import (
    NORMS_OVER_HEADS,
    ROTARY,
    norm_epsilon,
    norm_offset,
    split_projections,
)
from nsa_dist.adapters.huggingface.weights import whole
from nsa_dist.attention.functional import native_sparse_attention
from nsa_dist.config import NSAConfig
from nsa_dist.decoding.step import CachedCompression, attend_cached
from nsa_dist.nn.compressor import BlockCompressor
from nsa_dist.nn.gates import make_gate
from nsa_dist.nn.norm import SetNorm
from nsa_dist.nn.tensor_parallel import project
from nsa_kernels import get_backend


class NSAAttention(nn.Module):
    """Native Sparse Attention with the weights and interface of transformers' attention modules.

    Args:
        dense: an attention module of ``families.ROTARY``, whose projections and norms are reused.
            A fused projection is split into copies. With independent K, V each set starts as a
            copy of the dense one.
        config: the attention.

    Raises:
        ValueError: if another library has replaced the function that rotates queries and keys.

    Parameters, with h hidden size, d head_dim, H heads, G KV heads, nk and nv sets of keys and
    values (1 with shared K, V):
        q_proj.weight [H d, h], o_proj.weight [h, H d], and their biases: the dense module's.
        k_proj.weight [nk G d, h], v_proj.weight [nv G d, h]: rows (set, head, channel); a single
            set is the dense module's.
        q_norm.weight [n], k_norm.weight [m] ([nk, m] with independent K, V): where the dense module
            has them; n = m = d, or n = H d and m = G d if its norms are over all heads (OLMo 2, 3).
        gate.*, k_compressor.*, v_compressor.*: as in ``NativeSparseAttention``.
    """

    def __init__(self, dense: Any, config: NSAConfig) -> None:
        super().__init__()
        self.config, self.layer_idx = config, dense.layer_idx
        self.dense_type = type(dense)
        rotary = ROTARY[self.dense_type].__module__
        if not rotary.startswith("transformers."):  # It may expect heads in another place.
            raise ValueError(
                "apply_rotary_pos_emb must be transformers' own when "
                "nsa_dist.adapters.huggingface is imported (import it before Liger's kernels are "
                f"applied), got one of {rotary}"
            )
        self.rotates = bool(getattr(dense, "use_rope", True))  # SmolLM3 has layers that do not.
        kv_width = config.num_kv_heads * config.head_dim
        sizes = (config.num_heads * config.head_dim, kv_width, kv_width)
        q_proj, k_proj, v_proj = split_projections(dense, sizes)
        weight = q_proj.weight
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.q_proj, self.o_proj = q_proj, dense.o_proj
        self.k_proj = _repeat_rows(k_proj, config.num_key_sets)
        self.v_proj = _repeat_rows(v_proj, config.num_value_sets)
        self.q_norm: nn.Module | None = getattr(dense, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(dense, "k_norm", None)
        if self.k_norm is not None and config.independent_kv:
            dense_norm: Any = self.k_norm
            norm = SetNorm(
                config.num_key_sets,
                kv_width if self.dense_type in NORMS_OVER_HEADS else config.head_dim,
                norm_epsilon(dense_norm),
                offset=norm_offset(dense_norm),
                **factory,
            )
            with torch.no_grad(), whole([dense_norm.weight, norm.weight]):
                norm.weight.copy_(dense_norm.weight.expand_as(norm.weight))
            norm.weight.requires_grad_(dense_norm.weight.requires_grad)
            self.k_norm = norm.train(dense_norm.training)
        self.gate = make_gate(q_proj.in_features, config, **factory)
        self.k_compressor = self.v_compressor = None
        if config.uses_compression:
            self.k_compressor = BlockCompressor(config, config.head_dim, **factory)
        if "compressed" in config.branches:
            self.v_compressor = BlockCompressor(config, config.value_dim, **factory)
        # Not train(), which would change the reused modules of the dense model.
        self.training = dense.training
        for module in (self.gate, self.k_compressor, self.v_compressor):
            if module is not None:
                module.train(dense.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        nsa_batch: Batch | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As in the dense modules: [B, L, hidden] to (the same shape, None).

        Args:
            attention_mask: ignored; ``nsa_batch`` holds the same information.
            nsa_batch: from the decoder's ``forward``.

        Raises:
            ValueError: without ``nsa_batch``, if a tensor parallel plan split a projection, or on
                another device than the first layer.
        """
        if nsa_batch is None or position_embeddings is None:
            raise ValueError(
                "nsa_batch must be what the decoder's forward passes on, got None; call the model "
                "or its .model, not its layers"
            )
        if nsa_batch.device != hidden_states.device:
            raise ValueError(
                f"device_map must place all layers on one device, got layer {self.layer_idx} on "
                f"{hidden_states.device} and the first one on {nsa_batch.device}"
            )
        config = self.config
        q_shape = (config.num_heads, config.head_dim)
        key_shape = (config.num_key_sets, config.num_kv_heads, config.head_dim)
        value_shape = (config.num_value_sets * config.num_kv_heads, config.value_dim)
        q, k, v = (
            project(name, module, hidden_states, math.prod(shape)).unflatten(-1, shape)
            for name, module, shape in (
                ("q_proj", self.q_proj, q_shape),
                ("k_proj", self.k_proj, key_shape),
                ("v_proj", self.v_proj, value_shape),
            )
        )
        q, k = self._normalise(q, k)
        k = k.flatten(2, 3)
        if self.rotates:
            q, k = ROTARY[self.dense_type](q, k, *position_embeddings, unsqueeze_dim=2)
        # Under autocast the rotary embedding computes in float32.
        q, k = q.to(v.dtype), k.to(v.dtype)
        gates = self.gate(hidden_states)
        if past_key_values is None:
            out = self._attend(q, k, v, gates, nsa_batch)
        else:
            layer = past_key_values.layers[self.layer_idx]
            out = self._attend_cached(q, k, v, gates, nsa_batch, layer)
        return project("o_proj", self.o_proj, out.flatten(2), hidden_states.shape[-1]), None

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, L, H, D] and keys [B, L, sets, G, D] after the dense module's norms."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        if self.dense_type not in NORMS_OVER_HEADS:
            return self.q_norm(q), self.k_norm(k)
        wide_k = k.flatten(3).unsqueeze(3)  # [B, L, sets, 1, G * D]: all heads as one
        return self.q_norm(q.flatten(2)).view_as(q), self.k_norm(wide_k).view_as(k)

    @torch.compiler.disable  # As in NativeSparseAttention.
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, batch: Batch) -> Tensor:
        """[B, L, heads, D] and gates to [B, L, H, D], without a cache."""
        config = self.config
        assert batch.plan is not None
        shape = q.shape
        if batch.rows is not None:
            q, k, v, gates = (_take(x, batch.rows).unsqueeze(0) for x in (q, k, v, gates))
        out = native_sparse_attention(
            q,
            _by_branch(k, config.key_branches, 2) if config.independent_kv else k,
            _by_branch(v, config.branches, 2) if config.independent_kv else v,
            gates,
            self.k_compressor,
            self.v_compressor,
            config=config,
            layout=batch.runtime.layout,
            group=batch.runtime.context,
            backend=batch.runtime.backend,
            plan=batch.plan,
            communication=batch.runtime.communication,
        )
        return out if batch.rows is None else _put(out.squeeze(0), batch.rows, shape)

    @torch.compiler.disable  # As in NativeSparseAttention.
    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, batch: Batch, layer: NSACacheLayer
    ) -> Tensor:
        """As ``_attend``, over the cached tokens and the new ones, which it adds to the cache."""
        step, runtime, shape = batch.step, batch.runtime, q.shape
        assert step is not None
        layer.rows.check_starts(step.starts)
        ops = get_backend(runtime.backend, q.device)
        refused = ops.refuses(q.dtype, self.config.kernel_options)
        if refused is not None:
            raise ValueError(refused)
        q, gates = q.flatten(0, 1), gates.flatten(0, 1)
        if batch.rows is not None:
            q, gates = q.index_select(0, batch.rows), gates.index_select(0, batch.rows)
        keys, values = layer.rows.append(k, v, step)
        out = attend_cached(
            self.config,
            ops,
            runtime.context,
            runtime.communication,
            step,
            q,
            keys,
            values,
            gates,
            CachedCompression(self.k_compressor, self.v_compressor, layer.rows, step),
            few_kernels=not runtime.batch_invariant,
        )
        return out.view(shape) if batch.rows is None else _put(out, batch.rows, shape)

    def extra_repr(self) -> str:
        return f"config={self.config}"


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, rows)


def _put(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Scatter rows [N, H, D] into zeros [B, L, H, D]."""
    whole = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return whole.index_copy(0, rows, x).unflatten(0, shape[:2])


def _by_branch(x: Tensor, branches: tuple[str, ...], dim: int) -> dict[str, Tensor]:
    """Sets of heads along ``dim``, one per branch."""
    return dict(zip(branches, x.chunk(len(branches), dim=dim), strict=True))


def _repeat_rows(linear: nn.Linear, times: int) -> nn.Linear:
    """A linear layer with ``times`` copies of the rows of ``linear``."""
    if times == 1:
        return linear
    weight, bias = linear.weight, linear.bias
    wide = nn.Linear(
        linear.in_features,
        times * linear.out_features,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad(), whole([weight, bias, wide.weight, wide.bias]):
        wide.weight.copy_(weight.repeat(times, 1))
        if bias is not None:
            wide.bias.copy_(bias.repeat(times))
    wide.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        wide.bias.requires_grad_(bias.requires_grad)
    return wide.train(linear.training)

"""The attention of a torchtitan layer: its projections, norms and rotary embedding, our branches.

Compiled, a layer breaks its graph once, around the attention: plans are made on the host, and their
sizes change with every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary
from torchtitan.config import derive
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import Identity

from nsa_dist.adapters.torchtitan.checks import check_attention, check_options, check_spmd_backend
from nsa_dist.adapters.torchtitan.modules import (
    Compressor,
    compressor_config,
    gate_config,
    qkv_config,
)
from nsa_dist.attention.functional import native_sparse_attention
from nsa_dist.attention.plan_cache import get_plan
from nsa_dist.checks import check
from nsa_dist.comm.group import SINGLE, ContextGroup, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.nn.gates import gates_from_logits
from nsa_dist.plan import Plan
from nsa_dist.sharding import boundaries_from_positions
from nsa_kernels.unchanged import Seen


@dataclass(frozen=True, eq=False)
class _Batch:
    """The plans of a batch, and the positions that they were made from."""

    seen: Seen
    plans: dict[Any, Plan]


_batches: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A ``_Batch`` by its positions, a tensor that all layers share: as long as that tensor."""


_NOT_COMPILED = (
    "Native Sparse Attention makes plans on the host: with compile.enable, replace the attention"
    " by use_nsa in a config function, which lets layers break their graph, and not by an override"
)
"""What torch tells where a layer is compiled with ``fullgraph=True``."""


class NSAttention(GQAttention):
    """``GQAttention`` with Native Sparse Attention in the place of its inner attention.

    With H heads, G KV heads of width D, nk = ``num_key_sets``, nv = ``num_value_sets`` and nb
    branches; *split* means over tensor parallel ranks along the first dimension, by groups:

    | parameter | shape | |
    |---|---|---|
    | ``qkv_linear.*`` | the model's own with one shared K, V | split |
    | ``qkv_linear.wk.weight``, ``wv.weight`` | else [G nk D, hidden], [G nv D, hidden] | split |
    | ``gate.weight``, ``gate.bias`` | [H nb, hidden], rows (head, branch) | split |
    | ``k_compressor.*``, ``v_compressor.*`` | of ``BlockCompressor`` | whole; split per head |
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        nsa: NSAConfig
        layout: str
        gate: Linear.Config
        k_compressor: Compressor.Config | None
        v_compressor: Compressor.Config | None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.nsa, self.layout = config.nsa, config.layout
        self.context: ContextGroup = SINGLE
        self.gate = config.gate.build()
        compressors = (config.k_compressor, config.v_compressor)
        self.k_compressor, self.v_compressor = (
            None if compressor is None else compressor.build() for compressor in compressors
        )

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Take the context parallel group and this tensor parallel rank's heads; shard weights."""
        check_spmd_backend(parallel_dims.spmd_backend)
        self.context = context_group(parallel_dims.get_optional_mesh("cp"))
        self.nsa = self.nsa.split(parallel_dims.tp)
        super().parallelize(parallel_dims)

    def forward(
        self, x_BLD: Tensor, attention_masks: Any, positions: Tensor | None = None
    ) -> Tensor:
        """This rank's tokens [B, L, hidden] to [B, L, hidden]; documents are those of positions.

        Raises:
            ValueError: on every rank of the group, if positions are not split as ``layout``.
        """
        check(
            attention_masks is None,
            "attention_masks",
            type(attention_masks).__name__,
            "None with Native Sparse Attention, which finds documents in positions",
        )
        nsa = self.nsa
        q, k, v = self.qkv_linear(x_BLD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope(q, k, positions)
        gates = gates_from_logits(self.gate(x_BLD), nsa)
        return self.wo(self._attend(q, k, v, gates, positions).flatten(2))

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, positions: Tensor | None
    ) -> Tensor:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "training.disable_cuda_graphs must be True with Native Sparse Attention, whose "
                "plans are made on the host for each batch, got a CUDA graph that is captured"
            )
        nsa = self.nsa
        keys: Tensor | dict[str, Tensor] = k
        values: Tensor | dict[str, Tensor] = v
        if nsa.independent_kv:
            keys = _by_set(k, nsa.num_key_sets, nsa.key_branches)
            values = _by_set(v, nsa.num_value_sets, nsa.branches)
        return native_sparse_attention(
            q,
            keys,
            values,
            gates,
            self.k_compressor,
            self.v_compressor,
            config=nsa,
            plan=self._plan(q, positions),
            layout=self.layout,
            group=self.context,
        )

    @_disable_current_modes()  # As in find_plan.
    def _plan(self, q: Tensor, positions: Tensor | None) -> Plan:
        """The batch's plan: the first layer makes it, the others find it."""
        # Layers of one group have a context each.
        key = (self.nsa, self.layout, self.context.reference, q.dtype)
        made = {} if positions is None else _plans_of(positions)
        if key not in made:
            made[key] = get_plan(
                self.nsa,
                self.layout,
                self.context,
                batch=q.shape[0],
                local_length=q.shape[1],
                cu_seqlens=None
                if positions is None
                else boundaries_from_positions(positions, layout=self.layout, group=self.context),
                dtype=q.dtype,
                device=q.device,
            )
        return made[key]


def _plans_of(positions: Tensor) -> dict[Any, Plan]:
    """The plans of these positions so far; none where another batch was written into the tensor."""
    batch: _Batch | None = _batches.get(positions)
    if batch is None or not batch.seen.again(positions):
        batch = _batches[positions] = _Batch(Seen(positions, "positions"), {})
    return batch.plans


def nsa_attention_config(
    attention: GQAttention.Config, nsa: NSAConfig | Mapping[str, Any], layout: str
) -> NSAttention.Config:
    """The config of a layer's attention, from its dense one that torchtitan has sharded.

    Args:
        nsa: the hyperparameters; or options of NSAConfig without heads and widths.

    Raises:
        ValueError: if the attention cannot be replaced, or an option is not allowed.
    """
    check_attention(attention)
    nsa = nsa if isinstance(nsa, NSAConfig) else nsa_config(attention, nsa)
    check_options(nsa)
    width = nsa.head_dim
    compressed = "compressed" in nsa.branches
    return derive(
        attention,
        NSAttention.Config,
        nsa=nsa,
        layout=layout,
        qkv_linear=qkv_config(attention.qkv_linear, attention.dim, nsa),
        inner_attention=Identity.Config(),
        gate=gate_config(attention.dim, nsa),
        k_compressor=compressor_config(nsa, width) if nsa.uses_compression else None,
        v_compressor=compressor_config(nsa, width) if compressed else None,
    )


def nsa_config(attention: GQAttention.Config, options: Mapping[str, Any]) -> NSAConfig:
    """An NSAConfig with the heads and widths of a dense attention.

    Raises:
        ValueError: if an option is unknown, not allowed, or one of the model's.
    """
    sizes: dict[str, Any] = model_sizes(attention)
    known = set(NSAConfig.__dataclass_fields__) - set(sizes)
    for name in options:
        must = f"one of {', '.join(sorted(known))} (heads and widths are the model's)"
        check(name in known, "option of NSAConfig", name, must)
    return NSAConfig(**sizes, **options)


def model_sizes(attention: GQAttention.Config) -> dict[str, int]:
    """Heads and widths of a dense attention, as options of NSAConfig."""
    return {
        "num_heads": attention.n_heads,
        "num_kv_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or attention.dim // attention.n_heads,
    }


def _by_set(x: Tensor, sets: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    """[B, L, G*sets, D], rows (group, set), to [B, L, G, D] by name."""
    return dict(zip(names, x.unflatten(2, (-1, sets)).unbind(3), strict=True))

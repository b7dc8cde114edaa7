"""A module with the interface of ``deepspeed.sequence.layer.DistributedAttention``.

Input and output are split by tokens. Ulysses exchanges tokens for heads, and so needs at least as
many KV heads as ranks. Here each rank keeps all heads and fetches the tokens that its queries need.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.attention.call import Call, check_backend, make_call, make_setup
from nsa_dist.attention.checks import gates_problem, keys_problem, query_problem, tensor_problem
from nsa_dist.attention.functional import attend
from nsa_dist.attention.selectors import CompressedSelector
from nsa_dist.checks import DTYPES, check, describe
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.nn.compressor import BlockCompressor, check_custom
from nsa_dist.nn.gates import StaticGate
from nsa_dist.plan import Plan
from nsa_dist.plan.layout import check_batch_size, make_layout


class NSADistributedAttention(nn.Module):
    """Native Sparse Attention that replaces Ulysses' ``DistributedAttention``.

    Build it inside the model before ``deepspeed.initialize``, so that its parameters are in the
    optimizer and in checkpoints. It supports any number of KV heads on any number of ranks.

    Args:
        config: the attention, with ``independent_kv=False``. With ``gate="static"`` the module has
            the gates as parameters; otherwise pass them with each call (``gates=``).
        sequence_process_group: process group or one-dimensional DeviceMesh of the ranks that share
            a sequence; None for one rank.
        layout: how tokens are split: "contiguous" as in Ulysses, "zigzag", which balances the
            computation, or "zigzag_per_document".
        backend: "auto" (Triton on an NVIDIA GPU, else PyTorch) or a name that
            ``nsa_kernels.get_backend`` knows.
        k_compressor, v_compressor: modules that map [C, G, l, D] to [C, G, D], with
            ``config.compress == "custom"``.

    Parameters: ``k_compressor.*``, ``v_compressor.*`` of ``BlockCompressor``; ``gate.logits``
    [H, nb] with ``gate="static"``.

    Attributes:
        communication: bytes sent by this module, by kind, since its last ``reset``.

    Raises:
        ValueError: if an option has a value that is not allowed.
    """

    def __init__(
        self,
        config: NSAConfig,
        sequence_process_group: GroupLike = None,
        *,
        layout: str = "contiguous",
        backend: str = "auto",
        k_compressor: nn.Module | None = None,
        v_compressor: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(isinstance(config, NSAConfig), "config", config, "an NSAConfig")
        must = "False (this attention gets one key and one value for all branches)"
        check(not config.independent_kv, "independent_kv", config.independent_kv, must)
        must = "False (this attention gets rotated keys, or rotates them before it compresses)"
        check(not config.compress_pre_rope, "compress_pre_rope", config.compress_pre_rope, must)
        context = context_group(sequence_process_group)
        layout = make_layout(layout, context.size).name
        check_backend(backend, config, device)
        self.setup = make_setup(config, layout, context, backend, CommunicationCounter())
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = StaticGate(0, config, **factory) if config.gate == "static" else None

        def compressor(name: str, given: nn.Module | None, needed: bool, dim: int) -> Any:
            check_custom(name, given, config, needed)
            build = needed and given is None
            return BlockCompressor(config, dim, **factory) if build else given

        in_use = "compressed" in config.branches
        keys = config.uses_compression
        self.k_compressor = compressor("k_compressor", k_compressor, keys, config.head_dim)
        self.v_compressor = compressor("v_compressor", v_compressor, in_use, config.value_dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *,
        gates: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend causally within documents.

        Args:
            q: [b, L, H, Dk], this rank's tokens; [L, b, H, Dk] with ``batch_dim_idx=1``.
            k, v: like q, with [G, Dk] and [G, Dv].
            batch_dim_idx: 0 or 1, the index of the batch dimension.
            rotary_pos_emb: None if queries and keys are already rotated; else cos and sin, each
                [T, 1 or b, 1, r], for all tokens of the whole stream, with equal halves of r:
                channels c and c + r/2 rotate together, channels from r on stay as they are.
            gates: [b, L, H, nb] (or [L, b, H, nb]), in (0, 1), branches in the order of
                ``config.branches``; replace the static gates.
            cu_seqlens: int32 [documents + 1], boundaries of the whole padded stream, equal on all
                ranks, with b = 1; None if each row is one document.

        Returns:
            [b, L, H, Dv] or [L, b, H, Dv] in the dtype of ``q``.

        Raises:
            ValueError: on every rank of the group, if an argument of any rank is not allowed.
        """
        if isinstance(batch_dim_idx, Integral) and not isinstance(batch_dim_idx, bool):
            batch_dim_idx = int(batch_dim_idx)
        problem = self._layout_problem(q, k, v, batch_dim_idx, gates)
        if problem is not None:
            self.setup.refuse(problem, {"q": describe(q), "gates": describe(gates)})
        if batch_dim_idx == 1:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            gates = None if gates is None else gates.transpose(0, 1)
        call = self._call(q, k, v, batch_dim_idx, rotary_pos_emb, gates, cu_seqlens)
        if rotary_pos_emb is not None:
            cos, sin = (self._local(x, call.plan, cu_seqlens) for x in rotary_pos_emb)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.gate is not None:
            static = self.gate(q.new_empty(*q.shape[:2], 0))
            # With given gates the static ones get a gradient of zeros: ZeRO would wait forever for
            # a parameter without a gradient.
            gates = static if gates is None else gates + 0 * static.to(gates.dtype)
        assert gates is not None
        selector = CompressedSelector(self.k_compressor, self.v_compressor)
        out = attend(call, q, k, v, gates, selector).out_NHD.unflatten(0, q.shape[:2])
        return out.transpose(0, 1) if batch_dim_idx == 1 else out

    def _layout_problem(self, q: Any, k: Any, v: Any, batch_dim_idx: int, gates: Any) -> str | None:
        """The error in the number of dimensions and the batch dimension, or None."""
        if batch_dim_idx not in (0, 1) or isinstance(batch_dim_idx, bool):
            return (
                "batch_dim_idx must be 0 for [batch, local tokens, heads, width] or 1 for "
                f"[local tokens, batch, heads, width], got {batch_dim_idx!r}"
            )
        if gates is None and self.gate is None:
            return (
                f"gates must be a tensor with gate={self.config.gate!r}, whose hidden states this "
                "module does not get (or use gate='static'), got None"
            )
        for name, x in (("q", q), ("k", k), ("v", v), ("gates", gates)):
            if x is None and name == "gates":
                continue
            problem = tensor_problem(name, x)
            if problem is None and x.ndim != 4:
                problem = f"{name} must have four dimensions, got shape {tuple(x.shape)}"
            if problem is not None:
                return problem
        return None

    @torch.compiler.disable  # As in NativeSparseAttention: the only graph break of the layer.
    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        gates: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Call:
        config, rows = self.config, (q.shape[0], q.shape[1])
        problem = query_problem(q, config) or keys_problem(q, k, v, config, self.setup.key_sets)
        if problem is None and gates is not None:
            problem = gates_problem(gates, q, config)
        if problem is not None and batch_dim_idx == 1:
            problem += " (shapes here have the batch first)"
        problem = problem or _rotary_problem(rotary_pos_emb, q, rows, self.context.size)
        if cu_seqlens is not None:
            problem = problem or check_batch_size(rows[0])
        if problem is not None:
            self.setup.refuse(problem, {"q": describe(q), "gates": describe(gates)})
        return make_call(
            self.setup,
            rows,
            q.device,
            q.dtype,
            cu_seqlens=cu_seqlens,
            stated={
                "batch_dim_idx": repr(batch_dim_idx),
                "rotary_pos_emb": "None" if rotary_pos_emb is None else "cos and sin",
                "gates": describe(gates),
            },
        )

    @property
    def config(self) -> NSAConfig:
        """The hyperparameters."""
        return self.setup.config

    @property
    def context(self) -> ContextGroup:
        """The ranks that share the sequence."""
        return self.setup.group

    @property
    def layout(self) -> str:
        """Name of the layout by which the sequence is split."""
        return self.setup.layout

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self.setup.backend

    @property
    def communication(self) -> CommunicationCounter:
        """Bytes sent by this module, by kind, since its last ``reset``."""
        return self.setup.counter

    def _local(self, x: Tensor, plan: Plan, cu_seqlens: Tensor | None) -> Tensor:
        """[T, 1 or b, 1, r] of the whole stream to [1 or b, L, 1, r] of this rank's tokens."""
        columns = plan.positions.view(plan.batch, -1)[0]
        if cu_seqlens is not None:
            columns = columns + cu_seqlens.to(columns)[plan.documents]
        return x[columns].transpose(0, 1)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"heads={config.num_heads}/{config.num_kv_heads}, branches={config.branches}, "
            f"gate={config.gate}, layout={self.layout}, ranks={self.context.size}, "
            f"backend={self.backend}"
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r channels of [b, L, heads, D], computed in float32, rounded once."""
    width = cos.shape[-1]
    compute = torch.promote_types(x.dtype, torch.float32)
    rotated = x[..., :width].to(compute)
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = rotated * cos.to(compute) + turned * sin.to(compute)
    return torch.cat((rotated.to(x.dtype), x[..., width:]), dim=-1)


def _rotary_problem(
    rotary_pos_emb: tuple[Tensor, Tensor] | None, q: Tensor, rows: tuple[int, int], size: int
) -> str | None:
    """The error in cos and sin, or None."""
    if rotary_pos_emb is None:
        return None
    if not isinstance(rotary_pos_emb, (tuple, list)) or len(rotary_pos_emb) != 2:
        return f"rotary_pos_emb must be None or (cos, sin), got {describe(rotary_pos_emb)}"
    batch, tokens = rows[0], rows[1] * size
    for name, x in zip(("cos", "sin"), rotary_pos_emb, strict=True):
        if (
            not isinstance(x, Tensor)
            or x.ndim != 4
            or x.shape[0] != tokens
            or x.shape[1] not in (1, batch)
            or x.shape[2] != 1
            or x.shape[3] % 2
            or not 0 < x.shape[3] <= q.shape[-1]
            or x.shape != rotary_pos_emb[0].shape
            or x.dtype not in DTYPES
            or x.device != q.device
        ):
            return (
                f"rotary_pos_emb must be cos and sin of one shape [{tokens} tokens of the whole "
                f"stream, 1 or {batch}, 1, an even width up to {q.shape[-1]}], floating point on "
                f"{q.device.type}, got {name}: {describe(x)}"
            )
    return None

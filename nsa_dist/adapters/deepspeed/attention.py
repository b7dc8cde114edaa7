"""A module in the shape of ``deepspeed.sequence.layer.DistributedAttention``.

Queries, keys and values come in and go out split by tokens. Ulysses exchanges tokens for heads, and
so needs as many KV heads as ranks; here heads stay, and what a query needs comes to it.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.attention.functional import native_sparse_attention
from nsa_dist.attention.plan_cache import find_plan
from nsa_dist.checks import DTYPES, check, describe, is_plain
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import GroupLike, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.nn.compressor import BlockCompressor, check_custom
from nsa_dist.nn.gates import StaticGate
from nsa_dist.plan import Plan
from nsa_dist.plan.layout import make_layout
from nsa_dist.plan.statement import Statement
from nsa_kernels import get_backend


class NSADistributedAttention(nn.Module):
    """Native Sparse Attention in the place of Ulysses' ``DistributedAttention``.

    Build it inside the model before ``deepspeed.initialize``, so that its parameters are in the
    optimizer and in checkpoints. Any number of KV heads goes with any number of ranks.

    Args:
        config: what is computed, with ``independent_kv=False``. With ``gate="static"`` the module
            owns the gates; with others each call brings them (``gates=``).
        sequence_process_group: process group or one-dimensional DeviceMesh of the ranks that share
            a sequence; None for one rank.
        layout: how tokens are split: "contiguous", as Ulysses has them, "zigzag", which balances
            the work, or "zigzag_per_document".
        backend: "auto" (Triton on an NVIDIA GPU, else PyTorch) or a name that
            ``nsa_kernels.get_backend`` knows.
        k_compressor, v_compressor: with ``config.compress == "custom"``, modules
            [C, G, l, D] -> [C, G, D].

    Parameters: ``k_compressor.*``, ``v_compressor.*`` of ``BlockCompressor``; ``gate.logits``
    [H, nb] with ``gate="static"``.

    Attributes:
        communication: bytes moved by this module, by kind, since its last ``reset``.

    Raises:
        ValueError: naming the option, the value found and the values that work.
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
        self.context = context_group(sequence_process_group)
        layout = make_layout(layout, self.context.size).name
        placed = device if device is not None and torch.device(device).type == "cuda" else None
        refused = get_backend(backend, placed).refuses(None, config.kernel_options)
        if refused is not None:
            raise ValueError(refused)
        self.config, self.layout, self.backend = config, layout, backend
        self.communication = CommunicationCounter()
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
            k, v: as q, of [G, Dk] and [G, Dv].
            batch_dim_idx: 0 or 1, which dimension is the batch.
            rotary_pos_emb: None for queries and keys that are rotated already; else cos and sin,
                [T, 1 or b, 1, r] each, of every token of the whole stream, both halves of r alike:
                channels c and c + r/2 are rotated together, those beyond r pass.
            gates: [b, L, H, nb] (or [L, b, H, nb]), in (0, 1), branches in the order of
                ``config.branches``; in the place of the static ones.
            cu_seqlens: int32 [documents + 1], boundaries of the whole padded stream, the same on
                all ranks, with b = 1; None for b documents.

        Returns:
            [b, L, H, Dv] or [L, b, H, Dv] in the dtype of ``q``.

        Raises:
            ValueError: naming the option, the value found and the values that work; on every rank
                of the group, whichever rank's input is bad.
        """
        if isinstance(batch_dim_idx, Integral) and not isinstance(batch_dim_idx, bool):
            batch_dim_idx = int(batch_dim_idx)
        plan = self._plan(q, k, v, batch_dim_idx, rotary_pos_emb, gates, cu_seqlens)
        if batch_dim_idx == 1:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            gates = None if gates is None else gates.transpose(0, 1)
        if rotary_pos_emb is not None:
            cos, sin = (self._local(x, plan, cu_seqlens) for x in rotary_pos_emb)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.gate is not None:
            static = self.gate(q.new_empty(*q.shape[:2], 0))
            # Given gates leave the static ones a gradient of zeros: a parameter without one would
            # keep ZeRO waiting.
            gates = static if gates is None else gates + 0 * static.to(gates.dtype)
        assert gates is not None
        out = native_sparse_attention(
            q,
            k,
            v,
            gates,
            self.k_compressor,
            self.v_compressor,
            config=self.config,
            layout=self.layout,
            group=self.context,
            backend=self.backend,
            plan=plan,
            communication=self.communication,
        )
        assert isinstance(out, Tensor)
        return out.transpose(0, 1) if batch_dim_idx == 1 else out

    @torch.compiler.disable  # As in NativeSparseAttention: the one break of a compiled layer.
    def _plan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        gates: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Plan:
        if not is_plain(q):
            found = f"q: found {describe(q)}; a tensor works"
            agree(Statement({"call": "forward"}), found, self.context, self.communication)
        problem = self._problem(q, k, v, batch_dim_idx, gates)
        rows = (0, 0)
        if problem is None:
            rows = (q.shape[batch_dim_idx], q.shape[1 - batch_dim_idx])
            problem = _rotary_problem(rotary_pos_emb, q, rows, self.context.size)
        backend = self.backend
        try:
            ops = get_backend(backend, q.device)
            backend = ops.name
            problem = problem or ops.refuses(q.dtype, self.config.kernel_options)
        except ValueError as error:
            problem = problem or str(error)
        return find_plan(
            self.config,
            self.layout,
            self.context,
            batch=rows[0],
            local_length=rows[1],
            cu_seqlens=cu_seqlens,
            dtype=q.dtype,
            device=q.device,
            counter=self.communication,
            inputs={
                "batch_dim_idx": repr(batch_dim_idx),
                "rotary_pos_emb": "None" if rotary_pos_emb is None else "cos and sin",
                "gates": describe(gates),
                "backend": backend,
            },
            problem=problem,
        )

    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, batch_dim_idx: int, gates: Tensor | None
    ) -> str | None:
        """What is wrong with the tensors of one call, or None."""
        config = self.config
        if batch_dim_idx not in (0, 1) or isinstance(batch_dim_idx, bool):
            return (
                f"batch_dim_idx: found {batch_dim_idx!r}; 0 for [batch, local tokens, heads, "
                "width] and 1 for [local tokens, batch, heads, width] work"
            )
        heads, kv_heads = config.num_heads, config.num_kv_heads
        leading: tuple[int, ...] | None = None
        for name, x, last in (
            ("q", q, (heads, config.head_dim)),
            ("k", k, (kv_heads, config.head_dim)),
            ("v", v, (kv_heads, config.value_dim)),
        ):
            shape = "two dimensions" if leading is None else str(leading)
            if not is_plain(x) or x.ndim != 4 or x.shape[2:] != last:
                return f"{name}: found {describe(x)}; {shape} of batch and tokens, then {last} work"
            leading = tuple(x.shape[:2]) if leading is None else leading
            if tuple(x.shape[:2]) != leading or x.dtype != q.dtype or x.device != q.device:
                return (
                    f"{name}: found {describe(x)}; {leading} of batch and tokens, {q.dtype} and "
                    f"{q.device.type}, as of q, work"
                )
        if q.dtype not in DTYPES or q.is_meta:
            return f"q: found {describe(q)}; data in one of {DTYPES} works"
        if gates is None:
            if self.gate is None:
                return (
                    f"gates: found None with gate={config.gate!r}, which is made of hidden states "
                    "that do not come here; a tensor works, or gate='static'"
                )
            return None
        expected = (*q.shape[:3], len(config.branches))
        fits = is_plain(gates) and gates.shape == expected and gates.dtype in DTYPES
        if not fits or gates.device != q.device:
            return f"gates: found {describe(gates)}; floating point of shape {expected} works"
        return None

    def _local(self, x: Tensor, plan: Plan, cu_seqlens: Tensor | None) -> Tensor:
        """[T, 1 or b, 1, r] of the whole stream -> [1 or b, L, 1, r] of this rank's tokens."""
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
    """What is wrong with cos and sin, or None."""
    if rotary_pos_emb is None:
        return None
    if not isinstance(rotary_pos_emb, (tuple, list)) or len(rotary_pos_emb) != 2:
        return f"rotary_pos_emb: found {describe(rotary_pos_emb)}; (cos, sin) or None works"
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
                f"rotary_pos_emb: found {name}, {describe(x)}; [{tokens} tokens of the whole "
                f"stream, 1 or {batch}, 1, an even width up to {q.shape[-1]}], floating point on "
                f"{q.device.type} works"
            )
    return None

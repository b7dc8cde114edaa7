"""The dense layer on any number of ranks, with everything that comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import NSAConfig, RotaryConfig, make_sharding
from nsa_dist.adapters.ring import DenseAttention, DenseBlock
from tests.distributed.layer_case import LayerResult

HIDDEN = 24
CONFIG = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=6)


@dataclass(frozen=True)
class DenseCase:
    """What varies. ``lengths`` are packed documents, or None for two rows of 45 tokens."""

    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = (20, 31, 0, 1, 39)
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    block: bool = False
    checkpoint: bool = False
    shift: int = 0  # of position_ids; 0: none are given
    autocast: bool = False
    seed: int = 0

    @property
    def cu_seqlens(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    def layer(self, group: Any = None) -> DenseAttention | DenseBlock:
        torch.manual_seed(self.seed)
        options = {"layout": self.layout, "group": group, "dtype": torch.float64} | self.options
        if self.block:
            return DenseBlock(HIDDEN, CONFIG, mlp_hidden=40, **options).to(self.dtype)
        layer = DenseAttention(HIDDEN, CONFIG, **options)
        with torch.no_grad():
            layer.q_proj.weight.mul_(2.5)  # Softmaxes with something to choose.
        return layer.to(self.dtype)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Hidden states and the gradient of the output."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, 45) if self.lengths is None else (1, sum(self.lengths))
        x, grad = (torch.randn(*shape, HIDDEN, generator=generator).double() for _ in range(2))
        return x.to(self.dtype), grad.to(self.dtype)


def run_dense(case: DenseCase, group: Any = None) -> LayerResult:
    """Forward and backward on this rank of ``group`` (one rank for None)."""
    layer = case.layer(group)
    x, grad = case.inputs()
    sharding = make_sharding(
        x.shape[1], cu_seqlens=case.cu_seqlens, layout=case.layout, group=group
    )
    local = sharding.shard(x).requires_grad_()
    more: dict[str, Any] = {"cu_seqlens": sharding.cu_seqlens}
    if case.shift:
        columns = torch.arange(x.shape[1])[None].expand(x.shape[0], -1) * 2 + case.shift
        more["position_ids"] = sharding.shard(columns)
    torch.manual_seed(3)  # Of dropout, the same on all ranks.

    def forward(local: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            return layer(local, **more)

    if case.checkpoint:
        out = torch.utils.checkpoint.checkpoint(forward, local, use_reentrant=False)
    else:
        out = forward(local)
    out.backward(sharding.shard(grad).to(out.dtype))
    assert local.grad is not None
    grads = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        total = parameter.grad.clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        grads[name] = total
    attention = layer.attention if isinstance(layer, DenseBlock) else layer
    return LayerResult(
        output=sharding.unshard(out),
        grad_input=sharding.unshard(local.grad),
        grads=grads,
        selected=None,
        received=dict(attention.communication.received),
        fetched_per_head={},
    )


def on_world(case: DenseCase) -> LayerResult | None:
    """``run_dense`` over the default group; the result on rank 0 alone, to spare the pipes."""
    result = run_dense(case, dist.group.WORLD)
    return result if dist.get_rank() == 0 else None


def masked_layer(case: DenseCase) -> Tensor:
    """The layer's output by a mask over all pairs, float64 [B, T, hidden]."""
    from nsa_dist import apply_rotary, rotary_cos_sin

    layer, (x, _) = case.layer(), case.inputs()
    assert isinstance(layer, DenseAttention)
    length = x.shape[1]
    starts = torch.tensor([0, length]) if case.cu_seqlens is None else case.cu_seqlens.long()
    document = torch.searchsorted(starts, torch.arange(length), right=True) - 1
    positions = torch.arange(length) - starts[document]
    hidden = (document[:, None] != document) | (positions[:, None] < positions)
    if case.shift:
        positions = 2 * torch.arange(length) + case.shift
    q, k, v = (
        p(x).unflatten(-1, (h, -1))
        for p, h in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
    )
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rotary is not None:
        cos, sin = rotary_cos_sin(layer.rotary, CONFIG.head_dim, positions)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * CONFIG.softmax_scale
    probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return layer.o_proj(torch.einsum("bhts,bshd->bthd", probs, v).flatten(2)).detach()


ROTARY = RotaryConfig(theta=100.0, dim=4)

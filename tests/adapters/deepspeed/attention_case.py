"""The module beside the functional form on one rank, and beside Ulysses. Runs on ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import NSAConfig, native_sparse_attention, shard, unshard
from tests.adapters.deepspeed.small_model import SMALL, prepare

DOCUMENTS = (40, 24)
LENGTH = sum(DOCUMENTS)


def rotary_tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, 1, width], both halves alike."""
    frequency = 100.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None, None].double()
    return angle.cos(), angle.sin()


def tensors(config: NSAConfig, rows: int) -> tuple[Tensor, ...]:
    """q, k, v, gates of whole rows, float64, the same on every rank."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, LENGTH, *shape, generator=generator, dtype=torch.float64)

    kv_heads = config.num_kv_heads
    return (
        draw(config.num_heads, config.head_dim),
        draw(kv_heads, config.head_dim),
        draw(kv_heads, config.value_dim),
        draw(config.num_heads, len(config.branches)).sigmoid(),
    )


def make_module(config: NSAConfig, group: Any, layout: str) -> Any:
    from nsa_dist.adapters.deepspeed import NSADistributedAttention

    module = NSADistributedAttention(config, group, layout=layout, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return module


def difference(
    changes: dict[str, Any], layout: str, batch_dim_idx: int, packed: bool, rotary: int, gates: bool
) -> dict[str, float]:
    """On every rank: the largest differences from the functional form on one rank, by tensor, of
    outputs and of the gradients of inputs and parameters, in units of the largest element.

    Args:
        rotary: how many channels are rotated here; 0 for none.
        gates: whether they are given.
    """
    from deepspeed.sequence.layer import apply_rotary_pos_emb

    config, group = replace(SMALL, **changes), dist.group.WORLD
    rows = 1 if packed else 2
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int() if packed else None
    whole = [x.requires_grad_() for x in tensors(config, rows)]
    tables = rotary_tables(LENGTH, rotary) if rotary else None

    one = make_module(config, None, layout)
    q, k, v, given = whole
    if tables is not None:
        cos, sin = (x.transpose(0, 1) for x in tables)
        q, k = (apply_rotary_pos_emb(x, cos, sin) for x in (q, k))
    static = one.gate(q.new_empty(*q.shape[:2], 0))
    expected = native_sparse_attention(
        q,
        k,
        v,
        given if gates else static,
        one.k_compressor,
        one.v_compressor,
        config=config,
        cu_seqlens=bounds,
    )
    assert isinstance(expected, Tensor)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6)).double()
    ((expected * weight).sum() + 0 * static.sum() + 0 * given.sum()).backward()

    module = make_module(config, group, layout)
    split = {"cu_seqlens": bounds, "layout": layout, "group": group}
    local = [shard(x.detach(), **split).requires_grad_() for x in whole]
    own = [x.transpose(0, 1) if batch_dim_idx else x for x in local]
    out = module(
        *own[:3], batch_dim_idx, tables, gates=own[3] if gates else None, cu_seqlens=bounds
    )
    out = out.transpose(0, 1) if batch_dim_idx else out
    ((out * shard(weight, **split)).sum() + 0 * local[3].sum()).backward()

    pairs = {"output": (unshard(out.detach(), LENGTH, **split), expected.detach())}
    for name, x, y in zip(("q", "k", "v", "gates"), local, whole, strict=True):
        assert x.grad is not None and y.grad is not None
        pairs[f"gradient of {name}"] = (unshard(x.grad, LENGTH, **split), y.grad)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad)
        pairs[f"gradient of {name}"] = (parameter.grad, one.get_parameter(name).grad)
    return {
        name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for name, (a, b) in pairs.items()
    }


def beside_ulysses(rotated_here: bool) -> float:
    """On every rank: the largest difference from Ulysses around this attention on one rank."""
    prepare()
    from deepspeed.sequence.layer import DistributedAttention

    group = dist.group.WORLD
    size = dist.get_world_size()
    config = replace(SMALL, compress="mean")
    own_heads = replace(config, num_heads=4 // size, num_kv_heads=2 // size)
    module = make_module(config, group, "contiguous")
    gate = module.gate.logits.detach().sigmoid().chunk(size)[dist.get_rank()]

    def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gates = gate.expand(*q.shape[:2], -1, -1)
        compressors = make_module(own_heads, None, "contiguous")
        out = native_sparse_attention(
            q, k, v, gates, compressors.k_compressor, compressors.v_compressor, config=own_heads
        )
        assert isinstance(out, Tensor)
        return out

    q, k, v = (shard(x, layout="contiguous", group=group) for x in tensors(config, 2)[:3])
    tables = rotary_tables(LENGTH, config.head_dim) if rotated_here else None
    ulysses = DistributedAttention(local_attention, group, scatter_idx=2, gather_idx=1)
    expected = ulysses(q, k, v, 0, tables)
    error = module(q, k, v, 0, tables) - expected
    return float((error.abs().max() / expected.abs().max()).detach())


def with_fewer_kv_heads_than_ranks() -> tuple[str, tuple[int, ...]]:
    """On every rank: what Ulysses raises, and the shape that comes here."""
    prepare()
    from deepspeed.sequence.layer import DistributedAttention

    group = dist.group.WORLD
    q, k, v = (shard(x, layout="contiguous", group=group) for x in tensors(SMALL, 1)[:3])
    try:
        DistributedAttention(lambda q, k, v: q, group, scatter_idx=2, gather_idx=1)(q, k, v, 0)
        raised = ""
    except AssertionError as error:
        raised = str(error)
    return raised, tuple(make_module(SMALL, group, "contiguous")(q, k, v, 0).shape)


def refused_on_every_rank(bad_rank: int) -> str:
    """On every rank: the error when one rank's batch_dim_idx is bad."""
    group = dist.new_group()  # Its first plan: ranks agree on it.
    module = make_module(SMALL, group, "contiguous")
    q, k, v = (shard(x, layout="contiguous", group=group) for x in tensors(SMALL, 1)[:3])
    try:
        module(q, k, v, 2 if dist.get_rank() == bad_rank else 0)
    except ValueError as error:
        return str(error)
    return ""

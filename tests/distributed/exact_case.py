"""A call of the operator with ``exact_gradients``, over any number of ranks: its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_dist import BRANCHES, BlockCompressor, NSAConfig, make_sharding, native_sparse_attention

MOST_RANKS = 4
SMALL = NSAConfig(
    8,
    2,
    16,
    compress_block=8,
    compress_stride=4,
    select_block=8,
    num_selected=4,
    window=11,
)
PACKED = (24, 56, 8, 0, 72)


@dataclass(frozen=True)
class Case:
    """``lengths``: documents of a packed stream; None for ``batch`` rows of ``length`` tokens.

    shared: one k and v for all branches. checkpoint: activation checkpointing of the call. options:
    of ``native_sparse_attention``.
    """

    config: NSAConfig = SMALL
    layout: str = "zigzag"
    lengths: tuple[int, ...] | None = None
    batch: int = 1
    length: int = 160
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    backend: str = "pytorch"
    most_ranks: int = MOST_RANKS
    shared: bool = False
    checkpoint: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def drawn(case: Case) -> tuple[list[Tensor], Tensor, list[BlockCompressor]]:
    """Whole q, k and v by set, gates; the output's gradient; compressors. Equal on every rank.

    Magnitudes differ from token to token by many powers of two, so that sums in another order have
    other bits.
    """
    config = case.config
    generator = torch.Generator().manual_seed(11)
    length = case.length if case.lengths is None else sum(case.lengths)
    sets = 1 if case.shared else 3
    shapes = [(config.num_heads, config.head_dim)]
    shapes += [(config.num_kv_heads, config.head_dim)] * sets
    shapes += [(config.num_kv_heads, config.value_dim)] * sets
    rows = (case.batch, length)
    tensors = [torch.randn(*rows, *shape, generator=generator) for shape in shapes]
    tensors.append(torch.rand(*rows, config.num_heads, len(config.branches), generator=generator))
    grad = torch.randn(*rows, config.num_heads, config.value_dim, generator=generator)
    grad *= torch.randn(*rows, 1, 1, generator=generator).mul(4).exp2()
    torch.manual_seed(12)
    compressors = [BlockCompressor(config, width) for width in (config.head_dim, config.value_dim)]
    for compressor in compressors:
        for name, p in compressor.named_parameters():
            if name == "position":
                torch.nn.init.normal_(p, std=0.1)
        compressor.to(case.device, case.dtype)
    tensors = [x.to(case.device, case.dtype) for x in tensors]
    return tensors, grad.to(case.device, case.dtype), compressors


def gradients(case: Case, group: Any = None) -> dict[str, Tensor]:
    """The whole output and every gradient, by name, on the CPU."""
    config = case.config
    whole, whole_grad, compressors = drawn(case)
    bounds = None
    if case.lengths is not None:
        bounds = torch.tensor([0, *case.lengths]).cumsum(0).int()
    sharding = make_sharding(whole[0].shape[1], cu_seqlens=bounds, layout=case.layout, group=group)
    q, *kv, gates = leaves = [sharding.shard(x).requires_grad_() for x in whole]
    names = ["q", *(f"{x} {b}" for x in "kv" for b in BRANCHES[: len(kv) // 2]), "gates"]
    k, v = kv[: len(kv) // 2], kv[len(kv) // 2 :]
    in_use = config.key_branches
    given = (
        (k[0], v[0])
        if case.shared
        else (
            {b: x for b, x in zip(BRANCHES, k, strict=True) if b in in_use},
            {b: x for b, x in zip(BRANCHES, v, strict=True) if b in config.branches},
        )
    )
    k_compressor = compressors[0] if config.uses_compression else None
    v_compressor = compressors[1] if "compressed" in config.branches else None
    order: Any = nullcontext()
    if case.backend == "triton" and case.device == "cpu":
        from tests.ops.triton.guard import fixed_order_dot

        order = fixed_order_dot()

    def attend(q: Tensor) -> Any:
        return native_sparse_attention(
            q,
            *given,
            gates,
            k_compressor,
            v_compressor,
            config=config,
            cu_seqlens=sharding.cu_seqlens,
            layout=case.layout,
            group=group,
            backend=case.backend,
            **{"exact_gradients": case.most_ranks} | dict(case.options),
        )

    with order:
        out = checkpoint(attend, q, use_reentrant=False) if case.checkpoint else attend(q)
        assert isinstance(out, Tensor)
        out.backward(sharding.shard(whole_grad))
    found = {"out": sharding.unshard(out).cpu()}
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.grad is not None:
            found[name] = sharding.unshard(leaf.grad).cpu()
    for of, compressor in zip("kv", compressors, strict=True):
        for name, p in compressor.named_parameters():
            if p.grad is not None:
                total = p.grad.clone()
                if group is not None:
                    dist.all_reduce(total, group=group)
                found[f"{of}_compressor.{name}"] = total.cpu()
    return found


def gradients_on_rank(case: Case) -> dict[str, Tensor] | None:
    """``gradients`` over all ranks; the result on rank 0 alone, to spare the pipes."""
    found = gradients(case, dist.group.WORLD)
    return found if dist.get_rank() == 0 else None


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ."""
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]

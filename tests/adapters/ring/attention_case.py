"""One case of dense attention, on one process in float64 and on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import CommunicationCounter, make_sharding
from nsa_dist.adapters.ring import dense_attention
from tests.ops.accuracy import assert_2x, plain_dtype

Tensors = dict[str, Tensor]
FEW = 16


@dataclass(frozen=True)
class Case:
    """``lengths`` are documents of one packed stream, or None for ``batch`` rows of ``length``."""

    layout: str
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] | None = None
    batch: int = 1
    length: int = 75
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    scale: float | None = None
    device: str = "cpu"

    @property
    def bounds(self) -> list[int]:
        """Of documents in the rows, end to end."""
        sizes = (self.length,) * self.batch if self.lengths is None else self.lengths
        return [0, *accumulate(sizes)]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor(self.bounds, dtype=torch.int32)

    def inputs(self) -> Tensors:
        """q, k, v and the gradient of the output, [B, T, heads, width], in the case's dtype."""
        rows = (self.batch, self.length) if self.lengths is None else (1, sum(self.lengths))
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "q": (self.heads, self.head_dim),
            "k": (self.kv_heads, self.head_dim),
            "v": (self.kv_heads, self.value_dim),
            "grad": (self.heads, self.value_dim),
        }
        drawn = {
            name: torch.randn(*rows, *shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        return {name: x.to(self.device, self.dtype) for name, x in drawn.items()}


def masked_dense(case: Case, dtype: torch.dtype) -> Tensors:
    """out, dq, dk, dv as [tokens, heads, width], by a mask over all pairs of each document."""
    inputs = {name: x.to(dtype).flatten(0, 1) for name, x in case.inputs().items()}
    q, k, v = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    outputs = []
    for start, end in zip(case.bounds, case.bounds[1:], strict=False):
        own = slice(start, end)
        keys, values = (x[own].repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
        logits = torch.einsum("thd,shd->hts", q[own], keys) * scale
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", probs, values))
    out = torch.cat(outputs)
    grads = torch.autograd.grad(out, (q, k, v), inputs["grad"])
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def on_ranks(case: Case, group: Any = None) -> tuple[Tensors, dict[str, int]]:
    """As ``masked_dense`` by ``dense_attention``, unsharded, and the bytes received."""
    inputs = case.inputs()
    sharding = make_sharding(
        inputs["q"].shape[1], cu_seqlens=case.cu_seqlens, layout=case.layout, group=group
    )
    # Padding that is not zero: no token may see it.
    local = {name: sharding.shard(x, pad_value=7.0) for name, x in inputs.items()}
    q, k, v = (local[name].requires_grad_() for name in ("q", "k", "v"))
    counter = CommunicationCounter()
    out = dense_attention(
        *(q, k, v),
        cu_seqlens=sharding.cu_seqlens,
        layout=case.layout,
        group=group,
        scale=case.scale,
        communication=counter,
    )
    # Gradients of padding's outputs are no gradients of what it cannot be seen by.
    grad = sharding.shard(inputs["grad"])
    grads = torch.autograd.grad(out, (q, k, v), grad)
    found = {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    whole = {name: sharding.unshard(x).flatten(0, 1).cpu() for name, x in found.items()}
    return whole, dict(counter.received)


def on_world(case: Case) -> tuple[Tensors, dict[str, int]] | None:
    """``on_ranks`` over the default group; the result on rank 0 alone, to spare the pipes."""
    found = on_ranks(case, dist.group.WORLD)
    return found if dist.get_rank() == 0 else None


def assert_right(case: Case, found: Tensors) -> None:
    """By the 2x rule against float64, for each document and head.

    Gradients of a document of so few tokens that they cancel (all of it, for one token) are what
    rounding left on either side: with such documents those of all documents are judged together.
    """
    few = any(0 < length < FEW for length in case.lengths or ())
    exact = masked_dense(case, torch.float64)
    plain = masked_dense(case, plain_dtype(case.dtype))
    for name, x64 in exact.items():
        assert found[name].dtype == case.dtype
        assert_2x(
            found[name],
            plain[name].cpu(),
            x64.cpu(),
            case.dtype,
            name,
            cu_seqlens=None if few and name != "out" else case.bounds,
            heads=True,
        )

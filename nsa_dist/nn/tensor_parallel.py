"""Checks of weights under a tensor parallel plan (``parallelize_module``).

Plans whose projections return whole outputs work. A plan that leaves each rank some columns of a
projection would need a layer with fewer heads, because the heads of a group select blocks together;
Megatron's adapter builds such layers. Here they are refused with an error.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nsa_dist.checks import describe

ADVICE = (
    "under parallelize_module use ColwiseParallel(output_layouts=Replicate()) and "
    "RowwiseParallel(input_layouts=Replicate()); to shard weights use fully_shard, and to split "
    "heads over ranks nsa_dist.adapters.megatron"
)


def project(name: str, module: nn.Module, x: Tensor, *last: int) -> Tensor:
    """``module(x)``, which must be a plain tensor whose last dimensions are ``last``.

    Raises:
        ValueError: if a tensor parallel plan leaves it with another output.
    """
    if torch.compiler.is_compiling():
        out: Tensor = module(x)
    else:
        try:
            out = module(x)
        except RuntimeError as error:
            if not is_cut(module):
                raise
            given = f"DTensor weights for x of {describe(x)} ({error})"
            raise ValueError(f"{name} must take plain tensors, got {given}; {ADVICE}") from error
    if isinstance(out, DTensor) or out.shape[-len(last) :] != last:
        given = "a DTensor" if isinstance(out, DTensor) else describe(out)
        width = " x ".join(map(str, last))
        must = f"a plain tensor of width {width}"
        raise ValueError(f"{name} must return {must}, got {given}; {ADVICE}")
    return out


def is_cut(module: nn.Module) -> bool:
    """Whether any weight is currently a DTensor."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def cut_problem(layer: nn.Module, projections: Collection[str]) -> str | None:
    """The error for weights of ``layer`` that are DTensors where they meet plain tensors, or None.

    Args:
        projections: names of children that ``project`` runs and checks.
    """
    for name, child in layer.named_children():
        # FSDP2 gathers weights before they are used.
        if name not in projections and not isinstance(child, FSDPModule) and is_cut(child):
            return f"{name} must have plain weights, got DTensors; {ADVICE}"
    return None

"""Weights cut by a tensor parallel plan (``parallelize_module``), refused by name where they fail.

The heads of a layer share one choice of blocks a KV head and one message a branch, so a plan that
leaves a rank some columns of a projection needs a layer of fewer heads: Megatron's adapter builds
those. Plans whose projections give whole outputs compute the layer as it is.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nsa_dist.checks import describe

WORKS = (
    "under parallelize_module use ColwiseParallel(output_layouts=Replicate()) and "
    "RowwiseParallel(input_layouts=Replicate()); to shard weights use fully_shard, and to split "
    "heads over ranks nsa_dist.adapters.megatron"
)


def project(name: str, module: nn.Module, x: Tensor, *last: int) -> Tensor:
    """``module(x)``, a plain tensor with the last dimensions ``last``.

    Raises:
        ValueError: naming the module, for what a tensor parallel plan makes of it.
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
            raise ValueError(f"{name} must take plain tensors, got {given}; {WORKS}") from error
    if isinstance(out, DTensor) or out.shape[-len(last) :] != last:
        given = "a DTensor" if isinstance(out, DTensor) else describe(out)
        width = " x ".join(map(str, last))
        must = f"a plain tensor of width {width}"
        raise ValueError(f"{name} must return {must}, got {given}; {WORKS}")
    return out


def is_cut(module: nn.Module) -> bool:
    """Whether any weight is a DTensor now."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def cut_problem(layer: nn.Module, projections: Collection[str]) -> str | None:
    """What keeps the weights of ``layer`` from meeting plain tensors, or None.

    Args:
        projections: children that ``project`` runs, which tell more of themselves.
    """
    for name, child in layer.named_children():
        # Those of FSDP2 are whole when they are used.
        if name not in projections and not isinstance(child, FSDPModule) and is_cut(child):
            return f"{name} must have plain weights, got DTensors; {WORKS}"
    return None

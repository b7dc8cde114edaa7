"""How operators are registered with torch, so that compiled and eager code run the same ones.

A registered operator takes tensors and numbers only. Segments enter as their table on the host,
whose values no graph depends on: a new packing of documents runs the graph that there is. What a
launcher makes of them is cached with that table, see cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as nsa_kernels::<name>, which writes to no argument and returns none.

    schema: "name(arguments) -> results" in torch's schema language.
    """
    name, _, rest = schema.partition("(")
    return torch.library.custom_op(f"nsa_kernels::{name}", mutates_args=(), schema="(" + rest)


def empty_as(x: Tensor) -> Tensor:
    """A contiguous tensor of the shape, dtype and device of x: what gradients are written to."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)

"""A BLAS that adds every product to its sum in order: the least accurate that one may meet.

How a matrix product adds up is the library's choice. It changes with the instruction set, the
shapes and the number of threads, so that a test passes on one processor and fails on another. The
error of a chain of additions grows with its length, and no library has longer chains than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
_OTHERS = ("addmv", "addmv_", "dot", "linear", "mv", "vdot")


def _in_order(start: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """start + a @ b for a [..., m, K], b [..., K, n], one k after another."""
    shape = (*a.shape[:-1], b.shape[-1])
    total = a.new_zeros(shape) if start is None else start.expand(shape).clone()
    for k in range(a.shape[-1]):
        total.addcmul_(a[..., k : k + 1], b[..., k : k + 1, :])
    return total


class ProductsInOrder(TorchDispatchMode):
    """Inside it, products of float32 matrices are sums in order; `count` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        name = op.overloadpacket.__name__
        assert name not in _OTHERS, f"{name} has no sum in order"
        if name not in _PRODUCTS or args[0].dtype != torch.float32:
            return op(*args, **options)
        self.count += 1
        *start, a, b = args
        result = _in_order(
            start[0] * options.get("beta", 1) if start and options.get("beta", 1) else None,
            a * options.get("alpha", 1),
            b,
        )
        if name.endswith("_"):
            return args[0].copy_(result)
        return options["out"].copy_(result) if "out" in options else result

"""Triton's interpreter, as every process of the tests has it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any


def quicken() -> None:
    """Where kernels are interpreted, let NumPy combine by xor: the same bits.

    `tl.sort` does so a few dozen times, and the interpreter an element at a time, in Python.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    import numpy as np
    from triton.language import standard
    from triton.runtime.interpreter import ReduceOps

    apply = ReduceOps.apply_impl

    def apply_impl(self: ReduceOps, values: Any) -> Any:
        if self.combine_fn != standard._xor_combine:
            return apply(self, values)
        (x,) = values
        found = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, x.dtype)

    ReduceOps.apply_impl = apply_impl

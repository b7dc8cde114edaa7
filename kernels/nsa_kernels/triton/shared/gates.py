"""How the gate of a branch is folded into its backward.

With a gate g, `do` is the gradient of the gated sum of all branches (Eq. 5), and a branch computes
the gradients of its summand g o. With P' = g P:

    dV = P'^T do,  dS = P' (dP - delta),  dP = do v^T,  delta = sum over channels of do o = dg

So delta, which backward needs anyway, is the gradient of the gate, and no g do is ever written. The
gate multiplies and is never moved into the log-sum-exp: it may be 0 or below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Gate(NamedTuple):
    """A gate [N, H] of any strides: in a kernel its pointer, and its strides in elements."""

    p: Any
    stride_row: Any
    stride_head: Any


def gate_rows(gate_NH: Tensor | None) -> Gate | None:
    """The gate as a kernel takes it; None, a constant there, without one."""
    return None if gate_NH is None else Gate(gate_NH, *gate_NH.stride())


@triton.jit
def load_gate(gate, row, head, mask):
    """The gate of each pair of row and head, in float32; 0 where masked."""
    p_gate = gate.p + row * gate.stride_row + head * gate.stride_head
    return tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)

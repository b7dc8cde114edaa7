"""What every backward that is written by hand has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SECOND_ORDER = (
    "create_graph must be False in a backward through Native Sparse Attention, which has first "
    "derivatives only, got True"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward of a `torch.autograd.Function` refuse second derivatives, by name.

    torch's `once_differentiable` looks only at the gradients that come in: it would silently leave
    out what a second derivative owes to the saved inputs.

    Raises:
        ValueError: in a backward with grad mode on, which is what create_graph=True means.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(SECOND_ORDER)
        return backward(ctx, *grads)

    return run


def summand_of(o: Tensor, gate: Tensor | None) -> Tensor:
    """The summand g o of Eq. 5 as a node of the graph: the shape and dtype of o, without values.

    A branch that is given its gate returns one beside o, which then carries no gradient. The
    gradient of the summand is that of the gated sum, the same for every branch, so `combine` hands
    it to all of them as it is. What it holds is one element that is never written. Without a gate
    it is empty.
    """
    return o.new_empty(0) if gate is None else o.new_empty(()).expand(o.shape)

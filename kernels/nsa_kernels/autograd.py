"""What every backward that is written by hand has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

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

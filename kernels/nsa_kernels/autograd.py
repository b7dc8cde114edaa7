"""What every backward that is written by hand has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

SECOND_ORDER = (
    "create_graph: found True in a backward through Native Sparse Attention, which has first "
    "derivatives only; False works"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of a `torch.autograd.Function` that has no second derivative, and says so.

    torch's `once_differentiable` looks at the gradients that come in alone. What a second
    derivative owes to the saved inputs it leaves out, without a word.

    Raises:
        ValueError: in a backward with grad mode on, which is what create_graph=True means.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(SECOND_ORDER)
        return backward(ctx, *grads)

    return run

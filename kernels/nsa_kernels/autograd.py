"""What every backward that is written by hand has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def with_summand(ctx: Any, o: Tensor, lse: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    """What the forward of a branch's `torch.autograd.Function` returns, and which of it has grads.

    o and lse, and with a gate the summand. The gradient of backward is that of the first without a
    gate, that of the last with one.
    """
    ctx.set_materialize_grads(False)
    if gate is None:
        ctx.mark_non_differentiable(lse)
        return o, lse
    ctx.mark_non_differentiable(o, lse)
    return o, lse, summand_of(o, gate)


def summand_of(o: Tensor, gate: Tensor | None) -> Tensor:
    """The summand g o of Eq. 5 as a node of the graph: the shape and dtype of o, without values.

    A branch that is given its gate returns one beside o, which then carries no gradient. The
    gradient of the summand is that of the gated sum, the same for every branch, so `combine` hands
    it to all of them as it is. All that it holds is a zero. Without a gate it is empty.
    """
    return o.new_empty(0) if gate is None else o.new_zeros(()).expand(o.shape)


def heads_of_summands(
    outputs: Sequence[Tensor], summands: Sequence[Sequence[Tensor]]
) -> tuple[tuple[int, ...], ...]:
    """How many heads each summand of each branch has; none for a branch without any."""
    if not summands:
        return ((),) * len(outputs)
    heads = tuple(tuple(x.shape[1] for x in of) for of in summands)
    for o, of in zip(outputs, heads, strict=True):
        assert not of or sum(of) == o.shape[1], (o.shape, of)
    return heads


def grads_of_summands(do_NHD: Tensor, heads: Sequence[Sequence[int]]) -> list[Tensor]:
    """The gradient of the gated sum for each summand, one after another; copies nothing."""
    grads: list[Tensor] = []
    for of in heads:
        grads += (do_NHD,) if len(of) == 1 else do_NHD.split(of, dim=1) if of else ()
    return grads


class BranchPasses(NamedTuple):
    """Forward and backward of a branch's function, without the graph that connects them.

    Who has the results of all queries may run backward for some of them alone. The arguments are
    those of the function, whose gate only backward takes.

    forward: (q, ..., segments, **options) -> o [N, H, Dv], lse [N, H], and what else backward reads
    of each query, [N, H] as well. backward: (dq, do, gate, results, q, ..., segments, **options) ->
    of keys and values, and float32 [N, H] the gate's. dq [N, H, Dk], contiguous, is written.
    results: rows of forward's for the queries of q. Keys that no query of q sees may be left out.
    do: of o, or with a gate of the gated sum.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]

"""The selected branch as an operator of torch: attention to the tokens of the chosen blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsa_kernels.autograd import BranchPasses, summand_of
from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selected.backward import selected_backward
from nsa_kernels.triton.selected.blocks import with_int32_blocks
from nsa_kernels.triton.selected.forward import empty_outputs, selected_forward
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.cache import segments_of
from nsa_kernels.triton.shared.custom_ops import empty_as, register

_SOURCES = "Tensor q, Tensor k_own, Tensor v_own, Tensor k_fetched, Tensor v_fetched"
_CHOICE = "Tensor selected, Tensor block_rows, Tensor block_lengths, Tensor segments"


@register(
    f"selected_attention({_SOURCES}, {_CHOICE}, int select_block, float scale, Tensor? gate)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attend_blocks(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: Tensor,
    select_block: int,
    scale: float,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, lse, lse in the kernels' base, and the summand g o; without a gate that one is empty."""
    selected, block_rows, block_lengths = (
        last_dim_contiguous(x) for x in (selected, block_rows, block_lengths)
    )
    at = segments_of(segments, q.device)
    o, lse, log_sum = selected_forward(
        q,
        k_own,
        v_own,
        k_fetched,
        v_fetched,
        selected,
        block_rows,
        block_lengths,
        at,
        select_block,
        scale,
    )
    return o, lse, log_sum, summand_of(o, gate)


@_attend_blocks.register_fake
def _(q: Tensor, k_own: Tensor, v_own: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    o, lse, log_sum = empty_outputs(q, v_own)
    return o, lse, log_sum, summand_of(o, arguments[-1])


@register(
    f"selected_attention_backward({_SOURCES}, Tensor o, Tensor log_sum, Tensor do, {_CHOICE}, "
    "int select_block, float scale, Tensor? gate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _attend_blocks_backward(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    o: Tensor,
    log_sum: Tensor,
    do: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: Tensor,
    select_block: int,
    scale: float,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    """Of q and the sources, and delta, the gate's; do: of o, or of the gated sum with a gate."""
    sources, choice = (k_own, v_own, k_fetched, v_fetched), (selected, block_rows, block_lengths)
    return _gradients(q, *sources, o, log_sum, do, *choice, segments, select_block, scale, gate)


def _gradients(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    o: Tensor,
    log_sum: Tensor,
    do: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: Tensor,
    select_block: int,
    scale: float,
    gate: Tensor | None,
    into: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same; into: contiguous memory for the gradient of q."""
    k_own, v_own, k_fetched, v_fetched = (
        with_int32_blocks(x, select_block) for x in (k_own, v_own, k_fetched, v_fetched)
    )
    q, do, selected, block_rows, block_lengths = (
        last_dim_contiguous(x) for x in (q, do, selected, block_rows, block_lengths)
    )
    at = segments_of(segments, q.device)
    return selected_backward(
        q,
        k_own,
        v_own,
        k_fetched,
        v_fetched,
        o,
        log_sum,
        selected,
        block_rows,
        block_lengths,
        do,
        at,
        select_block,
        scale,
        gate,
        into,
    )


@_attend_blocks_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, _, log_sum = arguments[:7]
    return tuple(map(empty_as, (*inputs, log_sum)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.select_block, ctx.scale, gate = inputs
    o, lse, log_sum, summand = output
    ctx.save_for_backward(*tensors[:5], o, log_sum, *tensors[5:], gate)
    ctx.mark_non_differentiable(lse, log_sum, summand if gate is None else o)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, gate = ctx.saved_tensors
    do = grads_out[0] if gate is None else grads_out[-1]
    *grads, delta = _attend_blocks_backward(
        *saved[:7], do, *saved[7:], ctx.select_block, ctx.scale, gate
    )
    return *grads, *[None] * 6, None if gate is None else delta.to(gate.dtype)


_attend_blocks.register_autograd(_backward, setup_context=_save)


def selected_attention(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: QuerySegments,
    *,
    select_block: int,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `Backend.selected_attention`; with a gate [N, H] also the summand, see `summand_of`."""
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    assert scale > 0, scale
    sources = (k_own, v_own, k_fetched, v_fetched)
    choice = (selected, block_rows, block_lengths, segments.host)
    o, lse, _, summand = _attend_blocks(q, *sources, *choice, select_block, scale, gate)
    return (o, lse) if gate is None else (o, lse, summand)


def _forward_alone(
    q: Tensor, *arguments: Any, select_block: int, scale: float
) -> tuple[Tensor, ...]:
    """o, lse, and lse in the kernels' base; arguments: those of `selected_attention`."""
    *tensors, segments = arguments
    results: tuple[Tensor, ...] = _attend_blocks(
        q, *tensors, segments.host, select_block, scale, None
    )
    return results[:3]


def _backward_alone(
    dq: Tensor,
    do: Tensor,
    gate: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    *arguments: Any,
    select_block: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Of the sources, and delta, the gate's; dq is written."""
    *tensors, segments = arguments
    o, _, log_sum = results
    sources, choice = tensors[:5], (*tensors[5:], segments.host)
    given: tuple[Any, ...] = (*sources, o, log_sum, do, *choice, select_block, scale, gate, dq)
    _, *others = _gradients(*given)
    return tuple(others)


selected_passes = BranchPasses(_forward_alone, _backward_alone)

"""The selected branch as an operator of torch: attention to the tokens of the chosen blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
    f"selected_attention({_SOURCES}, {_CHOICE}, int select_block, float scale)"
    " -> (Tensor, Tensor, Tensor)"
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
) -> tuple[Tensor, Tensor, Tensor]:
    selected, block_rows, block_lengths = (
        last_dim_contiguous(x) for x in (selected, block_rows, block_lengths)
    )
    at = segments_of(segments, q.device)
    return selected_forward(
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


@_attend_blocks.register_fake
def _(q: Tensor, k_own: Tensor, v_own: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(q, v_own)


@register(
    f"selected_attention_backward({_SOURCES}, Tensor o, Tensor log_sum, Tensor grad_o, {_CHOICE}, "
    "int select_block, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _attend_blocks_backward(
    q: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    k_fetched: Tensor,
    v_fetched: Tensor,
    o: Tensor,
    log_sum: Tensor,
    grad_o: Tensor,
    selected: Tensor,
    block_rows: Tensor,
    block_lengths: Tensor,
    segments: Tensor,
    select_block: int,
    scale: float,
) -> tuple[Tensor, ...]:
    k_own, v_own, k_fetched, v_fetched = (
        with_int32_blocks(x, select_block) for x in (k_own, v_own, k_fetched, v_fetched)
    )
    q, grad_o, selected, block_rows, block_lengths = (
        last_dim_contiguous(x) for x in (q, grad_o, selected, block_rows, block_lengths)
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
        grad_o,
        at,
        select_block,
        scale,
    )


@_attend_blocks_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(map(empty_as, arguments[:5]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.select_block, ctx.scale = inputs
    o, lse, log_sum = output
    ctx.save_for_backward(*tensors[:5], o, log_sum, *tensors[5:])
    ctx.mark_non_differentiable(lse, log_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = _attend_blocks_backward(*saved[:7], grad_o, *saved[7:], ctx.select_block, ctx.scale)
    return *grads, *[None] * 6


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
) -> tuple[Tensor, Tensor]:
    """See `Backend.selected_attention`."""
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    assert scale > 0, scale
    sources = (k_own, v_own, k_fetched, v_fetched)
    choice = (selected, block_rows, block_lengths, segments.host)
    o, lse, _ = _attend_blocks(q, *sources, *choice, select_block, scale)
    return o, lse

"""The compressed branch (Eq. 7, arXiv 2502.11089) and the window branch (section 3.3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nsa_kernels.autograd import BranchPasses, summand_of
from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.backward import banded_backward
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.banded.forward import banded_forward, empty_outputs
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.cache import segments_of
from nsa_kernels.triton.shared.custom_ops import empty_as, register
from nsa_kernels.triton.shared.shapes import runs_hopper_backward

_BAND = "Tensor segments, int offset, int stride, int window, str column, float scale"


@register(
    f"banded_attention(Tensor q, Tensor k, Tensor v, Tensor? gate, {_BAND})"
    " -> (Tensor, Tensor, Tensor)"
)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, segments: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the summand g o; without a gate that one is empty."""
    *band, scale = arguments
    o, lse = banded_forward(q, k, v, segments_of(segments, q.device), Band(*band), scale)
    return o, lse, summand_of(o, gate)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    o, lse = empty_outputs(q, v)
    return o, lse, summand_of(o, gate)


@register(
    "banded_attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? gate, "
    f"Tensor do, {_BAND}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    gate: Tensor | None,
    do: Tensor,
    segments: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and delta, the gate's gradient; do: of o, or of the gated sum with a gate."""
    return _gradients(q, k, v, o, lse, gate, do, segments, *arguments)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    gate: Tensor | None,
    do: Tensor,
    segments: Tensor,
    *arguments: Any,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same; into: contiguous memory for dq."""
    *band, scale = arguments
    q, k, v, do = (last_dim_contiguous(x) for x in (q, k, v, do))
    at = segments_of(segments, q.device)
    if runs_hopper_backward(q, v):
        # Imported where it runs: Gluon is not in every version of Triton.
        from nsa_kernels.triton.banded.hopper_backward import hopper_backward

        return hopper_backward(q, k, v, o, lse, do, at, Band(*band), scale, gate, into)
    return banded_backward(q, k, v, o, lse, do, at, Band(*band), scale, gate, into)


@_attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, _: Tensor, lse: Tensor, *__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_as(q), empty_as(k), empty_as(v), empty_as(lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, gate, segments, *ctx.arguments = inputs
    o, lse, summand = output
    ctx.save_for_backward(q, k, v, o, lse, gate, segments)
    ctx.mark_non_differentiable(lse, summand if gate is None else o)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_o: Tensor | None, _: None, grad_summand: Tensor | None
) -> tuple[Tensor | None, ...]:
    *saved, gate, segments = ctx.saved_tensors
    do = grad_o if gate is None else grad_summand
    dq, dk, dv, delta = _attend_backward(*saved, gate, do, segments, *ctx.arguments)
    dgate = None if gate is None else delta.to(gate.dtype)
    return dq, dk, dv, dgate, *[None] * (1 + len(ctx.arguments))


_attend.register_autograd(_backward, setup_context=_save)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    band: Band,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """o = softmax(scale q k^T) v over the band, with its log-sum-exp; with a gate the summand too.

    Backward computes the probabilities P again from the log-sum-exp: dP = do v^T,
    dS = P (dP - sum of o do), dq = scale dS k, dk = scale dS^T q, dv = P^T do. Each sum has one
    owner, and long lists are shared out and added in order: no atomics.
    """
    o, lse, summand = _attend(q, k, v, gate, segments.host, *band, scale)
    return (o, lse) if gate is None else (o, lse, summand)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `Backend.compressed_attention`."""
    return banded_attention(q, k, v, segments, _compressed(block, stride), scale, gate)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    *,
    window: int,
    scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `Backend.window_attention`."""
    return banded_attention(q, k, v, segments, _window(window), scale, gate)


def _compressed(block: int, stride: int) -> Band:
    return Band(offset=block - 1, stride=stride, window=0, column="compressed_base")


def _window(window: int) -> Band:
    return Band(offset=0, stride=1, window=window, column="window_base")


def _passes(band_of: Callable[..., Band]) -> BranchPasses:
    """Of the branch whose options but the scale `band_of` takes."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments, *, scale: float, **band: int
    ) -> tuple[Tensor, ...]:
        return _attend(q, k, v, None, segments.host, *band_of(**band), scale)[:2]

    def backward(
        dq: Tensor,
        do: Tensor,
        gate: Tensor | None,
        results: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: QuerySegments,
        *,
        scale: float,
        **band: int,
    ) -> tuple[Tensor, ...]:
        (o, lse), at = results, band_of(**band)
        return _gradients(q, k, v, o, lse, gate, do, segments.host, *at, scale, into=dq)[1:]

    return BranchPasses(forward, backward)


compressed_passes, window_passes = _passes(_compressed), _passes(_window)

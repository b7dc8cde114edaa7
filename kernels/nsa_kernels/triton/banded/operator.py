"""The compressed branch (Eq. 7, arXiv 2502.11089) and the window branch (section 3.3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.backward import banded_backward
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.banded.forward import banded_forward, empty_outputs
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.cache import segments_of
from nsa_kernels.triton.shared.custom_ops import empty_as, register
from nsa_kernels.triton.shared.shapes import runs_hopper_backward

_BAND = "Tensor segments, int offset, int stride, int window, str column, float scale"


@register(f"banded_attention(Tensor q, Tensor k, Tensor v, {_BAND}) -> (Tensor, Tensor)")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *band, scale = arguments
    return banded_forward(q, k, v, segments_of(segments, q.device), Band(*band), scale)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


@register(
    "banded_attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor grad_o, "
    f"{_BAND}) -> (Tensor, Tensor, Tensor)"
)
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    segments: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *band, scale = arguments
    q, k, v, grad_o = (last_dim_contiguous(x) for x in (q, k, v, grad_o))
    at = segments_of(segments, q.device)
    if runs_hopper_backward(q, v):
        # Imported where it runs: Gluon is not in every version of Triton.
        from nsa_kernels.triton.banded.hopper_backward import hopper_backward

        return hopper_backward(q, k, v, o, lse, grad_o, at, Band(*band), scale)[:3]
    return banded_backward(q, k, v, o, lse, grad_o, at, Band(*band), scale)


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_as(q), empty_as(k), empty_as(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output, segments)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *saved, segments = ctx.saved_tensors
    grads = _attend_backward(*saved, grad_o, segments, *ctx.arguments)
    return *grads, *[None] * (1 + len(ctx.arguments))


_attend.register_autograd(_backward, setup_context=_save)


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments, band: Band, scale: float
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q k^T) v over the band, with its log-sum-exp.

    Backward computes the probabilities P again from the log-sum-exp: dP = do v^T,
    dS = P (dP - sum of o do), dq = scale dS k, dk = scale dS^T q, dv = P^T do. Each sum has one
    owner, and long lists are shared out and added in order: no atomics.
    """
    return _attend(q, k, v, segments.host, *band, scale)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `Backend.compressed_attention`."""
    band = Band(offset=block - 1, stride=stride, window=0, column="compressed_base")
    return banded_attention(q, k, v, segments, band, scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments, *, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `Backend.window_attention`."""
    band = Band(offset=0, stride=1, window=window, column="window_base")
    return banded_attention(q, k, v, segments, band, scale)

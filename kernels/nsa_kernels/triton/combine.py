"""The gated sum of the branches (Eq. 5, arXiv 2502.11089), in one pass over memory each way.

A program takes BM of the N*H rows of width D, with their gates. The products are added by fused
multiply-adds in the order of the branches, so that a row's bits depend on that row alone.

Letters: N local rows, H query heads, D width, NB branches (1 to 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.custom_ops import empty_as, register
from nsa_kernels.triton.shared.shapes import padded, rows_of_tile


@triton.jit
def _tile(num_rows, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, PD: tl.constexpr):
    """Rows n [BM], heads [BM], channels [PD], and which rows and elements there are."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, PD)
    m_row = o_row < num_rows
    return o_row, o_row // H, o_row % H, o_d, m_row, m_row[:, None] & (o_d < D)[None, :]


@triton.jit
def _gate(gates, n, h, m_row, stride_n, stride_h, stride_b, BRANCH: tl.constexpr):
    return tl.load(
        gates + n * stride_n + h * stride_h + BRANCH * stride_b, mask=m_row, other=0.0
    ).to(tl.float32)


@triton.jit
def _rows(x, n, h, o_d, mask, stride_n, stride_h):
    p_x = x + (n * stride_n + h * stride_h)[:, None] + o_d[None, :]
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    a,
    b,
    c,
    gates,
    out,
    num_rows,
    stride_an,
    stride_ah,
    stride_bn,
    stride_bh,
    stride_cn,
    stride_ch,
    stride_gn,
    stride_gh,
    stride_gb,
    NB: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    PD: tl.constexpr,
):
    o_row, n, h, o_d, m_row, mask = _tile(num_rows, H, D, BM, PD)
    b_g = _gate(gates, n, h, m_row, stride_gn, stride_gh, stride_gb, 0)  # [BM]
    b_out = _rows(a, n, h, o_d, mask, stride_an, stride_ah) * b_g[:, None]  # [BM, PD]
    if NB > 1:
        b_g = _gate(gates, n, h, m_row, stride_gn, stride_gh, stride_gb, 1)
        b_x = _rows(b, n, h, o_d, mask, stride_bn, stride_bh)
        b_out = tl.fma(b_x, tl.broadcast_to(b_g[:, None], [BM, PD]), b_out)
    if NB > 2:
        b_g = _gate(gates, n, h, m_row, stride_gn, stride_gh, stride_gb, 2)
        b_x = _rows(c, n, h, o_d, mask, stride_cn, stride_ch)
        b_out = tl.fma(b_x, tl.broadcast_to(b_g[:, None], [BM, PD]), b_out)
    p_out = out + o_row[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_branch(
    b_do, x, dx, gates, dgates, o_row, n, h, o_d, m_row, mask, stride_n, stride_h, stride_gn,
    stride_gh, stride_gb, BRANCH: tl.constexpr, NB: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """do_b = g_b do and dg_b = sum over channels of do o_b."""
    b_g = _gate(gates, n, h, m_row, stride_gn, stride_gh, stride_gb, BRANCH)
    b_x = _rows(x, n, h, o_d, mask, stride_n, stride_h)
    p_dx = dx + o_row[:, None] * D + o_d[None, :]
    tl.store(p_dx, (b_do * b_g[:, None]).to(dx.dtype.element_ty), mask=mask)
    b_dg = tl.sum(b_do * b_x, 1).to(dgates.dtype.element_ty)
    tl.store(dgates + o_row * NB + BRANCH, b_dg, mask=m_row)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    do,
    a,
    b,
    c,
    gates,
    da,
    db,
    dc,
    dgates,
    num_rows,
    stride_don,
    stride_doh,
    stride_an,
    stride_ah,
    stride_bn,
    stride_bh,
    stride_cn,
    stride_ch,
    stride_gn,
    stride_gh,
    stride_gb,
    NB: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    PD: tl.constexpr,
):
    o_row, n, h, o_d, m_row, mask = _tile(num_rows, H, D, BM, PD)
    b_do = _rows(do, n, h, o_d, mask, stride_don, stride_doh)  # [BM, PD]
    _backward_branch(
        b_do, a, da, gates, dgates, o_row, n, h, o_d, m_row, mask, stride_an, stride_ah,
        stride_gn, stride_gh, stride_gb, 0, NB, D,
    )  # fmt: skip
    if NB > 1:
        _backward_branch(
            b_do, b, db, gates, dgates, o_row, n, h, o_d, m_row, mask, stride_bn, stride_bh,
            stride_gn, stride_gh, stride_gb, 1, NB, D,
        )  # fmt: skip
    if NB > 2:
        _backward_branch(
            b_do, c, dc, gates, dgates, o_row, n, h, o_d, m_row, mask, stride_cn, stride_ch,
            stride_gn, stride_gh, stride_gb, 2, NB, D,
        )  # fmt: skip


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Kernels take three; where there are fewer branches the first stands in and is not read."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _shape(x: Tensor) -> dict[str, int]:
    width = padded(x.shape[-1])
    rows = rows_of_tile(x.shape[-1])
    return {"H": x.shape[1], "D": x.shape[-1], "BM": rows, "PD": width}


@register("combine(Tensor[] outputs, Tensor gates) -> Tensor")
def _combine(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    out = empty_as(outputs[0])
    if out.numel():
        shape, num_rows = _shape(out), out.shape[0] * out.shape[1]
        inputs = _three([last_dim_contiguous(x) for x in outputs])
        _forward_kernel[(triton.cdiv(num_rows, shape["BM"]),)](
            *inputs, gates, out, num_rows, *(s for x in inputs for s in x.stride()[:2]),
            *gates.stride(), NB=len(outputs), **shape, num_warps=4,
        )  # fmt: skip
    return out


@_combine.register_fake
def _(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    return empty_as(outputs[0])


@register("combine_backward(Tensor do, Tensor[] outputs, Tensor gates) -> Tensor[]")
def _combine_backward(do: Tensor, outputs: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    """do_b = g_b do of each branch, and dg_b = sum over channels of do o_b, in their dtypes."""
    dgates = torch.zeros(gates.shape, dtype=gates.dtype, device=gates.device)
    grads = [empty_as(x) for x in outputs]
    if do.numel():
        shape, num_rows = _shape(do), do.shape[0] * do.shape[1]
        do = last_dim_contiguous(do)
        inputs = _three([last_dim_contiguous(x) for x in outputs])
        _backward_kernel[(triton.cdiv(num_rows, shape["BM"]),)](
            do, *inputs, gates, *_three(grads), dgates, num_rows, *do.stride()[:2],
            *(s for x in inputs for s in x.stride()[:2]), *gates.stride(),
            NB=len(outputs), **shape, num_warps=4,
        )  # fmt: skip
    return [*grads, dgates]


@_combine_backward.register_fake
def _(do: Tensor, outputs: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    return [empty_as(x) for x in (*outputs, gates)]


def _save(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    outputs, gates = inputs
    ctx.save_for_backward(*outputs, gates)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], Tensor]:
    *outputs, gates = ctx.saved_tensors
    *grads, dgates = _combine_backward(grad, outputs, gates)
    return grads, dgates


_combine.register_autograd(_backward, setup_context=_save)


def combine(outputs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """See `Backend.combine`."""
    assert gates.shape == (*outputs[0].shape[:2], len(outputs)), (gates.shape, len(outputs))
    return _combine(list(outputs), gates)

"""The gated sum of the branches (Eq. 5, arXiv 2502.11089), in one pass over memory each way.

A program takes BM of the N*H rows of width D, with their gates. The products are added by fused
multiply-adds in the order of the branches, so that a row's bits depend on that row alone. Branches
that took their gate themselves need no backward here: see shared/gates.py. What they give to q is
added by `add_gradients`, whose kernel also puts the gradients of their gates side by side.

Letters: N local rows, H query heads, D width, b branches (NB of them, 1 to 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.autograd import grads_of_summands, heads_of_summands
from nsa_kernels.triton.shared.arguments import (
    HeadRows,
    head_rows,
    last_dim_contiguous,
    load_head_rows,
)
from nsa_kernels.triton.shared.custom_ops import empty_as, register
from nsa_kernels.triton.shared.gates import gate_rows, load_gate
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import cdiv, padded, rows_of_tile


class Gates(NamedTuple):
    """Gates [N, H, b]: their pointer and strides."""

    p: Any
    stride_row: Any
    stride_head: Any
    stride_branch: Any


class Constants(NamedTuple):
    """What a kernel is compiled for: BM of the N*H rows of a program, D channels padded to PD."""

    NB: int
    H: int
    BM: int
    D: int
    PD: int


@triton.jit
def _rows_of_program(num_rows, C: tl.constexpr):
    """Rows of N*H, tokens and heads, all [BM], and which of them there are."""
    o_row = tl.program_id(0).to(tl.int64) * C.BM + tl.arange(0, C.BM)
    return o_row, o_row // C.H, o_row % C.H, o_row < num_rows


@triton.jit
def _load_gate(gates, n, h, m_row, BRANCH: tl.constexpr):
    """The gate of a branch for each row, [BM]."""
    o_gate = n * gates.stride_row + h * gates.stride_head + BRANCH * gates.stride_branch
    return tl.load(gates.p + o_gate, mask=m_row, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(branches, gates, out, num_rows, C: tl.constexpr):
    o_row, n, h, m_row = _rows_of_program(num_rows, C)
    b_g = _load_gate(gates, n, h, m_row, 0)  # [BM]
    b_x = load_head_rows(branches[0], n, h, m_row, C.D, C.PD).to(tl.float32)  # [BM, PD]
    b_out = b_x * b_g[:, None]
    NB: tl.constexpr = C.NB
    for branch in tl.static_range(1, NB):
        b_g = _load_gate(gates, n, h, m_row, branch)  # [BM]
        b_x = load_head_rows(branches[branch], n, h, m_row, C.D, C.PD).to(tl.float32)  # [BM, PD]
        b_out = tl.fma(b_x, tl.broadcast_to(b_g[:, None], b_x.shape), b_out)
    o_d = tl.arange(0, C.PD)
    p_out = out + o_row[:, None] * C.D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row[:, None] & (o_d < C.D)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(do, branches, gates, grads, dgates, num_rows, C: tl.constexpr):
    """do_b = g_b do and dg_b = sum over channels of do o_b, for each branch b."""
    o_row, n, h, m_row = _rows_of_program(num_rows, C)
    b_do = load_head_rows(do, n, h, m_row, C.D, C.PD).to(tl.float32)  # [BM, PD]
    o_d = tl.arange(0, C.PD)
    mask = m_row[:, None] & (o_d < C.D)[None, :]
    NB: tl.constexpr = C.NB
    for branch in tl.static_range(NB):
        b_g = _load_gate(gates, n, h, m_row, branch)  # [BM]
        b_x = load_head_rows(branches[branch], n, h, m_row, C.D, C.PD).to(tl.float32)  # [BM, PD]
        dx = grads[branch]
        b_dx = (b_do * b_g[:, None]).to(dx.dtype.element_ty)
        tl.store(dx + o_row[:, None] * C.D + o_d[None, :], b_dx, mask=mask)
        b_dg = tl.sum(b_do * b_x, 1).to(dgates.dtype.element_ty)  # [BM]
        tl.store(dgates + o_row * NB + branch, b_dg, mask=m_row)


@triton.jit(do_not_specialize=["num_rows"])
def _add_gradients_kernel(
    grads, of_gates, out, out_gates, num_rows, NG: tl.constexpr, C: tl.constexpr
):
    """The sum of the NB grads [N, H, D], and the NG numbers [N, H] of gates side by side."""
    o_row, n, h, m_row = _rows_of_program(num_rows, C)
    b_sum = load_head_rows(grads[0], n, h, m_row, C.D, C.PD).to(tl.float32)  # [BM, PD]
    NB: tl.constexpr = C.NB
    for i in tl.static_range(1, NB):
        b_sum += load_head_rows(grads[i], n, h, m_row, C.D, C.PD).to(tl.float32)  # [BM, PD]
    o_d = tl.arange(0, C.PD)
    p_out = out + o_row[:, None] * C.D + o_d[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_row[:, None] & (o_d < C.D)[None, :])
    for i in tl.static_range(NG):
        b_g = load_gate(of_gates[i], n, h, m_row)  # [BM]
        tl.store(out_gates + o_row * NG + i, b_g.to(out_gates.dtype.element_ty), mask=m_row)


def _constants(x_NHD: Tensor, branches: int) -> Constants:
    width = x_NHD.shape[-1]
    return Constants(branches, x_NHD.shape[1], rows_of_tile(width), width, padded(width))


def _branches(outputs: Sequence[Tensor]) -> tuple[HeadRows, ...]:
    return tuple(head_rows(last_dim_contiguous(x)) for x in outputs)


@register("combine(Tensor[] outputs, Tensor gates, Tensor[] summands, int[] counts) -> Tensor")
def _combine(
    outputs: Sequence[Tensor], gates: Tensor, summands: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """counts: how many of the summands each branch has."""
    out_NHD = empty_as(outputs[0])
    if out_NHD.numel():
        C, num_rows = _constants(out_NHD, len(outputs)), out_NHD.shape[0] * out_NHD.shape[1]
        launcher(_forward_kernel, (cdiv(num_rows, C.BM),))(
            _branches(outputs), Gates(gates, *gates.stride()), out_NHD, num_rows, C=C, num_warps=4
        )
    return out_NHD


@_combine.register_fake
def _(outputs: Sequence[Tensor], *_: Any) -> Tensor:
    return empty_as(outputs[0])


@register("combine_backward(Tensor do, Tensor[] outputs, Tensor gates) -> Tensor[]")
def _combine_backward(do: Tensor, outputs: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    """do_b = g_b do of each branch, and dg_b = sum over channels of do o_b, in their dtypes."""
    dgates_NHb = torch.zeros(gates.shape, dtype=gates.dtype, device=gates.device)
    grads = [empty_as(x) for x in outputs]
    if do.numel():
        C, num_rows = _constants(do, len(outputs)), do.shape[0] * do.shape[1]
        launcher(_backward_kernel, (cdiv(num_rows, C.BM),))(
            head_rows(last_dim_contiguous(do)), _branches(outputs), Gates(gates, *gates.stride()),
            tuple(grads), dgates_NHb, num_rows, C=C, num_warps=4,
        )  # fmt: skip
    return [*grads, dgates_NHb]


@_combine_backward.register_fake
def _(do: Tensor, outputs: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    return [empty_as(x) for x in (*outputs, gates)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    outputs, gates, summands, counts = inputs
    of = iter(summands)
    ctx.heads = [[next(of).shape[1] for _ in range(count)] for count in counts]
    plain = [x for x, count in zip(outputs, counts, strict=True) if not count]
    ctx.save_for_backward(*([*plain, gates] if plain else []))


def _backward(ctx: Any, do_NHD: Tensor) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.heads)
    dgates_NHb = None
    saved = ctx.saved_tensors  # Once: recomputation refuses a second read.
    if saved:
        *outputs, gates_NHb = saved
        plain = [b for b, of in enumerate(ctx.heads) if not of]
        if len(plain) == len(grads):
            *grads, dgates_NHb = _combine_backward(do_NHD, outputs, gates_NHb)
        else:
            some = torch.stack([gates_NHb[..., b] for b in plain], dim=-1)
            *of_plain, of_some = _combine_backward(do_NHD, outputs, some)
            of_gates = [torch.zeros_like(some[..., 0])] * len(grads)
            for b, grad, of_gate in zip(plain, of_plain, of_some.unbind(-1), strict=True):
                grads[b], of_gates[b] = grad, of_gate
            dgates_NHb = torch.stack(of_gates, dim=-1)
    return grads, dgates_NHb, grads_of_summands(do_NHD, ctx.heads), None


_combine.register_autograd(_backward, setup_context=_save)


def combine(
    outputs: Sequence[Tensor], gates: Tensor, summands: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See `Backend.combine`."""
    assert gates.shape == (*outputs[0].shape[:2], len(outputs)), (gates.shape, len(outputs))
    counts = [len(heads) for heads in heads_of_summands(outputs, summands)]
    return _combine(list(outputs), gates, [x for of in summands for x in of], counts)


@register("add_gradients(Tensor[] grads, Tensor[] of_gates) -> (Tensor, Tensor)")
def _add_gradients(grads: Sequence[Tensor], of_gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    out_NHD, out_NHb = empty_as(grads[0]), _side_by_side(of_gates)
    if out_NHD.numel():
        C, num_rows = _constants(out_NHD, len(grads)), out_NHD.shape[0] * out_NHD.shape[1]
        launcher(_add_gradients_kernel, (cdiv(num_rows, C.BM),))(
            _branches(grads), tuple(map(gate_rows, of_gates)), out_NHD, out_NHb, num_rows,
            NG=len(of_gates), C=C, num_warps=4,
        )  # fmt: skip
    return out_NHD, out_NHb


@_add_gradients.register_fake
def _(grads: Sequence[Tensor], of_gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return empty_as(grads[0]), _side_by_side(of_gates)


def _side_by_side(of_gates: Sequence[Tensor]) -> Tensor:
    first = of_gates[0]
    shape = (*first.shape, len(of_gates))
    return torch.empty(shape, dtype=first.dtype, device=first.device)


def add_gradients(grads: Sequence[Tensor], of_gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `AddGradients` in backend.py."""
    out_NHD, out_NHb = _add_gradients(list(grads), list(of_gates))
    return out_NHD, out_NHb

"""Dense causal attention as a function, with the sequence split over ranks as in the NSA layers.

On one rank torch computes it. On several, ring-flash-attn does, by the layout's algorithm:

    layout                documents    dtypes               algorithm of ring-flash-attn
    zigzag                rows         bfloat16, float16    zigzag ring
    zigzag_per_document   cu_seqlens   bfloat16, float16    zigzag ring, varlen
    contiguous            both         all                  llama3: keys gathered head by head

The rings' gradients are wrong in float32, so float32 is refused there. Chunks are exactly those of
``nsa_dist.plan.layout``: rank r of P holds chunks r and 2P-1-r, one after the other, of each row or
document, and documents are padded at their ends to multiples of 2P.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nsa_dist.adapters.ring.flash import FLASH_DTYPES, FLASH_WIDTH, flash_kind
from nsa_dist.adapters.ring.loading import missing_package, ring_functions
from nsa_dist.attention.plan_cache import find_plan
from nsa_dist.checks import DTYPES, as_number, check_tensor, describe, is_plain
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import AgreeInBackward, agree
from nsa_dist.comm.collectives import name_failures
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig
from nsa_dist.host_tables import on_cpu
from nsa_dist.plan import Plan
from nsa_dist.plan.layout import check_batch_size
from nsa_dist.plan.statement import Statement
from nsa_kernels.autograd import first_order

# A dense layer uses a plan for its checks, the ranks' agreement and each token's position. These
# do not depend on heads, and a window of one token needs no halo.
MINIMAL_CONFIG = NSAConfig(1, 1, 1, branches=("window",), window=1, independent_kv=False)
RING_LAYOUTS = {"zigzag": False, "zigzag_per_document": True}
"""Layouts of the ring algorithms, and whether they take packed documents (else rows)."""


@dataclass(frozen=True, eq=False)
class Split:
    """The documents of one batch, as a rank's algorithm needs them.

    Attributes:
        lengths: tokens of each document of the whole stream, without empty ones.
        bounds: int32 boundaries on the device: of a rank's own tokens (ring), or of its queries
            and of the keys that they see (llama3).
        longest: the longest document in each of ``bounds``.
        key_rows: start and end of those keys in the whole stream (llama3).
    """

    lengths: tuple[int, ...]
    bounds: tuple[Tensor, ...] = ()
    longest: tuple[int, ...] = ()
    key_rows: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class DensePlan:
    """The data that all dense layers of a batch share.

    Attributes:
        plan: positions, documents and sizes of the split.
        split: the documents, for ring-flash-attn.
        layout: the layout's name.
        dtype: of queries, keys and values.
        packed: whether ``cu_seqlens`` was given.
        statement: the values that must be equal on all ranks.
    """

    plan: Plan
    split: Split
    layout: str
    dtype: torch.dtype
    packed: bool
    statement: Statement


_splits: weakref.WeakKeyDictionary[Plan, Split] = weakref.WeakKeyDictionary()


def get_dense_plan(
    layout: str,
    group: GroupLike | ContextGroup,
    *,
    batch: int,
    local_length: int,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    communication: CommunicationCounter | None = None,
    inputs: dict[str, str] | None = None,
    problem: str | None = None,
) -> DensePlan:
    """The plan for one call, cached as by ``nsa_dist.get_plan``. A collective.

    Raises:
        ValueError: on every rank, as ``get_plan``, and for a layout without an algorithm for dense
            attention.
    """
    context = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    plan = find_dense_plan(
        layout,
        context,
        batch=batch,
        local_length=local_length,
        cu_seqlens=cu_seqlens,
        dtype=dtype,
        device=device,
        counter=counter,
        inputs=inputs or {},
        problem=problem,
    )
    agree(plan.statement.also(call="get_dense_plan"), None, context, counter)
    return plan


@torch.compiler.disable
@_disable_current_modes()  # As in find_plan.
def find_dense_plan(
    layout: str,
    context: ContextGroup,
    *,
    batch: int,
    local_length: int,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    counter: CommunicationCounter,
    inputs: dict[str, str],
    problem: str | None = None,
) -> DensePlan:
    """As ``get_dense_plan``, but the ranks must still agree on it before they send data.

    Raises:
        ValueError: if this rank's input is bad; the other ranks raise it when they agree.
    """
    if cu_seqlens is not None:
        problem = problem or check_batch_size(batch)
    if context.size > 1:
        problem = problem or missing_package() or _layout_problem(layout, cu_seqlens, dtype)
    plan = find_plan(
        MINIMAL_CONFIG,
        layout,
        context,
        batch=batch,
        local_length=local_length,
        cu_seqlens=cu_seqlens,
        dtype=dtype,
        device=device,
        counter=counter,
        inputs={"call": "dense forward", **inputs},
        problem=problem,
    )
    if plan not in _splits:
        # Outside of inference mode, so that autograd may save them.
        with torch.inference_mode(False), on_cpu():
            _splits[plan] = _split(plan, layout, cu_seqlens, dtype, device)
    packed = cu_seqlens is not None
    return DensePlan(plan, _splits[plan], layout, dtype, packed, plan.statement)


def _layout_problem(layout: str, cu_seqlens: Tensor | None, dtype: torch.dtype) -> str | None:
    """The error for a split that ring-flash-attn cannot compute correctly, or None."""
    if layout not in RING_LAYOUTS:
        return None
    where = "for dense attention over several ranks"
    short = " or ".join(str(x).removeprefix("torch.") for x in FLASH_DTYPES)
    if dtype not in FLASH_DTYPES:
        return (
            f"layout must be 'contiguous' {where} in {dtype}, where the ring's gradients are "
            f"wrong, got {layout!r}; {layout!r} needs {short}"
        )
    if RING_LAYOUTS[layout] == (cu_seqlens is not None):
        return None
    given = "without cu_seqlens" if cu_seqlens is None else "with packed documents (cu_seqlens)"
    (other,) = set(RING_LAYOUTS) - {layout}
    return f"layout must be 'contiguous', or in {short} {other!r}, {where} {given}, got {layout!r}"


def _split(
    plan: Plan, layout: str, cu_seqlens: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Split:
    length = plan.local_length * plan.size
    whole = torch.tensor([0, length], dtype=torch.int32)
    if cu_seqlens is not None:
        whole = cu_seqlens.cpu().unique_consecutive()
    lengths = whole.diff()
    split = Split(tuple(lengths.tolist()))
    if plan.size == 1 or not length:
        return split
    bounds: tuple[Tensor, ...] = (whole // plan.size,)
    longest: tuple[int, ...] = (int(lengths.max()) // plan.size,)
    if layout == "contiguous":
        make = ring_functions(flash_kind(device, dtype)).llama3_bounds
        q, k, longest_q, longest_k, rows = make(whole, True, plan.rank, plan.size)
        bounds, longest = (q, k), (longest_q, longest_k)
        split = replace(split, key_rows=(rows.start, rows.stop))
    return replace(split, bounds=tuple(x.to(device) for x in bounds), longest=longest)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
    scale: float | None = None,
    plan: DensePlan | None = None,
    communication: CommunicationCounter | None = None,
) -> Tensor:
    """Causal softmax attention within documents, with the sequence split over a group of ranks.

    Args:
        q: [B, L, H, Dk], this rank's tokens, after rotary.
        k: [B, L, G, Dk]; G divides H.
        v: [B, L, G, Dv].
        cu_seqlens: int32 [documents + 1] boundaries of the whole padded stream, equal on all
            ranks, with B = 1; None if each row is one document.
        layout: how tokens were sharded: "contiguous", "zigzag" or "zigzag_per_document"; the
            module docstring lists the combinations for several ranks.
        group: process group or one-dimensional DeviceMesh over which the sequence is split; None
            for one rank.
        scale: factor of the logits; default 1/sqrt(Dk).
        plan: from ``get_dense_plan``; replaces ``cu_seqlens`` and ``layout``.
        communication: counter of sent bytes, as ``ring`` and ``ring_grad``.

    Returns:
        [B, L, H, Dv] in the dtype of ``q``.

    Raises:
        ValueError: on every rank of the group, if an argument of any rank is not allowed.
    """
    context = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    try:
        if scale is not None:
            scale = as_number("scale", scale, "a positive finite number or None")
        check_tensor("q", q, "a plain tensor")
    except ValueError as error:
        agree(Statement({"call": "dense forward"}), str(error), context, counter, error)
    problem = _check_inputs(q, k, v, context.size)

    def inputs() -> dict[str, str]:
        given = {"q": q, "k": k, "v": v}
        return {name: describe(x) for name, x in given.items()} | {"scale": repr(scale)}

    if plan is None:
        batch, local_length = q.shape[:2] if q.ndim >= 2 else (0, 0)
        plan = find_dense_plan(
            layout,
            context,
            batch=batch,
            local_length=local_length,
            cu_seqlens=cu_seqlens,
            dtype=q.dtype,
            device=q.device,
            counter=counter,
            inputs=inputs(),
            problem=problem,
        )
    else:
        problem = problem or _check_plan(plan, q, context, cu_seqlens)
    statement = plan.statement if isinstance(plan, DensePlan) else Statement({})
    if context.size > 1 or problem is not None:
        statement = statement.also(call="dense forward", **inputs())
        agree(statement, problem, context, counter)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not q.numel():
        return v.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    if context.size == 1:
        return _on_one_rank(q, k, v, plan, scale)
    out = _on_ranks(q, k, v, plan, context, scale, counter)
    return AgreeInBackward.apply(out, statement, (), context, counter)


def _on_one_rank(q: Tensor, k: Tensor, v: Tensor, plan: DensePlan, scale: float) -> Tensor:
    """One call per document, which avoids a [T, T] mask of packed documents."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    pieces = zip(*(x.split(plan.split.lengths, dim=2) for x in (q, k, v)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q_piece, k_piece, v_piece, is_causal=True, scale=scale, enable_gqa=True
        )
        for q_piece, k_piece, v_piece in pieces
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


@torch.compiler.disable
def _on_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: DensePlan,
    context: ContextGroup,
    scale: float,
    counter: CommunicationCounter,
) -> Tensor:
    functions = ring_functions(flash_kind(q.device, q.dtype))
    split, value_width = plan.split, v.shape[-1]
    # Kernels and buffers need one width for all three; columns of zeros do not change the result.
    width = _kernel_width(q, v)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "group": context.process_group,
    }
    moved, others = k.nbytes + v.nbytes, context.size - 1
    received = (others * moved, 2 * others * moved)
    with name_failures("ring", context, plan.statement):
        if plan.layout == "contiguous":
            # Rows have equal lengths, so they can be extra heads of one document.
            heads = (q.shape[0], q.shape[2])
            q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
            out = functions.llama3(
                *(q, k, v, *split.bounds, *split.longest),
                heads_k_stride=1,
                local_k_slice=slice(*split.key_rows),
                **options,
            )
            out = out.unflatten(1, heads).transpose(0, 1)
        else:
            # Gradients of keys and values go once round the ring, in float32.
            received = (others * moved, others * moved + context.size * 4 * (k.numel() + v.numel()))
            if plan.packed:
                rows = (x.squeeze(0) for x in (q, k, v))
                out = functions.zigzag_varlen(*rows, *split.bounds, *split.longest, **options)[None]
            else:
                out = functions.zigzag(q, k, v, **options)
    counter.add("ring", received[0], received[0])
    return _CountBackward.apply(out[..., :value_width], counter, received[1])


class _CountBackward(torch.autograd.Function):
    """The identity, which counts the bytes sent in the backward of the ring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: CommunicationCounter, size: int) -> Tensor:
        ctx.counter, ctx.size = counter, size
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.counter.add("ring_grad", ctx.size, ctx.size)
        return grad, None, None


def _kernel_width(q: Tensor, v: Tensor) -> int:
    width = max(q.shape[-1], v.shape[-1])
    return width if flash_kind(q.device, q.dtype) == "plain" else -(-width // 8) * 8


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> str | None:
    """The error in the tensors of one call, or None."""
    if q.ndim != 4:
        return f"q must be [batch, local tokens, heads, width], got shape {tuple(q.shape)}"
    if q.dtype not in DTYPES or q.is_meta:
        return f"q must be data in one of {DTYPES}, got {describe(q)}"
    batch, length, heads, width = q.shape
    for name, x, last in (("k", k, str(width)), ("v", v, "width of values")):
        if not is_plain(x):
            return f"{name} must be a plain tensor, got {describe(x)}"
        fits = x.ndim == 4 and x.shape[:2] == q.shape[:2] and x.shape[2] and not heads % x.shape[2]
        if not fits or (x is k and x.shape[3] != width):
            return (
                f"{name} must be of shape [{batch}, {length}, KV heads, {last}], its KV heads a "
                f"divisor of the {heads} query heads, got shape {tuple(x.shape)}"
            )
        if x.shape[2] != k.shape[2]:
            return f"v must have {k.shape[2]} heads as k, got {x.shape[2]}"
        if x.dtype != q.dtype or x.device != q.device:
            return f"{name} must be {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}"
    if ranks > 1 and flash_kind(q.device, q.dtype) != "plain":
        widest = max(width, v.shape[3])
        if widest > FLASH_WIDTH:
            device = q.device.type
            return f"width of heads must be at most {FLASH_WIDTH} on {device}, got {widest}"
    return None


def _check_plan(
    plan: DensePlan, q: Tensor, context: ContextGroup, cu_seqlens: Tensor | None
) -> str | None:
    """The error for a plan that was not made for this call, or None."""
    if not isinstance(plan, DensePlan):
        return f"plan must be one from get_dense_plan or None, got {describe(plan)}"
    if cu_seqlens is not None:
        return "cu_seqlens must be None with a plan, which has its own, got boundaries"
    made = plan.plan
    for what, of_plan, of_call in (
        ("[batch, local tokens]", (made.batch, made.local_length), tuple(q.shape[:2])),
        ("(rank, group size)", (made.rank, made.size), (context.rank, context.size)),
        ("dtype", plan.dtype, q.dtype),
        ("device", made.positions.device, q.device),
    ):
        if of_plan != of_call:
            return f"plan must be one for {what} {of_call}, got one for {of_plan}"
    return None

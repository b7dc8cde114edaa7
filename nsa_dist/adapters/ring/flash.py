"""The four flash-attn functions that ring-flash-attn calls, with a fallback for each machine.

16-bit tensors on a GPU use flash-attn if it is installed, else torch's flash kernels. Everything
else, float32 and float64 included, uses plain PyTorch, which computes tiles of queries and so never
holds more than ``TILE`` logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FlashKind = Literal["flash_attn", "torch", "plain"]
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_WIDTH = 256
"""Maximal head width of flash kernels; widths must be multiples of 8."""
NAMES = (
    *("_flash_attn_forward", "_flash_attn_backward"),
    *("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
)
INTERFACE = "flash_attn.flash_attn_interface"
TILE = 1 << 24
"""Maximal number of logits that the plain computation holds at a time."""


class Bounds(NamedTuple):
    """Documents of packed queries and packed keys: int32 boundaries and maximal lengths."""

    q: Tensor
    k: Tensor
    longest_q: int
    longest_k: int


class Kernels(NamedTuple):
    """Attention over packed documents. Causal masks align the last query with the last key.

    Args:
        forward: q [M, H, D], k, v [N, G, D], bounds, scale, causal -> out [M, H, D], lse [H, M].
        backward: dout, q, k, v, out, lse, bounds, scale, causal -> dq, dk, dv.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def flash_kind(device: torch.device, dtype: torch.dtype) -> FlashKind:
    """The implementation of attention for ``dtype`` on ``device``."""
    if device.type != "cuda" or dtype not in FLASH_DTYPES:
        return "plain"
    return "flash_attn" if _has_flash_attn() else "torch"


def _has_flash_attn() -> bool:
    """Whether flash-attn 2 is installed. Version 4 has the same name but not these functions."""
    package, _, module = INTERFACE.rpartition(".")
    spec = find_spec(package)  # find_spec(INTERFACE) would import the package.
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / f"{module}.py").is_file() for folder in folders or ())


def flash_functions(kind: FlashKind) -> dict[str, Callable[..., Any]]:
    """The functions ``NAMES``, with the keywords that ring-flash-attn 0.1.8 uses."""
    if kind == "flash_attn":
        interface = importlib.import_module(INTERFACE)
        return {name: getattr(interface, name) for name in NAMES}
    return _functions_on(TORCH if kind == "torch" else PLAIN)


def _functions_on(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """flash-attn's functions based on ``kernels``; rows [B, S, ...] are documents of length S."""

    def varlen_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
    ) -> tuple[Tensor, Tensor, None, None]:
        assert dropout_p == 0 and window_size == (-1, -1) and alibi_slopes is None
        bounds = Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *kernels.forward(q, k, v, bounds, softmax_scale, causal), None, None

    def varlen_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        assert dropout_p == 0 and window_size == (-1, -1) and alibi_slopes is None
        bounds = Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lse = softmax_lse.contiguous()
        grads = kernels.backward(dout, q, k, v, out, lse, bounds, softmax_scale, causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
    ) -> tuple[Tensor, Tensor, None, None]:
        assert dropout_p == 0 and window_size == (-1, -1) and alibi_slopes is None
        rows = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = kernels.forward(*rows, _row_bounds(q, k), softmax_scale, causal)
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2])
        return out, lse.transpose(0, 1), None, None

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        assert dropout_p == 0 and window_size == (-1, -1) and alibi_slopes is None
        rows = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        lse = softmax_lse.transpose(0, 1).flatten(1).contiguous()
        grads = kernels.backward(*rows, lse, _row_bounds(q, k), softmax_scale, causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad.view_as(target))

    return dict(zip(NAMES, (forward, backward, varlen_forward, varlen_backward), strict=True))


def _row_bounds(q: Tensor, k: Tensor) -> Bounds:
    count = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return Bounds(count * q.shape[1], count * k.shape[1], q.shape[1], k.shape[1])


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *bounds, 0.0, causal, False, scale=scale
    )
    return out, lse


def _torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel wants a random state for dropout, although there is no dropout.
    state = torch.zeros(2, dtype=torch.int64, device=q.device).view(torch.uint64)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *bounds, 0.0, causal, state, state[:1], scale=scale
    )


class _Tile(NamedTuple):
    """Some queries of one document and all its keys: rows of q, rows of k, and the mask [m, n] of
    keys hidden from each query, or None."""

    queries: slice
    keys: slice
    hidden: Tensor | None


def _tiles(q: Tensor, bounds: Bounds, causal: bool) -> Iterator[_Tile]:
    first_q, first_k = bounds.q.tolist(), bounds.k.tolist()
    ranges = zip(first_q, first_q[1:], first_k, first_k[1:], strict=False)
    for start, end, key_start, key_end in ranges:
        keys = key_end - key_start
        step = max(1, TILE // max(1, keys * q.shape[1]))
        for at in range(start, end, step):
            last = min(at + step, end)
            hidden = None
            if causal:
                # The last query sees the last key.
                newest = torch.arange(at - end, last - end, device=q.device) + keys
                hidden = torch.arange(keys, device=q.device) > newest[:, None]
            yield _Tile(slice(at, last), slice(key_start, key_end), hidden)


def _logits(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """[m, G, R, D] and [n, G, D] to [m, G, R, n]."""
    logits = torch.einsum("mgrd,ngd->mgrn", q, k) * scale
    return logits if hidden is None else logits.masked_fill(hidden[:, None, None], -torch.inf)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=compute)
    for rows, keys, hidden in _tiles(q, bounds, causal):
        queries = q[rows].to(compute).unflatten(1, groups)
        logits = _logits(queries, k[keys].to(compute), scale, hidden)
        mixed = torch.einsum("mgrn,ngd->mgrd", logits.softmax(-1), v[keys].to(compute))
        out[rows], lse[rows] = mixed.flatten(1, 2).to(q.dtype), logits.logsumexp(-1).flatten(1)
    return out, lse.T


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=compute) for x in (k, v))
    for rows, keys, hidden in _tiles(q, bounds, causal):
        queries, grad, result = (x[rows].to(compute).unflatten(1, groups) for x in (q, dout, out))
        logits = _logits(queries, k[keys].to(compute), scale, hidden)
        dprobs = torch.einsum("mgrd,ngd->mgrn", grad, v[keys].to(compute))
        if q.dtype in FLASH_DTYPES:
            # A step of a ring: ``lse`` and ``out`` also cover keys of other ranks.
            probs = (logits - lse[:, rows].T.unflatten(1, groups)[..., None]).exp()
            delta = (grad * result).sum(-1, keepdim=True)
        else:
            # All keys are here: recomputing is more exact than using the rounded ``out``.
            probs = logits.softmax(-1)
            delta = (probs * dprobs).sum(-1, keepdim=True)
        dlogits = (dprobs - delta) * probs * scale
        dq[rows] = torch.einsum("mgrn,ngd->mgrd", dlogits, k[keys].to(compute)).flatten(1, 2)
        # Sum over heads last: one running sum over all heads of a group would round more often.
        dk[keys] += torch.einsum("mgrn,mgrd->rngd", dlogits, queries).sum(0)
        dv[keys] += torch.einsum("mgrn,mgrd->rngd", probs, grad).sum(0)
    return dq, dk, dv


TORCH = Kernels(_torch_forward, _torch_backward)
PLAIN = Kernels(_plain_forward, _plain_backward)

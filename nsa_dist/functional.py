"""The attention as a function of projected queries, keys, values and gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsa_dist.comm import CommunicationCounter
from nsa_dist.compressor import BlockCompressor
from nsa_dist.config import NSAConfig
from nsa_dist.flow import Flow, Rotary
from nsa_dist.group import ContextGroup, GroupLike, context_group
from nsa_dist.plan import Plan
from nsa_dist.planning import get_plan
from nsa_kernels import get_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class NSADetails:
    """What one call chose and weighed, for looking inside.

    Attributes:
        selected: int32 [B, L, G, n], chosen blocks of each token's document, ascending, -1 padded;
            None where the branch is not used.
        gates: [B, L, H, nb], branches in the order of ``NSAConfig.branches``.
        lse: natural log-sum-exp of the scaled logits of each branch in use, [B, L, H]; -inf where
            a query sees no key.
    """

    selected: Tensor | None
    gates: Tensor
    lse: Mapping[str, Tensor]


def native_sparse_attention(
    q: Tensor,
    k: Tensor | Mapping[str, Tensor],
    v: Tensor | Mapping[str, Tensor],
    gates: Tensor,
    k_compressor: nn.Module | None = None,
    v_compressor: nn.Module | None = None,
    *,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    rotary: Rotary | None = None,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
    backend: str = "auto",
    plan: Plan | None = None,
    communication: CommunicationCounter | None = None,
    return_details: bool = False,
) -> Tensor | tuple[Tensor, NSADetails]:
    """Native Sparse Attention (arXiv 2502.11089) over a sequence split over the ranks of a group.

    Args:
        q: [B, L, H, Dk], this rank's tokens, after rotary.
        k: [B, L, G, Dk], after rotary; with ``independent_kv`` a mapping from each of
            ``config.key_branches`` to such a tensor.
        v: [B, L, G, Dv]; with ``independent_kv`` a mapping from each of ``config.branches``.
        gates: [B, L, H, nb], in (0, 1), branches in the order of ``config.branches``; any floating
            dtype.
        k_compressor, v_compressor: ``BlockCompressor`` modules, or with ``compress="custom"`` any
            modules [C, G, l, D] -> [C, G, D]. Needed where the compressed or (keys) the selected
            branch is used.
        cu_seqlens: int32 [documents + 1] boundaries of the whole padded stream, the same on all
            ranks, with B = 1; None for B documents.
        rotary: with ``compress_pre_rope`` the keys come unrotated, and this says how to rotate
            them: a RotaryConfig, or cos and sin [positions, rotary_dim/2] indexed by the position
            in the document.
        layout: "contiguous", "zigzag" or "zigzag_per_document": how tokens were sharded.
        group: process group or one-dimensional DeviceMesh over which the sequence is split; None
            for one rank.
        backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.
        plan: from ``get_plan``, when the caller has it already.
        communication: where moved bytes are counted.
        return_details: also return the chosen blocks, gates and log-sum-exps.

    Returns:
        [B, L, H, Dv] in the dtype of ``q``; with ``return_details`` also ``NSADetails``.

    Raises:
        ValueError: naming the option, the value found and the values that work; on every rank of
            the group where it shows when a plan is made.
    """
    context = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    problem = _check_inputs(q, k, v, gates, config, rotary) or _check_compressors(
        k_compressor, v_compressor, config
    )
    try:
        ops = get_backend(backend)
    except ValueError as error:
        problem = problem or str(error)
    if plan is None:
        batch, local_length = q.shape[:2] if q.ndim >= 2 else (0, 0)
        plan = get_plan(
            config,
            layout,
            context,
            batch=batch,
            local_length=local_length,
            cu_seqlens=cu_seqlens,
            dtype=q.dtype,
            device=q.device,
            communication=counter,
            problem=problem,
        )
    elif problem is not None:
        raise ValueError(problem)
    elif q.shape[:2] != (plan.batch, plan.local_length):
        raise ValueError(
            f"plan: found one for [{plan.batch}, {plan.local_length}] tokens with q of shape "
            f"{tuple(q.shape)}; a plan made for the same batch works"
        )

    flow = Flow(ops, config, plan, context, counter, rotary)
    shape = q.shape[:2]
    out, lse, selected = flow.run(
        q.flatten(0, 1),
        _by_branch(k, config.key_branches),
        _by_branch(v, config.key_branches if isinstance(v, Tensor) else config.branches),
        gates.flatten(0, 1),
        k_compressor,
        v_compressor,
    )
    out = out.unflatten(0, shape)
    if not return_details:
        return out
    return out, NSADetails(
        selected=None if selected is None else selected.unflatten(0, shape),
        gates=gates,
        lse={branch: lse[branch].unflatten(0, shape) for branch in config.branches},
    )


def _by_branch(x: Tensor | Mapping[str, Tensor], branches: tuple[str, ...]) -> dict[str, Tensor]:
    """Local rows [N, G, D] of each branch; shared ones are one object."""
    if isinstance(x, Tensor):
        return dict.fromkeys(branches, x.flatten(0, 1))
    return {branch: x[branch].flatten(0, 1) for branch in branches}


def _check_inputs(
    q: Tensor,
    k: Tensor | Mapping[str, Tensor],
    v: Tensor | Mapping[str, Tensor],
    gates: Tensor,
    config: NSAConfig,
    rotary: Rotary | None,
) -> str | None:
    """What is wrong with the tensors of one call, or None."""
    heads = config.num_heads
    if q.ndim != 4 or q.shape[2:] != (heads, config.head_dim):
        return (
            f"q: found shape {tuple(q.shape)}; [batch, local tokens, num_heads={heads}, "
            f"head_dim={config.head_dim}] works"
        )
    if q.dtype not in DTYPES:
        return f"q: found dtype {q.dtype}; {DTYPES} work"
    for name, given, branches, width in (
        ("k", k, config.key_branches, config.head_dim),
        ("v", v, config.branches, config.value_dim),
    ):
        if isinstance(given, Tensor) == config.independent_kv:
            works = f"a mapping from {branches}" if config.independent_kv else "one tensor"
            return (
                f"{name}: found a {type(given).__name__} with independent_kv="
                f"{config.independent_kv}; {works} works"
            )
        if not isinstance(given, Tensor) and set(given) != set(branches):
            return f"{name}: found branches {sorted(given)}; exactly {branches} work"
        tensors = {"": given} if isinstance(given, Tensor) else given
        expected = (*q.shape[:2], config.num_kv_heads, width)
        for branch, x in tensors.items():
            label = f"{name}[{branch!r}]" if branch else name
            if x.shape != expected:
                return f"{label}: found shape {tuple(x.shape)}; {tuple(expected)} works"
            if x.dtype != q.dtype or x.device != q.device:
                return (
                    f"{label}: found {x.dtype} on {x.device}; the {q.dtype} on {q.device} of q "
                    "works"
                )
    expected = (*q.shape[:3], len(config.branches))
    if gates.shape != expected or gates.dtype not in DTYPES or gates.device != q.device:
        return (
            f"gates: found {gates.dtype} of shape {tuple(gates.shape)} on {gates.device}; a "
            f"floating dtype of shape {tuple(expected)} on {q.device} works"
        )
    if config.compress_pre_rope and rotary is None:
        return "rotary: found None with compress_pre_rope=True; a RotaryConfig or (cos, sin) works"
    if not config.compress_pre_rope and rotary is not None:
        return (
            "rotary: found with compress_pre_rope=False, where keys come rotated; None works "
            "(or compress_pre_rope=True and unrotated keys)"
        )
    return None


def _check_compressors(
    k_compressor: nn.Module | None, v_compressor: nn.Module | None, config: NSAConfig
) -> str | None:
    """What is wrong with the compressors given for ``config``, or None."""
    for name, compressor, needed in (
        ("k_compressor", k_compressor, config.uses_compression),
        ("v_compressor", v_compressor, "compressed" in config.branches),
    ):
        if not needed:
            continue
        if compressor is None:
            return f"{name}: found None; a module works (branches={config.branches})"
        if isinstance(compressor, BlockCompressor) == (config.compress == "custom"):
            works = "a module of your own" if config.compress == "custom" else "a BlockCompressor"
            return (
                f"{name}: found {type(compressor).__name__} with compress={config.compress!r}; "
                f"{works} works"
            )
        if isinstance(compressor, BlockCompressor) and (
            compressor.kind != config.compress or compressor.block != config.compress_block
        ):
            return (
                f"{name}: found one of kind {compressor.kind!r} for blocks of {compressor.block}; "
                f"kind {config.compress!r} and compress_block={config.compress_block} work"
            )
    return None

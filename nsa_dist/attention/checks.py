"""Checks of the tensors of one call. Each returns an error message, or None if all is well.

They do not raise: the caller passes the message to ``nsa_dist.comm.agreement``, which raises it on
every rank at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nsa_dist.checks import DTYPES, describe, is_plain
from nsa_dist.comm.group import ContextGroup
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.plan import Plan


def tensor_problem(name: str, x: Any) -> str | None:
    """The error if ``x`` is not a plain, dense tensor."""
    if is_plain(x) and not isinstance(x, DTensor):
        return None
    if isinstance(x, DTensor):
        return f"{name} must be a plain tensor ({name}.to_local() gives one), got a DTensor"
    return f"{name} must be a plain tensor, got {describe(x)}"


def query_problem(q: Any, config: NSAConfig) -> str | None:
    """The error in the queries."""
    problem = tensor_problem("q", q)
    if problem is not None:
        return problem
    if q.ndim != 4 or q.shape[2:] != (config.num_heads, config.head_dim):
        return (
            f"q must have shape [batch, local tokens, num_heads={config.num_heads}, "
            f"head_dim={config.head_dim}], got {tuple(q.shape)}"
        )
    if q.dtype not in DTYPES or q.is_meta:
        return f"q must hold data in one of {DTYPES}, got {describe(q)}"
    return None


def keys_problem(
    q: Tensor, k: Any, v: Any, config: NSAConfig, key_sets: tuple[str, ...]
) -> str | None:
    """The error in keys and values; the queries have been checked.

    Args:
        key_sets: the names in a mapping of keys; values are named after branches.
    """
    for name, given, sets, width in (
        ("k", k, key_sets, config.head_dim),
        ("v", v, config.branches, config.value_dim),
    ):
        if not config.independent_kv:
            if isinstance(given, Mapping):
                return f"{name} must be one tensor with independent_kv=False, got a mapping"
            tensors = {name: given}
        elif not isinstance(given, Mapping) or set(given) != set(sets):
            got = tuple(given) if isinstance(given, Mapping) else describe(given)
            return f"{name} must map {sets} to tensors with independent_kv=True, got {got}"
        else:
            tensors = {f"{name}[{branch!r}]": x for branch, x in given.items()}
        shape = (*q.shape[:2], config.num_kv_heads, width)
        for label, x in tensors.items():
            if type(x) is not Tensor or not is_plain(x):
                problem = tensor_problem(label, x)
                if problem is not None:
                    return problem
            if x.shape != shape:
                return f"{label} must have shape {shape}, got {tuple(x.shape)}"
            if x.dtype != q.dtype or x.device != q.device:
                return f"{label} must be {q.dtype} on {q.device} like q, got {describe(x)}"
    return None


def inputs_problem(
    q: Tensor, k: Any, v: Any, gates: Any, config: NSAConfig, key_sets: tuple[str, ...]
) -> str | None:
    """The error in keys, values and gates; the queries have been checked."""
    return keys_problem(q, k, v, config, key_sets) or gates_problem(gates, q, config)


def gates_problem(gates: Any, q: Tensor, config: NSAConfig) -> str | None:
    """The error in the gates; the queries have been checked."""
    problem = tensor_problem("gates", gates)
    if problem is not None:
        return problem
    shape = (*q.shape[:3], len(config.branches))
    if gates.shape != shape:
        return f"gates must have shape {shape}, got {tuple(gates.shape)}"
    if gates.dtype not in DTYPES or gates.device != q.device:
        return f"gates must be of a floating dtype on {q.device}, got {describe(gates)}"
    return None


def rotary_problem(
    rotary: Any, device: torch.device, config: NSAConfig, longest: int
) -> str | None:
    """The error in the rotary embedding of unrotated keys.

    Args:
        longest: tokens of the longest document.
    """
    if not config.compress_pre_rope:
        if rotary is None:
            return None
        return (
            "rotary must be None with compress_pre_rope=False (keys are already rotated), got "
            f"{describe(rotary)}"
        )
    if isinstance(rotary, RotaryConfig):
        try:
            rotary.rotary_dim(config.head_dim)
        except ValueError as error:
            return str(error)
        return None
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        return (
            "rotary must be a RotaryConfig or (cos, sin) with compress_pre_rope=True, got "
            f"{describe(rotary)}"
        )
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        if (
            not is_plain(table)
            or table.shape != rotary[0].shape
            or table.ndim != 2
            or not 0 < 2 * table.shape[1] <= config.head_dim
            or table.dtype not in DTYPES
            or table.device != device
        ):
            return (
                "rotary must be cos and sin of one shape [positions, rotary_dim/2 up to "
                f"{config.head_dim // 2}], floating point on {device}, got {name}: "
                f"{describe(table)}"
            )
    if rotary[0].shape[0] < longest:
        return (
            f"rotary must have cos and sin of at least {longest} positions, the length of the "
            f"longest document, got {rotary[0].shape[0]}"
        )
    return None


def plan_problem(
    plan: Any,
    rows: tuple[int, int],
    device: torch.device,
    config: NSAConfig,
    group: ContextGroup,
    cu_seqlens: Any,
    grids: Collection[str],
    exact_gradients: int = 0,
) -> str | None:
    """The error for a plan that was not made for this call.

    Args:
        grids: names of the grids that the call reads.
    """
    if not isinstance(plan, Plan):
        return f"plan must be None or come from get_plan, got {describe(plan)}"
    if cu_seqlens is not None:
        return "cu_seqlens must be None with a plan, which has its own, got boundaries"
    for what, got, must in (
        ("[batch, local tokens]", (plan.batch, plan.local_length), tuple(rows)),
        ("(rank, group size)", (plan.rank, plan.size), (group.rank, group.size)),
        ("config", plan.config, config),
        ("device", plan.positions.device, device),
        ("blocks", sorted(plan.grids), sorted(grids)),
        ("exact_gradients", plan.parts.most_ranks if plan.parts else 0, exact_gradients),
    ):
        if got != must:
            return f"plan must be one for {what} {must}, got one for {got}"
    return None

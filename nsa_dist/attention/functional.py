"""The attention as a function of projected queries, keys, values and gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from nsa_dist.attention.call import Call, Rotary, make_call, make_setup, options_problem, refuse
from nsa_dist.attention.checks import inputs_problem, query_problem, rotary_problem
from nsa_dist.attention.flow import Attended, attend_branches
from nsa_dist.attention.selectors import (
    CompressedSelector,
    Selector,
    exact_selector_problem,
    selector_problem,
)
from nsa_dist.attention.watching import Inputs, is_watched, show_inputs, show_output
from nsa_dist.checks import describe
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import BRANCHES, NSAConfig
from nsa_dist.plan import Plan


@dataclass(frozen=True)
class NSADetails:
    """Internal values of one call, for inspection.

    Attributes:
        selected: int32 [B, L, G, n], selected blocks of each token's document, ascending, padded
            with -1; None if the branch is not used.
        gates: [B, L, H, nb], branches in the order of ``NSAConfig.branches``.
        lse: natural log-sum-exp of the scaled logits of each branch in use, [B, L, H]; -inf if a
            query sees no key.
    """

    selected: Tensor | None
    gates: Tensor
    lse: Mapping[str, Tensor]


KeysOrValues = Tensor | Mapping[str, Tensor]


@overload
def native_sparse_attention(
    q: Tensor,
    k: KeysOrValues,
    v: KeysOrValues,
    gates: Tensor,
    k_compressor: nn.Module | None = ...,
    v_compressor: nn.Module | None = ...,
    *,
    config: NSAConfig,
    cu_seqlens: Tensor | None = ...,
    rotary: Rotary | None = ...,
    layout: str = ...,
    group: GroupLike | ContextGroup = ...,
    backend: str = ...,
    plan: Plan | None = ...,
    communication: CommunicationCounter | None = ...,
    return_details: Literal[False] = ...,
    selector: Selector | None = ...,
    fetch_again: bool | None = ...,
    recompute_branches: Sequence[str] = ...,
    fetch: str = ...,
    ranks_per_node: int | None = ...,
    exact_gradients: int = ...,
) -> Tensor: ...
@overload
def native_sparse_attention(
    q: Tensor,
    k: KeysOrValues,
    v: KeysOrValues,
    gates: Tensor,
    k_compressor: nn.Module | None = ...,
    v_compressor: nn.Module | None = ...,
    *,
    config: NSAConfig,
    cu_seqlens: Tensor | None = ...,
    rotary: Rotary | None = ...,
    layout: str = ...,
    group: GroupLike | ContextGroup = ...,
    backend: str = ...,
    plan: Plan | None = ...,
    communication: CommunicationCounter | None = ...,
    return_details: Literal[True],
    selector: Selector | None = ...,
    fetch_again: bool | None = ...,
    recompute_branches: Sequence[str] = ...,
    fetch: str = ...,
    ranks_per_node: int | None = ...,
    exact_gradients: int = ...,
) -> tuple[Tensor, NSADetails]: ...
def native_sparse_attention(
    q: Tensor,
    k: KeysOrValues,
    v: KeysOrValues,
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
    selector: Selector | None = None,
    fetch_again: bool | None = None,
    recompute_branches: Sequence[str] = (),
    fetch: str = "chosen",
    ranks_per_node: int | None = None,
    exact_gradients: int = 0,
) -> Tensor | tuple[Tensor, NSADetails]:
    """Native Sparse Attention (arXiv 2502.11089), with the sequence split over a group of ranks.

    Args:
        q: [B, L, H, Dk], this rank's tokens, after rotary.
        k: [B, L, G, Dk], after rotary; with ``independent_kv`` a mapping to such tensors from
            ``config.key_branches`` (or from the sets that ``selector`` reads).
        v: [B, L, G, Dv]; with ``independent_kv`` a mapping from ``config.branches``.
        gates: [B, L, H, nb], in (0, 1), branches in the order of ``config.branches``; any floating
            dtype.
        k_compressor, v_compressor: ``BlockCompressor`` modules, or with ``compress="custom"`` any
            modules that map [C, G, l, D] to [C, G, D]. The compressed branch needs both, the
            selected branch the first.
        cu_seqlens: int32 [documents + 1] boundaries of the whole padded stream, equal on all
            ranks; with B > 1 the rows are one stream, one after another, and every row's start is
            a boundary. None if each row is one document.
        rotary: rotary embedding of the unrotated keys of ``compress_pre_rope``: a RotaryConfig, or
            cos and sin [positions, rotary_dim/2], indexed by position in the document.
        layout: how tokens were sharded: "contiguous", "zigzag" or "zigzag_per_document".
        group: process group or one-dimensional DeviceMesh over which the sequence is split, or one
            with the dimensions "node" and "local"; None for one rank.
        backend: "auto" (Triton on an NVIDIA GPU, else PyTorch) or a name that
            ``nsa_kernels.get_backend`` knows.
        plan: from ``get_plan``; replaces ``cu_seqlens`` and ``layout``.
        communication: counter of sent bytes.
        return_details: also return the selected blocks, gates and log-sum-exps.
        selector: selects blocks instead of NSA's compressed branch; needs no compressors.
        fetch_again: over several ranks, free the selected blocks of other ranks after their use
            and fetch them again in backward. Then only two KV heads' are in memory at a time, and
            each backward receives as many bytes more as its forward. None: with more than two KV
            heads.
        recompute_branches: branches of which nothing but inputs is kept for backward, which
            computes their forward again.
        fetch: over several ranks, which selected blocks of other ranks are fetched: "chosen", or
            "full", all that local queries may choose. Then nothing is requested and no size is
            waited for. It is faster where nearly all are chosen.
        ranks_per_node: consecutive ranks of the group that share the fast level of links. Then
            ``fetch="chosen"`` brings a block of another node once a node, whose ranks share it, and
            gradients are summed inside a node first. None: as a DeviceMesh of nodes says, else the
            ranks of each host, where two or more hosts have equally many, at least two; 1: one
            level.
        exact_gradients: gradients of q, k, v, gates and compressors have the same bits over 1, 2,
            4, ... up to this many ranks, a power of two; lengths must be multiples of twice as
            many. 0: they agree to rounding.

    Returns:
        [B, L, H, Dv] in the dtype of ``q``; with ``return_details`` also ``NSADetails``.

    Raises:
        ValueError: on every rank of the group, if an argument of any rank is not allowed.
    """
    context = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    if not isinstance(config, NSAConfig):
        refuse(f"config must be an NSAConfig, got {config!r}", {}, context, counter)
    used = CompressedSelector(k_compressor, v_compressor) if selector is None else selector
    grids = used.grids(config)
    options: dict[str, Any] = {
        "fetch_again": fetch_again,
        "recompute_branches": recompute_branches,
        "fetch": fetch,
        "ranks_per_node": ranks_per_node,
        "exact_gradients": exact_gradients,
    }
    problem = options_problem(config, context, **options)
    problem = problem or exact_selector_problem(selector, exact_gradients)
    setup = make_setup(
        *(config, layout, context, backend, counter),
        rotary=rotary,
        selector_grids=grids,
        **(options if problem is None else {}),
    )
    problem = problem or selector_problem(used, config) or query_problem(q, config)
    problem = problem or inputs_problem(q, k, v, gates, config, setup.key_sets)
    compressors = k_compressor is not None or v_compressor is not None
    if problem is None and selector is not None and compressors:
        problem = "k_compressor and v_compressor must be None with a selector, got modules"
    if problem is not None:
        setup.refuse(problem, _stated(q, k, v, gates, rotary, used))
    rows = (q.shape[0], q.shape[1])
    call = make_call(setup, rows, q.device, q.dtype, cu_seqlens=cu_seqlens, plan=plan, stated={})
    attended = attend(call, q, k, v, gates, used)
    out = attended.out_NHD.unflatten(0, rows)
    return (out, details_of(attended, gates)) if return_details else out


def attend(
    call: Call,
    q: Tensor,
    k: KeysOrValues,
    v: KeysOrValues,
    gates: Tensor,
    selector: Selector,
    problem: str | None = None,
) -> Attended:
    """Compute a call's attention after all ranks have agreed on it.

    Args:
        q, k, v, gates: as for ``native_sparse_attention``, already checked.
        selector: the selector that the call was made for.
        problem: an error that the caller found in them, if any.

    Raises:
        ValueError: on every rank of the group, if the input of any rank is bad.
    """
    channel = call.channel
    problem = (
        problem
        or rotary_problem(call.rotary, q.device, call.config, call.plan.longest)
        or selector.problem(call)
    )
    if channel.group.size > 1 or problem is not None:
        stated = _stated(q, k, v, gates, call.rotary, selector)
        statement = call.plan.statement
        more = {name: value for name, value in stated.items() if name not in statement.values}
        backend = repr(call.backend.name)
        more["fetch_again"] = repr(call.fetch_again)
        more["recompute_branches"] = repr(call.recompute_branches)
        more["fetch"] = repr(call.fetch)
        more["ranks_per_node"] = repr(call.ranks_per_node or channel.group.node_of_rank)
        more["exact_gradients"] = repr(call.plan.parts.most_ranks if call.plan.parts else 0)
        agree(statement.also(**more, backend=backend), problem, channel.group, channel.counter)
    watched = is_watched()
    if watched:
        shown = show_inputs(call, Inputs(q, k, v, gates), selector)
        q, k, v, gates = shown.q, shown.k, shown.v, shown.gates
    sets = tuple(call.plan.halos)
    alone = channel.group.size == 1 and call.plan.parts is None
    run = attend_branches if alone else _attend_over_ranks
    attended = run(
        call,
        q.flatten(0, 1),
        _by_set(k, sets),
        _by_set(v, sets if isinstance(v, Tensor) else call.config.branches),
        gates.flatten(0, 1),
        selector,
    )
    if watched:
        out = show_output(attended.out_NHD, attended.blocks_NGn)
        attended = replace(attended, out_NHD=out)
    return attended


# A compiled graph cannot hold messages whose sizes follow from data, nor sums that are put together
# beside autograd: one break, not one a message.
@torch.compiler.disable
def _attend_over_ranks(call: Call, *args: Any) -> Attended:
    return attend_branches(call.with_nodes(), *args)


def details_of(attended: Attended, gates: Tensor) -> NSADetails:
    """The details of a call, in rows [B, L] like its gates."""
    rows, blocks = gates.shape[:2], attended.blocks_NGn
    lse = attended.lse_NH
    return NSADetails(
        selected=None if blocks is None else blocks.unflatten(0, rows),
        gates=gates,
        lse={branch: lse[branch].unflatten(0, rows) for branch in BRANCHES if branch in lse},
    )


def _stated(
    q: Any, k: Any, v: Any, gates: Any, rotary: Rotary | None, selector: Selector
) -> dict[str, str]:
    """The input as text, by name, which must be equal on all ranks."""
    return {
        "q": describe(q),
        "k": _describe_all(k),
        "v": _describe_all(v),
        "gates": describe(gates),
        "rotary": _describe_all(rotary),
        "selector": selector.name,
        **selector.stated(),
    }


def _by_set(x: KeysOrValues, sets: tuple[str, ...]) -> dict[str, Tensor]:
    """Local rows [N, G, D] of each set; a shared tensor is one object."""
    if isinstance(x, Tensor):
        return dict.fromkeys(sets, x.flatten(0, 1))
    return {name: x[name].flatten(0, 1) for name in sets}


def _describe_all(x: Any) -> str:
    """``describe`` for a tensor, or for several of them; other values are printed."""
    if isinstance(x, Mapping):
        return ", ".join(f"{name}: {describe(value)}" for name, value in x.items())
    if isinstance(x, tuple):
        return ", ".join(map(describe, x))
    return describe(x) if isinstance(x, Tensor) else repr(x)

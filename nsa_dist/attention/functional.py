"""The attention as a function of projected queries, keys, values and gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa_dist.attention.flow import Flow, Rotary
from nsa_dist.attention.plan_cache import find_plan
from nsa_dist.checks import DTYPES, describe, is_plain
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.crossover import hint_at_crossover
from nsa_dist.nn.compressor import BlockCompressor, compressor_options
from nsa_dist.plan import Plan
from nsa_dist.plan.statement import Statement
from nsa_kernels import get_backend


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
        backend: "auto" (Triton on an NVIDIA GPU, else PyTorch) or a name that
            ``nsa_kernels.get_backend`` knows. One that cannot compute the call refuses it.
        plan: from ``get_plan``, when the caller has it already; it stands for ``cu_seqlens`` and
            ``layout``.
        communication: where moved bytes are counted.
        return_details: also return the chosen blocks, gates and log-sum-exps.

    Returns:
        [B, L, H, Dv] in the dtype of ``q``; with ``return_details`` also ``NSADetails``.

    Raises:
        ValueError: naming the option, the value found and the values that work; on every rank of
            the group, whichever rank's input is bad.
    """
    context = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    problem = None
    if not isinstance(config, NSAConfig):
        problem = f"config: found {config!r}; an NSAConfig works"
    elif not is_plain(q):
        problem = f"q: found {describe(q)}; a tensor works"
    if problem is not None:
        agree(Statement({"call": "forward"}), problem, context, counter)
    problem = _check_inputs(q, k, v, gates, config, rotary) or _check_compressors(
        k_compressor, v_compressor, config
    )
    try:
        ops = get_backend(backend, q.device)
        backend = ops.name
        problem = problem or ops.refuses(q.dtype, config.kernel_options)
    except ValueError as error:
        problem = problem or str(error)

    def inputs() -> dict[str, str]:
        return {
            "q": describe(q),
            "k": _describe_all(k),
            "v": _describe_all(v),
            "gates": describe(gates),
            "rotary": _describe_all(rotary),
            "backend": repr(backend),
        }

    if plan is None:
        batch, local_length = q.shape[:2] if q.ndim >= 2 else (0, 0)
        plan = find_plan(
            config,
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
        problem = problem or _check_plan(plan, q, config, context, cu_seqlens)
    problem = problem or _check_tables(rotary, plan)
    if context.size > 1 or problem is not None:
        statement = plan.statement if isinstance(plan, Plan) else Statement({"call": "forward"})
        more = {k: value for k, value in inputs().items() if k not in statement.values}
        agree(statement.also(**more), problem, context, counter)

    if context.rank == 0:
        hint_at_crossover(plan.longest, q.device, ops.name, q.dtype)
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


def _describe_all(x: Any) -> str:
    """As ``describe``, for tensors, several of them, and what is printed whole."""
    if isinstance(x, Mapping):
        return ", ".join(f"{name}: {describe(value)}" for name, value in x.items())
    if isinstance(x, tuple):
        return ", ".join(map(describe, x))
    return describe(x) if isinstance(x, Tensor) else repr(x)


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
    for name, values in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        for x in values.values() if isinstance(values, Mapping) else (values,):
            if isinstance(x, DTensor):
                return f"{name}: found a DTensor; a plain tensor, as its to_local() is, works"
    if q.ndim != 4 or q.shape[2:] != (heads, config.head_dim):
        return (
            f"q: found shape {tuple(q.shape)}; [batch, local tokens, num_heads={heads}, "
            f"head_dim={config.head_dim}] works"
        )
    if q.dtype not in DTYPES or q.is_meta:
        return f"q: found {describe(q)}; data in one of {DTYPES} works"
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
        if not isinstance(given, (Tensor, Mapping)):
            return f"{name}: found {describe(given)}; a mapping from {branches} works"
        if not isinstance(given, Tensor) and set(given) != set(branches):
            return f"{name}: found branches {tuple(given)}; exactly {branches} work"
        tensors = {"": given} if isinstance(given, Tensor) else given
        expected = (*q.shape[:2], config.num_kv_heads, width)
        for branch, x in tensors.items():
            label = f"{name}[{branch!r}]" if branch else name
            if not is_plain(x):
                return f"{label}: found {describe(x)}; a tensor works"
            if x.shape != expected:
                return f"{label}: found shape {tuple(x.shape)}; {tuple(expected)} works"
            if x.dtype != q.dtype or x.device != q.device:
                return (
                    f"{label}: found {x.dtype} on {x.device}; the {q.dtype} on {q.device} of q "
                    "works"
                )
    expected = (*q.shape[:3], len(config.branches))
    if not is_plain(gates) or gates.shape != expected:
        return f"gates: found {describe(gates)}; shape {tuple(expected)} works"
    if gates.dtype not in DTYPES or gates.device != q.device:
        return f"gates: found {gates.dtype} on {gates.device}; a floating dtype on {q.device} works"
    return _check_rotary(rotary, q, config)


def _check_rotary(rotary: Rotary | None, q: Tensor, config: NSAConfig) -> str | None:
    """What is wrong with how unrotated keys are to be rotated, or None."""
    works = "a RotaryConfig or (cos, sin) works"
    if not config.compress_pre_rope:
        if rotary is None:
            return None
        return (
            f"rotary: found {describe(rotary)} with compress_pre_rope=False, where keys "
            "come rotated; None works (or compress_pre_rope=True and unrotated keys)"
        )
    if isinstance(rotary, RotaryConfig):
        try:
            rotary.rotary_dim(config.head_dim)
        except ValueError as error:
            return str(error)
        return None
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        return f"rotary: found {rotary!r} with compress_pre_rope=True; {works}"
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        if (
            not is_plain(table)
            or table.shape != rotary[0].shape
            or table.ndim != 2
            or not 0 < 2 * table.shape[1] <= config.head_dim
            or table.dtype not in DTYPES
            or table.device != q.device
        ):
            return (
                f"rotary: found {name}, {describe(table)}; cos and sin of one shape [positions, "
                f"rotary_dim/2 up to {config.head_dim // 2}], floating point on {q.device} work"
            )
    return None


def _check_plan(
    plan: Plan, q: Tensor, config: NSAConfig, context: ContextGroup, cu_seqlens: Tensor | None
) -> str | None:
    """What tells that a plan is not of this call, or None."""
    if not isinstance(plan, Plan):
        return f"plan: found {describe(plan)}; one from get_plan, or None, works"
    if cu_seqlens is not None:
        return "cu_seqlens: found beside a plan, which has its own; None works"
    for what, found, works in (
        ("[batch, local tokens]", (plan.batch, plan.local_length), tuple(q.shape[:2])),
        ("(rank, group size)", (plan.rank, plan.size), (context.rank, context.size)),
        ("config", plan.config, config),
        ("device", plan.positions.device, q.device),
    ):
        if found != works:
            return f"plan: found one for {what} {found}; one for {works} works"
    return None


def _check_tables(rotary: Rotary | None, plan: Plan) -> str | None:
    """What keeps tables of cos and sin from rotating the tokens of a plan, or None."""
    if not isinstance(rotary, tuple) or rotary[0].shape[0] >= plan.longest:
        return None
    return (
        f"rotary: found cos and sin of {rotary[0].shape[0]} positions; {plan.longest}, the longest "
        "document's, work"
    )


def _check_compressors(
    k_compressor: nn.Module | None, v_compressor: nn.Module | None, config: NSAConfig
) -> str | None:
    """What is wrong with the compressors given for ``config``, or None."""
    for name, compressor, needed, width in (
        ("k_compressor", k_compressor, config.uses_compression, config.head_dim),
        ("v_compressor", v_compressor, "compressed" in config.branches, config.value_dim),
    ):
        if not needed:
            if compressor is not None:
                return (
                    f"{name}: found {describe(compressor)} with branches="
                    f"{config.branches}, which do not use it; None works"
                )
            continue
        built_in = config.compress != "custom"
        works = "a BlockCompressor" if built_in else "a module of your own"
        if (
            not isinstance(compressor, nn.Module)
            or isinstance(compressor, BlockCompressor) != built_in
        ):
            return (
                f"{name}: found {describe(compressor)} with compress={config.compress!r} "
                f"and branches={config.branches}; {works} works"
            )
        if isinstance(compressor, BlockCompressor):
            for option, value in compressor_options(config, width).items():
                if compressor.options[option] != value:
                    return (
                        f"{name}: found one made for {option}={compressor.options[option]!r}; "
                        f"{option}={value!r} works"
                    )
    return None

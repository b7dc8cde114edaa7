"""Selectors: how the blocks of a query are selected, apart from how they are fetched and attended.

A selector declares which blocks of which keys it reads (``grids``), starts its communication
(``begin``), and returns n blocks for each query and KV head (``select``). It may also return the
output of a branch: NSA selects by its compressed branch. Only the flow calls it; halos, the fetch
and the kernels of the selected branch do not depend on it.

Letters: N local queries, H query heads, G KV heads, D widths, n selected blocks per query, E rows
of a buffer with its halo, C blocks of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from nsa_dist.attention.call import Call, recomputed
from nsa_dist.attention.compressed_parts import begin_parts
from nsa_dist.attention.extended import Extended
from nsa_dist.attention.in_parts import Source, attend_branch, select_by_part
from nsa_dist.checks import describe
from nsa_dist.comm import Work, begin_gather
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.exact import PartSource
from nsa_dist.config import BRANCHES, NSAConfig, RotaryConfig
from nsa_dist.nn.compressor import apply_compressor, compressor_options, is_built_in
from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
from nsa_dist.plan import Grid
from nsa_dist.plan.grid import compression_grid
from nsa_kernels import Backend, QuerySegments
from nsa_kernels.backend import as_gate

# Errors of code that a user wrote. Not Exception: the one by which activation checkpointing ends a
# recomputation early must pass.
USER_CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of a selector for one call's N local queries.

    Attributes:
        blocks: int32 [N, G, n], blocks of each query's document up to the query's own, ascending,
            padded with -1; None if the selected branch is not used.
        output: [N, H, Dv], output of the selector's branch; None if it has no branch.
        lse: [N, H], log-sum-exp of that branch; given with ``output``.
        gathered: by name, tensors whose gradients return to other ranks. If no output depends on
            one of them, it must also be in ``unused``.
        unused: tensors that only select. They get a gradient of zeros, so that their parameters
            and collectives take part in every backward.
        summand: what the backend returned beside ``output`` for the branch's gate. None if it was
            not given the gate, and the gradient goes to ``output``.
    """

    blocks: Tensor | None
    output: Tensor | None = None
    lse: Tensor | None = None
    gathered: Mapping[str, Tensor] = field(default_factory=dict)
    unused: tuple[Tensor, ...] = ()
    summand: Tensor | None = None


class Selector(Protocol):
    """The interface of a selector. It may be a module with its own weights."""

    @property
    def name(self) -> str:
        """A name, which must be equal on all ranks."""

    @property
    def branch(self) -> str | None:
        """The branch whose output ``select`` returns."""

    def grids(self, config: NSAConfig) -> Mapping[str, Grid]:
        """The blocks that it reads, by name; ``Plan.grids`` has the same names."""

    def stated(self) -> Mapping[str, str]:
        """More values, as text by name, that must be equal on all ranks."""

    def problem(self, call: Call) -> str | None:
        """The error if it cannot serve a call, or None."""

    def begin(self, call: Call, extended: Mapping[str, tuple[Tensor, Tensor]]) -> Work[Any]:
        """Compute what it needs from this rank's keys, and begin to gather it.

        What may fail on one rank alone belongs into ``run_agreed``, before anything is sent.

        Args:
            extended: K [E, G, Dk] and V [E, G, Dv] by set, with the halos that ``grids`` needs.
        """

    def select(self, call: Call, q_NHD: Tensor, gathered: Any) -> Selection:
        """Select blocks. Sends nothing; an error on one rank is raised on every rank.

        Args:
            gathered: the result of ``begin``.
        """


def selector_problem(selector: Selector, config: NSAConfig) -> str | None:
    """The error if ``selector`` does not serve all branches of ``config``, or None."""
    given = {"selected", "window", selector.branch}
    if given.issuperset(config.branches):
        return None
    possible = tuple(branch for branch in BRANCHES if branch in given)
    return (
        f"branches must be among {possible} with selector {selector.name!r}, got {config.branches}"
    )


def exact_selector_problem(selector: Selector | None, exact_gradients: int) -> str | None:
    """The error if ``selector`` does not serve ``exact_gradients``, or None."""
    if not exact_gradients or selector is None or type(selector) is CompressedSelector:
        return None
    return (
        "exact_gradients must be 0 with a selector of your own (its blocks' gradients add in its "
        f"own order), got {exact_gradients} with selector {selector.name!r}"
    )


def run_selector(
    selector: Selector, call: Call, q_NHD: Tensor, gathered: Any, gate_NH: Tensor | None = None
) -> Selection:
    """The selection of ``selector``. A collective, except with NSA's own.

    Args:
        gate_NH: the gate of the selector's branch, for the ``select`` of NSA's own. Others know
            none, and combine weighs their output.

    Raises:
        ValueError: on every rank, if the selection of one is not what the flow needs.
    """

    # A subclass with a choice of its own knows no gate.
    overridden = type(selector).select is not CompressedSelector.select

    def select() -> Selection:
        if isinstance(selector, CompressedSelector) and not overridden:
            selection = selector.select(call, q_NHD, gathered, gate_NH)
        else:
            selection = selector.select(call, q_NHD, gathered)
        _check_selection(selection, selector, call.config, q_NHD)
        return selection

    if isinstance(selector, CompressedSelector):  # It fails on every rank or on none.
        return select()
    return run_agreed(select, call, f"selector {selector.name!r}")


def _check_selection(
    selection: Selection, selector: Selector, config: NSAConfig, q_NHD: Tensor
) -> None:
    """Raise ValueError unless a selection has what its branches and the fetch need."""
    of, blocks = f"of selector {selector.name!r}", selection.blocks
    used, rows = "selected" in config.branches, (len(q_NHD), config.num_kv_heads)
    if (blocks is not None) != used:
        must = "a tensor" if used else "None"
        got = "None" if blocks is None else describe(blocks)
        raise ValueError(f"blocks {of} must be {must} with branches={config.branches}, got {got}")
    if blocks is not None and (
        blocks.ndim != 3 or blocks.shape[:2] != rows or blocks.dtype != torch.int32
    ):
        must = f"torch.int32 of shape {(*rows, 'n')}"
        raise ValueError(f"blocks {of} must be {must}, got {describe(blocks)}")
    shape = tuple(q_NHD.shape[:2])
    for name, tensor, last in (
        ("output", selection.output, (config.value_dim,)),
        ("lse", selection.lse, ()),
    ):
        if selector.branch not in config.branches:
            if tensor is not None:
                raise ValueError(f"{name} {of} must be None, got {describe(tensor)}")
        elif tensor is None or tensor.shape != shape + last:
            got = "None" if tensor is None else describe(tensor)
            raise ValueError(f"{name} {of} must have shape {shape + last}, got {got}")


@dataclass(frozen=True, eq=False)
class CompressedSelector:
    """NSA's own selector: it sums the compressed branch's probabilities by block and group of heads
    (Eq. 8 to 11).

    Args:
        k_compressor, v_compressor: ``BlockCompressor`` modules, or with ``compress="custom"`` any
            modules that map [C, G, l, D] to [C, G, D]. Only the compressed branch needs the second.
    """

    k_compressor: nn.Module | None = None
    v_compressor: nn.Module | None = None
    name = "compressed"
    branch = "compressed"

    def grids(self, config: NSAConfig) -> Mapping[str, Grid]:
        """A single grid, ``compressed``, if the compressed or the selected branch is used."""
        return {"compressed": compression_grid(config)} if config.uses_compression else {}

    def stated(self) -> Mapping[str, str]:
        """Empty: compressors are weights."""
        return {}

    def problem(self, call: Call) -> str | None:
        """The error in the compressors, or None."""
        return compressors_problem(self.k_compressor, self.v_compressor, call.config)

    def begin(self, call: Call, extended: Mapping[str, tuple[Tensor, Tensor]]) -> Work[Any]:
        """Compress own blocks (Eq. 7) and begin to gather all ranks': K [C, G, Dk], V [C, G, Dv].

        V is empty ([C, G, 0]) if only selection reads the compressed keys. With
        ``exact_gradients`` both are in a ``PartSource``.
        """
        config, blocks = call.config, call.plan.grids["compressed"]
        rows, block = blocks.own_rows, config.compress_block
        k_compressor, v_compressor = self.k_compressor, self.v_compressor
        assert k_compressor is not None

        def rotated(k_own: Tensor) -> Tensor:
            if not config.compress_pre_rope:
                return k_own
            middle = blocks.own_index * config.compress_stride + (block - 1) // 2
            return apply_rotary(k_own, *cos_sin(call, middle))

        if call.plan.parts is not None:
            assert isinstance(extended, Extended)
            source = extended.by_part("compressed", "compressed")
            return begin_parts(call, k_compressor, v_compressor, source, rotated)
        k_ext, v_ext = extended["compressed"]

        def own_blocks() -> tuple[Tensor, Tensor]:
            k = apply_compressor(k_compressor, k_ext, rows, block, call.backend)
            if v_compressor is None:
                return k, k.new_zeros(*k.shape[:2], 0)
            return k, apply_compressor(v_compressor, v_ext, rows, block, call.backend)

        custom = config.compress == "custom"
        k_own, v_own = run_agreed(own_blocks, call, "custom compressor") if custom else own_blocks()
        return begin_gather(rotated(k_own), v_own, blocks, call.channel)

    def select(
        self,
        call: Call,
        q_NHD: Tensor,
        gathered: Source,
        gate_NH: Tensor | None = None,
    ) -> Selection:
        """The compressed branch, and the blocks with its highest probabilities.

        Args:
            gate_NH: the branch's gate, if the backend takes it; the selection then has a summand.
        """
        ops, config, segments = call.backend, call.config, call.plan.segments
        if isinstance(gathered, PartSource):
            return _select_in_parts(call, q_NHD, gathered, gate_NH)
        attend = partial(recomputed, call, "compressed", ops.compressed_attention)
        k, v = gathered
        return choose_by_compressed(ops, config, segments, q_NHD, k, v, gate_NH, attend)


def _select_in_parts(
    call: Call, q_NHD: Tensor, source: PartSource, gate_NH: Tensor | None
) -> Selection:
    """``CompressedSelector.select`` with ``exact_gradients``."""
    ops = call.backend

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: QuerySegments,
        gate: Tensor | None = None,
        **grid: Any,
    ) -> tuple[Tensor, ...]:
        read = replace(source, tensors=(k, v))
        return attend_branch(call, "compressed", ops.compressed_attention, q, read, gate, **grid)

    k_CGD, v_CGD = source.tensors
    config, segments, select = call.config, call.plan.segments, partial(select_by_part, call)
    in_use = "compressed" in config.branches
    # Without a branch of its own nothing that it computes has a gradient.
    with torch.set_grad_enabled(in_use and torch.is_grad_enabled()):
        selection = choose_by_compressed(
            ops, config, segments, q_NHD, k_CGD, v_CGD, gate_NH, attend, select
        )
    return replace(
        selection,
        gathered={"compressed blocks": source.ticket},
        unused=() if in_use else (source.ticket,),
    )


def choose_by_compressed(
    ops: Backend,
    config: NSAConfig,
    segments: QuerySegments,
    q_NHD: Tensor,
    k_CGD: Tensor,
    v_CGD: Tensor,
    gate_NH: Tensor | None = None,
    attend: Callable[..., tuple[Tensor, ...]] | None = None,
    select: Callable[..., Tensor] | None = None,
) -> Selection:
    """Attend to compressed keys and select the blocks with the highest probabilities.

    Args:
        attend, select: what runs in the place of ``ops.compressed_attention`` and
            ``ops.select_blocks``.
    """
    attend = ops.compressed_attention if attend is None else attend
    select = ops.select_blocks if select is None else select
    grid: dict[str, Any] = {
        "block": config.compress_block,
        "stride": config.compress_stride,
        "scale": config.softmax_scale,
    }
    in_use = "compressed" in config.branches
    q, k, v = q_NHD, k_CGD, v_CGD
    if not in_use:  # Only the log-sum-exp is needed; pass keys as values.
        q, k, v = q.detach(), k.detach(), k.detach()
    output, lse, *summand = attend(q, k, v, segments, **grid, **as_gate(gate_NH))
    blocks = None
    if "selected" in config.branches:
        with torch.no_grad():
            blocks = select(
                q_NHD,
                k_CGD,
                lse,
                segments,
                select_block=config.select_block,
                num_selected=config.num_selected,
                num_init_blocks=config.num_init_blocks,
                num_local_blocks=config.num_local_blocks,
                **grid,
            )
    return Selection(
        blocks,
        output if in_use else None,
        lse if in_use else None,
        gathered={"compressed blocks": k_CGD},
        unused=() if in_use else (k_CGD,),
        summand=summand[0] if summand else None,
    )


def cos_sin(call: Call, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for unrotated keys at ``positions`` in their documents."""
    assert call.rotary is not None
    if isinstance(call.rotary, RotaryConfig):
        return rotary_cos_sin(call.rotary, call.config.head_dim, positions)
    cos, sin = call.rotary
    return cos[positions], sin[positions]


def compressors_problem(
    k_compressor: nn.Module | None, v_compressor: nn.Module | None, config: NSAConfig
) -> str | None:
    """The error in compressors for ``config``, or None."""
    for name, compressor, needed, width in (
        ("k_compressor", k_compressor, config.uses_compression, config.head_dim),
        ("v_compressor", v_compressor, "compressed" in config.branches, config.value_dim),
    ):
        if not needed:
            if compressor is not None:
                return (
                    f"{name} must be None with branches={config.branches}, which do not use it, "
                    f"got {describe(compressor)}"
                )
            continue
        built_in = config.compress != "custom"
        must = "a BlockCompressor" if built_in else "a module of your own"
        if not isinstance(compressor, nn.Module) or is_built_in(compressor) != built_in:
            return (
                f"{name} must be {must} with compress={config.compress!r} and "
                f"branches={config.branches}, got {describe(compressor)}"
            )
        if built_in:
            options: Any = compressor.options
            for option, value in compressor_options(config, width).items():
                got = options[option]
                if got != value:
                    return f"{name} must be made for {option}={value!r}, got one for {got!r}"
    return None


def run_agreed(compute: Callable[[], T], call: Call, what: str) -> T:
    """Run a user's code. An error on one rank is raised on every rank. A collective.

    Args:
        compute: the code. It must send nothing.
        what: what it is, in errors.

    Raises:
        ValueError: on every rank of several; on one rank the error passes as it is.
    """
    if call.channel.group.size == 1:
        return compute()
    statement = call.plan.statement.also(call=f"forward of {what}")
    try:
        result = compute()
    except USER_CODE_ERRORS as error:
        problem = str(error)
        if what not in problem:
            problem = f"{what} raised {type(error).__name__}: {error}"
        agree(statement, problem, call.channel.group, call.channel.counter, error)
        raise
    agree(statement, None, call.channel.group, call.channel.counter)
    return result

"""How a query's blocks are chosen, apart from how they are fetched and attended to.

A selector declares which blocks of which keys it reads (``grids``), sends what it must (``begin``)
and names n blocks for each query and KV head (``select``). It may return a branch's output as well:
what NSA chooses by is its compressed branch. The flow calls it; halos, the fetch and the kernels of
the selected branch know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nsa_dist.attention.call import Call
from nsa_dist.checks import describe
from nsa_dist.comm import Work, begin_gather
from nsa_dist.comm.agreement import agree
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.nn.compressor import BlockCompressor, apply_compressor, compressor_options
from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
from nsa_dist.plan import Grid
from nsa_dist.plan.grid import all_grids
from nsa_kernels import Backend, QuerySegments

# What a module of the user's may raise. Checkpointing ends a recomputation by an exception that is
# none of these.
USERS_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a selector gives for one call's N local queries.

    Attributes:
        blocks: int32 [N, G, n], blocks of each query's document, ascending, then -1; None where
            the selected branch is not used. Each query's own block and those before it only.
        output: [N, H, Dv] of the selector's branch, and ``lse`` [N, H]; None without one.
        gathered: by name, tensors whose gradients return to other ranks. Where none of the outputs
            depends on one of them, it must be in ``unused``, too.
        unused: tensors that only choose. They get a gradient of zeros, which keeps parameters and
            collectives behind them in every backward.
    """

    blocks: Tensor | None
    output: Tensor | None = None
    lse: Tensor | None = None
    gathered: Mapping[str, Tensor] = field(default_factory=dict)
    unused: tuple[Tensor, ...] = ()


class Selector(Protocol):
    """What the flow asks of whoever chooses blocks. It may be a module with weights of its own."""

    @property
    def name(self) -> str:
        """Told to the other ranks, which must have the same."""

    @property
    def branch(self) -> str | None:
        """The branch whose output ``select`` returns."""

    def grids(self, config: NSAConfig) -> Mapping[str, Grid]:
        """The blocks that it reads, by name; the plan has them in ``grids`` by these names."""

    def stated(self) -> Mapping[str, str]:
        """More that must be equal on all ranks, printed by name."""

    def problem(self, call: Call) -> str | None:
        """What keeps it from serving a call, or None."""

    def begin(self, call: Call, extended: Mapping[str, tuple[Tensor, Tensor]]) -> Work[Any]:
        """Make what it needs of this rank's keys, and begin to gather it.

        Args:
            extended: K [E, G, Dk] and V [E, G, Dv] by set, with the halo that ``grids`` asks for.
        """

    def select(self, call: Call, q_NHD: Tensor, gathered: Any) -> Selection:
        """Choose, of what ``begin``'s work gave when it was finished. Sends nothing."""


@dataclass(frozen=True, eq=False)
class CompressedSelector:
    """NSA's: the probabilities of the compressed branch, summed over blocks and groups (Eq. 9-12).

    Args:
        k_compressor, v_compressor: ``BlockCompressor`` modules, or with ``compress="custom"`` any
            modules [C, G, l, D] -> [C, G, D]. The second is for the compressed branch only.
    """

    k_compressor: nn.Module | None = None
    v_compressor: nn.Module | None = None
    name = "compressed"
    branch = "compressed"

    def grids(self, config: NSAConfig) -> Mapping[str, Grid]:
        """One, ``compressed``, where the compressed or the selected branch is used."""
        return {k: grid for k, grid in all_grids(config).items() if k == "compressed"}

    def stated(self) -> Mapping[str, str]:
        """Nothing: compressors are weights."""
        return {}

    def problem(self, call: Call) -> str | None:
        """What is wrong with the compressors."""
        return compressors_problem(self.k_compressor, self.v_compressor, call.config)

    def begin(
        self, call: Call, extended: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Work[tuple[Tensor, Tensor]]:
        """Compress own blocks (Eq. 7) and begin to gather all ranks': K [C, G, Dk], V [C, G, Dv].

        V is empty ([C, G, 0]) where only selection reads the compressed keys.
        """
        config, blocks = call.config, call.plan.grids["compressed"]
        k_ext, v_ext = extended["compressed"]
        rows, block = blocks.own_rows, config.compress_block
        k_compressor, v_compressor = self.k_compressor, self.v_compressor
        assert k_compressor is not None

        def own_blocks() -> tuple[Tensor, Tensor]:
            k = apply_compressor(k_compressor, k_ext, rows, block, call.backend)
            if v_compressor is None:
                return k, k.new_zeros(*k.shape[:2], 0)
            return k, apply_compressor(v_compressor, v_ext, rows, block, call.backend)

        custom = config.compress == "custom" and call.channel.group.size > 1
        k_own, v_own = _agreed(own_blocks, call) if custom else own_blocks()
        if config.compress_pre_rope:
            middle = blocks.own_index * config.compress_stride + (block - 1) // 2
            k_own = apply_rotary(k_own, *cos_sin(call, middle))
        return begin_gather(k_own, v_own, blocks, call.channel)

    def select(self, call: Call, q_NHD: Tensor, gathered: tuple[Tensor, Tensor]) -> Selection:
        """The compressed branch, and the blocks that it weighs most."""
        k_CGD, v_CGD = gathered
        return choose_by_compressed(
            call.backend, call.config, call.plan.segments, q_NHD, k_CGD, v_CGD
        )


def choose_by_compressed(
    ops: Backend,
    config: NSAConfig,
    segments: QuerySegments,
    q_NHD: Tensor,
    k_CGD: Tensor,
    v_CGD: Tensor,
) -> Selection:
    """Attend to compressed keys and choose the blocks of the highest probability."""
    grid: dict[str, Any] = {
        "block": config.compress_block,
        "stride": config.compress_stride,
        "scale": config.softmax_scale,
    }
    in_use = "compressed" in config.branches
    q, k, v = q_NHD, k_CGD, v_CGD
    if not in_use:  # Only the log-sum-exp is wanted; keys stand in for values.
        q, k, v = q.detach(), k.detach(), k.detach()
    output, lse = ops.compressed_attention(q, k, v, segments, **grid)
    blocks = None
    if "selected" in config.branches:
        with torch.no_grad():
            blocks = ops.select_blocks(
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
    )


def cos_sin(call: Call, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What rotates keys that came unrotated, at ``positions`` in their documents."""
    assert call.rotary is not None
    if isinstance(call.rotary, RotaryConfig):
        return rotary_cos_sin(call.rotary, call.config.head_dim, positions)
    cos, sin = call.rotary
    return cos[positions], sin[positions]


def compressors_problem(
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
                    f"{name} must be None with branches={config.branches}, which do not use it, "
                    f"got {describe(compressor)}"
                )
            continue
        built_in = config.compress != "custom"
        must = "a BlockCompressor" if built_in else "a module of your own"
        if (
            not isinstance(compressor, nn.Module)
            or isinstance(compressor, BlockCompressor) != built_in
        ):
            return (
                f"{name} must be {must} with compress={config.compress!r} and "
                f"branches={config.branches}, got {describe(compressor)}"
            )
        if isinstance(compressor, BlockCompressor):
            for option, value in compressor_options(config, width).items():
                got = compressor.options[option]
                if got != value:
                    return f"{name} must be made for {option}={value!r}, got one for {got!r}"
    return None


def _agreed(compress: Callable[[], tuple[Tensor, Tensor]], call: Call) -> tuple[Tensor, Tensor]:
    """What the user's modules return; an error of one rank's is raised on every rank."""
    statement = call.plan.statement.also(call="forward of custom compressors")
    try:
        result = compress()
    except USERS_ERRORS as error:
        said = f"custom compressor raised {type(error).__name__}: {error}"
        problem = str(error) if str(error).startswith("custom compressor ") else said
        agree(statement, problem, call.channel.group, call.channel.counter, error)
        raise
    agree(statement, None, call.channel.group, call.channel.counter)
    return result

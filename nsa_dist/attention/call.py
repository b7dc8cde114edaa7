"""The setup of an attention layer, and one call of it without its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_dist.attention.checks import plan_problem
from nsa_dist.attention.plan_cache import find_plan
from nsa_dist.attention.ranges import RangedBackend, profiled
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.comm.hosts import find_nodes
from nsa_dist.comm.nodes import ranks_per_node_problem
from nsa_dist.config import BRANCHES, NSAConfig, RotaryConfig, split_options_problem
from nsa_dist.crossover import hint_at_crossover
from nsa_dist.plan import Grid, Plan
from nsa_dist.plan.grid import all_grids, key_sets
from nsa_dist.plan.statement import Statement
from nsa_kernels import Backend, get_backend

Rotary = RotaryConfig | tuple[Tensor, Tensor]

HEADS_IN_FLIGHT = 2
"""KV heads whose fetched blocks are needed at a time: one computes, the next one's travel."""

# Without what guards it from compilers and modes, which takes the host longer than the search.
_find_plan_unguarded = inspect.unwrap(find_plan)


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that the calls of a layer have in common, built once with the layer.

    Attributes:
        config: the hyperparameters.
        layout: name of the layout by which the sequence is split.
        group: the ranks that share the sequence.
        backend: name of the backend; "auto" depends on the device of each call.
        counter: counter of sent bytes.
        rotary: rotary embedding of unrotated keys; None if keys are already rotated.
        grids: all grids of a call, including the blocks to select from.
        key_sets: the sets of keys and values that a call reads.
        fetch_again: whether backward fetches selected remote blocks again.
        fetch: which remote blocks are fetched, "chosen" or "full".
        recompute_branches: the branches whose forward backward computes again.
        ranks_per_node: consecutive ranks that share a node; None as the group or its hosts say.
        exact_gradients: up to how many ranks gradients have the same bits, or 0.
    """

    config: NSAConfig
    layout: str
    group: ContextGroup
    backend: str
    counter: CommunicationCounter
    rotary: Rotary | None
    grids: Mapping[str, Grid]
    key_sets: tuple[str, ...]
    fetch_again: bool = False
    recompute_branches: tuple[str, ...] = ()
    fetch: str = "chosen"
    ranks_per_node: int | None = None
    exact_gradients: int = 0

    def refuse(
        self, problem: str, stated: Mapping[str, str], cause: Exception | None = None
    ) -> NoReturn:
        """Raise ValueError on every rank of the group for an error in this rank's call.

        It is for errors before there is a plan; the other ranks receive it when they agree.

        Args:
            stated: this rank's input as text, by name; the error shows it for every rank.
        """
        refuse(problem, stated, self.group, self.counter, cause)


def make_setup(
    config: NSAConfig,
    layout: str,
    group: ContextGroup,
    backend: str,
    counter: CommunicationCounter,
    *,
    rotary: Rotary | None = None,
    selector_grids: Mapping[str, Grid] | None = None,
    fetch_again: bool | None = None,
    recompute_branches: Sequence[str] = (),
    fetch: str = "chosen",
    ranks_per_node: int | None = None,
    exact_gradients: int = 0,
) -> Setup:
    """A setup from what its layer is built with.

    Args:
        selector_grids: the blocks that the selector reads; None for NSA's own selector.
        fetch_again, recompute_branches, fetch, ranks_per_node, exact_gradients: as for the layer
            (``options_problem``).
    """
    grids = all_grids(config, selector_grids)
    sets = key_sets(config, grids)
    again = fetches_again(config, fetch_again, group.size)
    recompute = tuple(branch for branch in BRANCHES if branch in recompute_branches)
    return Setup(
        *(config, layout, group, backend, counter, rotary, grids, sets, again, recompute, fetch),
        ranks_per_node,
        exact_gradients,
    )


def options_problem(config: NSAConfig, group: ContextGroup, **options: Any) -> str | None:
    """The error in the options of a layer over ``group`` that change how it runs alone, not what it
    computes, or None."""
    ranks_per_node = options.pop("ranks_per_node")
    of_mesh = group.node_of_rank is not None
    problem = split_options_problem(config, **options, size=group.size)
    problem = problem or ranks_per_node_problem(ranks_per_node, group.size, of_mesh=of_mesh)
    if problem is None and options["exact_gradients"] and (ranks_per_node or 1) > 1:
        return (
            "ranks_per_node must be None or 1 with exact_gradients (a node's sums would follow "
            f"from its ranks), got {ranks_per_node!r}"
        )
    return problem


def fetches_again(config: NSAConfig, fetch_again: bool | None, size: int) -> bool:
    """Whether backward fetches blocks again, over ``size`` ranks. None: where it saves memory."""
    if fetch_again is None:
        fetch_again = config.num_kv_heads > HEADS_IN_FLIGHT
    return fetch_again and size > 1 and "selected" in config.branches


def recomputed(
    call: Call, branch: str, function: Callable[..., tuple[Tensor, ...]], *args: Any, **options: Any
) -> tuple[Tensor, ...]:
    """``function(*args, **options)``, of which a branch to recompute keeps the arguments alone."""
    if branch not in call.recompute_branches or not torch.is_grad_enabled():
        return function(*args, **options)
    result: tuple[Tensor, ...] = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, **options
    )
    return result


@dataclass(frozen=True, eq=False)
class Call:
    """One call, checked on this rank by ``make_call``.

    Attributes:
        config: the hyperparameters.
        backend: the backend.
        plan: which rank holds and sends what.
        channel: group and counter of the call's messages.
        rotary: rotary embedding of unrotated keys; None if keys are already rotated.
        fetch_again, recompute_branches, fetch, ranks_per_node: as of ``Setup``.
    """

    config: NSAConfig
    backend: Backend
    plan: Plan
    channel: Channel
    rotary: Rotary | None = None
    fetch_again: bool = False
    recompute_branches: tuple[str, ...] = ()
    fetch: str = "chosen"
    ranks_per_node: int | None = None

    def with_nodes(self) -> Call:
        """The same call, whose channel knows which ranks share a node. A collective.

        It comes after the ranks have agreed on the call. With ``exact_gradients`` no level of links
        may change the order of sums: there is one.
        """
        if "selected" not in self.config.branches or self.plan.parts is not None:
            return self
        channel = self.channel
        nodes = find_nodes(channel.group, self.ranks_per_node, channel.about)
        return self if nodes is None else replace(self, channel=replace(channel, nodes=nodes))


def refuse(
    problem: str,
    stated: Mapping[str, str],
    group: ContextGroup,
    counter: CommunicationCounter,
    cause: Exception | None = None,
) -> NoReturn:
    """As ``Setup.refuse``, before there is a setup."""
    agree(Statement({"call": "forward", **stated}), problem, group, counter, cause)
    raise AssertionError("agree() raises if a rank has a problem")


def check_backend(backend: str, config: NSAConfig, device: torch.device | str | None) -> None:
    """Raise ValueError if ``backend`` cannot compute ``config`` for a layer built on ``device``.

    A layer built on the host may be moved to a GPU later; one built on a GPU stays there.
    """
    placed = device if device is not None and torch.device(device).type == "cuda" else None
    refused = get_backend(backend, placed).refuses(None, config.kernel_options)
    if refused is not None:
        raise ValueError(refused)


def _backend_of(name: str, device: torch.device) -> Backend:
    """`get_backend`, which is asked once of a GPU; named in traces while they are recorded."""
    compiles = torch.compiler.is_compiling()
    asks = compiles or device.type != "cuda"
    backend = get_backend(name, device) if asks else _on_gpu(name, device)
    return cast(Backend, RangedBackend(backend)) if profiled() else backend


@cache
def _on_gpu(name: str, device: torch.device) -> Backend:
    return get_backend(name, device)


def make_call(
    setup: Setup,
    rows: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    computes_in: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    plan: Plan | None = None,
    stated: Mapping[str, str],
) -> Call:
    """Check one call on this rank and make its plan.

    A rank that finds an error raises it here. The others raise it in ``attend``, where the ranks
    agree on the call.

    Args:
        rows: [batch, local tokens] of the input.
        device, dtype: of the input.
        computes_in: dtype of the queries, if autocast changes it.
        plan: an existing plan; replaces the layout and ``cu_seqlens``.
        stated: more values, as text by name, that must be equal on all ranks.

    Raises:
        ValueError: for an error on this rank.
    """
    config, group = setup.config, setup.group
    computes_in = computes_in or dtype
    try:
        backend = _backend_of(setup.backend, device)
    except ValueError as error:
        setup.refuse(str(error), {**stated, "backend": repr(setup.backend)}, error)
    problem = backend.refuses(computes_in, config.kernel_options)
    if plan is not None:
        problem = problem or plan_problem(
            plan, rows, device, config, group, cu_seqlens, setup.grids, setup.exact_gradients
        )
    if problem is not None:
        setup.refuse(problem, stated)
    if plan is None:
        guarded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        plan = (find_plan if guarded else _find_plan_unguarded)(
            config,
            setup.layout,
            group,
            batch=rows[0],
            local_length=rows[1],
            cu_seqlens=cu_seqlens,
            dtype=dtype,
            device=device,
            counter=setup.counter,
            inputs={**stated, "backend": repr(backend.name)},
            grids=setup.grids,
            exact_gradients=setup.exact_gradients,
        )
    if group.rank == 0:
        hint_at_crossover(plan.longest, device, backend.name, computes_in)
    return Call(
        config,
        backend,
        plan,
        Channel(group, setup.counter, plan),
        setup.rotary,
        setup.fetch_again,
        setup.recompute_branches,
        setup.fetch,
        setup.ranks_per_node,
    )

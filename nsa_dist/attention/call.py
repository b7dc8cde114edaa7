"""What a call of the attention is, apart from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor

from nsa_dist.attention.checks import plan_problem
from nsa_dist.attention.plan_cache import find_plan
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.config import NSAConfig, RotaryConfig
from nsa_dist.crossover import hint_at_crossover
from nsa_dist.plan import Grid, Plan
from nsa_dist.plan.grid import all_grids, key_sets
from nsa_dist.plan.statement import Statement
from nsa_kernels import Backend, get_backend

Rotary = RotaryConfig | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Setup:
    """What all calls of a layer have in common; built once, with the layer.

    Attributes:
        config: what is computed.
        layout: how the sequence is split, by name.
        group: the ranks that share it.
        backend: what computes it, by name; "auto" is decided by each call's device.
        counter: where moved bytes are counted.
        rotary: how keys that come unrotated are rotated; None where they come rotated.
        selector_grids: the blocks that choosing reads; None for NSA's.
    """

    config: NSAConfig
    layout: str
    group: ContextGroup
    backend: str
    counter: CommunicationCounter
    rotary: Rotary | None = None
    selector_grids: Mapping[str, Grid] | None = None

    @cached_property
    def grids(self) -> Mapping[str, Grid]:
        """Every grid of a call, the blocks to choose among included."""
        return all_grids(self.config, self.selector_grids)

    @cached_property
    def key_sets(self) -> tuple[str, ...]:
        """The sets of keys and values that a call reads."""
        return key_sets(self.config, self.grids)

    def refuse(
        self, problem: str, stated: Mapping[str, str], cause: Exception | None = None
    ) -> NoReturn:
        """Raise ValueError, on every rank of the group, for what is wrong with this rank's call.

        For what is found before there is a plan: the others meet this message in their agreement.

        Args:
            stated: this rank's input, printed by name, beside which errors show the others'.
        """
        refuse(problem, stated, self.group, self.counter, cause)


@dataclass(frozen=True, eq=False)
class Call:
    """One call, found fit on this rank by ``make_call``.

    Attributes:
        config: what is computed.
        backend: what computes it.
        plan: who holds and sends what.
        channel: for the call's messages.
        rotary: how keys that come unrotated are rotated; None where they come rotated.
    """

    config: NSAConfig
    backend: Backend
    plan: Plan
    channel: Channel
    rotary: Rotary | None = None


def refuse(
    problem: str,
    stated: Mapping[str, str],
    group: ContextGroup,
    counter: CommunicationCounter,
    cause: Exception | None = None,
) -> NoReturn:
    """As ``Setup.refuse``, where there is no setup yet."""
    agree(Statement({"call": "forward", **stated}), problem, group, counter, cause)
    raise AssertionError("ranks that have a problem agree on nothing")


def check_backend(backend: str, config: NSAConfig, device: torch.device | str | None) -> None:
    """Raise ValueError unless ``backend`` computes ``config``, for a layer built on ``device``.

    A layer made on the host may be moved to a GPU; one made there stays.
    """
    placed = device if device is not None and torch.device(device).type == "cuda" else None
    refused = get_backend(backend, placed).refuses(None, config.kernel_options)
    if refused is not None:
        raise ValueError(refused)


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
    """One call's backend and plan. The ranks have yet to agree on it: see ``attend``.

    Args:
        rows: [batch, local tokens] of the input, ``device`` and ``dtype`` where it is and what of.
        computes_in: the dtype of queries, where autocast makes it another.
        plan: one that the caller has; it stands for the layout and ``cu_seqlens``.
        stated: more of the call, printed by name, that must be equal on all ranks.

    Raises:
        ValueError: on every rank of the group, for what is wrong on this one.
    """
    config, group = setup.config, setup.group
    computes_in = computes_in or dtype
    try:
        backend = get_backend(setup.backend, device)
    except ValueError as error:
        setup.refuse(str(error), {**stated, "backend": repr(setup.backend)}, error)
    problem = backend.refuses(computes_in, config.kernel_options)
    if plan is not None:
        problem = problem or plan_problem(
            plan, rows, device, config, group, cu_seqlens, setup.grids
        )
    if problem is not None:
        setup.refuse(problem, stated)
    if plan is None:
        plan = find_plan(
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
        )
    if group.rank == 0:
        hint_at_crossover(plan.longest, device, backend.name, computes_in)
    return Call(config, backend, plan, Channel(group, setup.counter, plan), setup.rotary)

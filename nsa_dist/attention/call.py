"""What one call of the attention is, apart from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from nsa_dist.plan.grid import all_grids
from nsa_dist.plan.statement import Statement
from nsa_kernels import Backend, get_backend

Rotary = RotaryConfig | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """What is computed, where, and by which plan. Made and checked once, by ``make_call``.

    Attributes:
        config: what is computed.
        backend: what computes it.
        group: the ranks that share the sequence.
        counter: where moved bytes are counted.
        plan: who holds and sends what.
        rotary: how keys that come unrotated are rotated; None where they come rotated.
    """

    config: NSAConfig
    backend: Backend
    group: ContextGroup
    counter: CommunicationCounter
    plan: Plan
    rotary: Rotary | None = None

    @property
    def channel(self) -> Channel:
        """For this call's messages."""
        return Channel(self.group, self.counter, self.plan)


def refuse(
    problem: str, group: ContextGroup, counter: CommunicationCounter, cause: Exception | None = None
) -> NoReturn:
    """Raise, on every rank of the group, what is wrong with this rank's call.

    For what is found before a plan can be: the others meet this message in their own agreement.
    """
    agree(Statement({"call": "forward"}), problem, group, counter, cause)
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
    config: NSAConfig,
    layout: str,
    group: ContextGroup,
    backend: str,
    counter: CommunicationCounter,
    *,
    rows: tuple[int, int],
    like: Tensor,
    dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    plan: Plan | None = None,
    selector_grids: Mapping[str, Grid] | None = None,
    rotary: Rotary | None = None,
    stated: Mapping[str, str] | None = None,
    problem: str | None = None,
) -> Call:
    """One call, found fit on this rank; the ranks have yet to agree on it.

    Args:
        rows: [batch, local tokens].
        like: has the device and the dtype of the input.
        dtype: of queries, where autocast makes it another than that of ``like``.
        plan: one that the caller has; it stands for ``layout`` and ``cu_seqlens``.
        selector_grids: the blocks that choosing needs; None for NSA's.
        stated: more of the call, printed by name, that must be equal on all ranks.
        problem: what the caller found wrong with its input.

    Raises:
        ValueError: on every rank of the group, once the others agree, for this rank's problem.
    """
    try:
        ops = get_backend(backend, like.device)
        problem = problem or ops.refuses(dtype or like.dtype, config.kernel_options)
        name = ops.name
    except ValueError as error:
        problem, name = problem or str(error), backend
    if plan is None:
        plan = find_plan(
            config,
            layout,
            group,
            batch=rows[0],
            local_length=rows[1],
            cu_seqlens=cu_seqlens,
            dtype=like.dtype,
            device=like.device,
            counter=counter,
            inputs={**(stated or {}), "backend": name},
            problem=problem,
            selector_grids=selector_grids,
        )
    else:
        grids = all_grids(config, selector_grids)
        problem = problem or plan_problem(
            plan, rows, like.device, config, group, cu_seqlens, tuple(grids)
        )
        if problem is not None:
            refuse(problem, group, counter)
    if group.rank == 0:
        hint_at_crossover(plan.longest, like.device, name, dtype or like.dtype)
    return Call(config, ops, group, counter, plan, rotary)

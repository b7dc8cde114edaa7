"""Ranks compare what they are about to do before any message whose size depends on it.

The first message of every forward and of every backward over several ranks, whether its plan is new
or cached, is an all-reduce of two numbers: the largest and the smallest fingerprint of what the
ranks state. Its size depends on nothing, so ranks that part (other documents, another config,
another dtype, a forward against a backward) meet in it, and not in a halo or a fetch that one of
them expects to have another size, which ends a process under gloo and hangs or overwrites memory
under NCCL. A rank that has found its own input bad sends 0 for a fingerprint. Only where the
numbers differ is more exchanged: each rank's values and problem, so that every rank raises the same
error and none waits for the others.

What it costs. 16 bytes and one wait of the host, in forward and in backward. A stamp inside of the
first halo would need no message of its own, but that halo's size is what ranks may disagree on. The
wait cannot be left out either: sizes must be known to be equal before the next message is sent. It
is not a wait for the device's queue: on a GPU the message goes through a stream of its own, behind
the earlier messages of the group and none of the computation that is queued after them, so the GPU
has work while the host waits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.comm.collectives import all_reduce_max, name_failures
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan.statement import Statement
from nsa_kernels.autograd import SECOND_ORDER

_Report = tuple[dict[str, str], str | None]


@torch.compiler.disable
def agree(
    statement: Statement,
    problem: str | None,
    group: ContextGroup,
    counter: CommunicationCounter,
    cause: Exception | None = None,
) -> None:
    """Return where all ranks state the same and none has a problem. A collective.

    Args:
        problem: what this rank found wrong with its own input, if anything.
        cause: the exception that told it, if any.

    Raises:
        ValueError: on every rank, naming each option that differs and each rank's value of it, or
            each rank's problem.
    """
    if group.size == 1:
        if problem is not None:
            raise ValueError(problem) from cause
        return
    stamp = 0 if problem is not None else statement.fingerprint
    largest, smallest = all_reduce_max([stamp, -stamp], group, counter, "plan", statement)
    if largest == -smallest != 0:
        return
    reports: list[_Report] = [({}, None)] * group.size
    with name_failures("plan", group, statement):
        dist.all_gather_object(
            reports, (dict(statement.values), problem), group=group.process_group
        )
    raise ValueError(_explain(reports)) from cause


def _explain(reports: list[_Report]) -> str:
    lines = [f"rank {p}: {problem}" for p, (_, problem) in enumerate(reports) if problem]
    if lines and len(lines) < len(reports):
        fine = [p for p, (_, problem) in enumerate(reports) if problem is None]
        lines.append(f"ranks {fine} report no problem")
    # A rank that found a problem early states less than the others.
    for name in reports[0][0]:
        stated = [values.get(name) for values, _ in reports]
        if None not in stated and len(set(stated)) > 1:
            shown = ", ".join(f"rank {p}: {value}" for p, value in enumerate(stated))
            lines.append(f"{name} must be equal on all ranks, got {shown}")
    if not lines:
        shown = ", ".join(f"rank {p}: {sorted(v)}" for p, (v, _) in enumerate(reports))
        lines.append(f"calls must be equal on all ranks, got calls that state {shown}")
    return "; ".join(lines)


class AgreeInBackward(torch.autograd.Function):
    """The identity, whose backward agrees that all ranks run the same one.

    Put behind the last of a call's results it comes first in backward, before any gradient moves.
    ``needs`` names the keys and values that some parameter or input requires gradients of.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        statement: Statement,
        needs: tuple[str, ...],
        group: ContextGroup,
        counter: Any,
    ) -> Tensor:
        ctx.statement, ctx.needs, ctx.group, ctx.counter = statement, needs, group, counter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        call = ctx.statement.values["call"].replace("forward", "backward")
        # One rank alone may ask for it: the others must not go on to messages that never come.
        problem = SECOND_ORDER if torch.is_grad_enabled() else None
        statement = ctx.statement.also(call=call, requires_grad=repr(ctx.needs))
        agree(statement, problem, ctx.group, ctx.counter)
        return grad, None, None, None, None

"""Agreement: ranks compare what they are about to do before they send data.

The first message of every forward and backward over several ranks is an all-reduce of two numbers:
the largest and the smallest fingerprint of the ranks' statements. Its size never varies. So ranks
that differ (in documents, config, dtype, or forward against backward) notice it there, and not in
a halo or a fetch whose size they disagree on, which would end a process under gloo, and hang or
overwrite memory under NCCL. A rank with bad input sends the fingerprint 0. Only if the two numbers
differ do ranks exchange their values and problems, so that every rank raises the same error and
no rank hangs.

The cost is 16 bytes and one wait of the host, in forward and in backward. A fingerprint inside the
first halo would save the message, but ranks may disagree on the size of that halo. The host has to
wait, because sizes must be equal before the next message is sent. It does not wait for the device's
queue: on a GPU the message runs on a stream of its own, after the group's earlier messages and not
after computation queued later, so the GPU stays busy.
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
    """Return if all ranks make the same statement and none has a problem. A collective.

    Args:
        problem: the error in this rank's own input, if any.
        cause: the exception behind ``problem``, if any.

    Raises:
        ValueError: on every rank, with each option that differs and every rank's value of it, or
            with every rank's problem.
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
    # A rank that meets a problem early states fewer values than the others.
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
    """The identity, whose backward checks that all ranks run the same backward.

    Applied to the last result of a call, it runs first in backward, before any gradient is sent.
    ``needs`` names the keys and values that need gradients.
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
        # A single rank may ask for second derivatives: the others must not wait for its messages.
        problem = SECOND_ORDER if torch.is_grad_enabled() else None
        statement = ctx.statement.also(call=call, requires_grad=repr(ctx.needs))
        agree(statement, problem, ctx.group, ctx.counter)
        return grad, None, None, None, None

"""Time and work of each operator on each rank of a call, for the imbalance between ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from launch.bench.stream import Stream
from launch.bench.table import table
from launch.bench.work import pairs_at
from launch.estimating.costs import call_flops
from nsa_dist import BRANCHES, CommunicationCounter, NSAConfig, get_plan
from nsa_dist.attention.call import Call, fetches_again
from nsa_dist.attention.flow import attend_branches
from nsa_dist.attention.selectors import CompressedSelector
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan import Plan
from nsa_kernels import Backend
from nsa_kernels.autograd import first_order

OPERATORS = {
    "compress": "compression",
    "compressed_attention": "compressed_attention",
    "select_blocks": "block_selection",
    "selected_attention": "selected_attention",
    "window_attention": "window_attention",
}
"""Functions of a backend, and the names of what they compute."""
REPEATS = 5

Mark = Any
"""A point of time on the current stream, or of the host."""


class Clock:
    """Adds up the time of operators between their first and last kernel.

    Attributes:
        spans: by operator and pass, 0 for forward and 1 for backward.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.spans: dict[tuple[str, int], list[tuple[Mark, Mark]]] = defaultdict(list)

    def mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[tuple[str, int], float]:
        """What was added up; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return {
                name: sum(start.elapsed_time(end) for start, end in spans)
                for name, spans in self.spans.items()
            }
        return {
            name: 1e3 * sum(end - start for start, end in spans)
            for name, spans in self.spans.items()
        }


@dataclass(eq=False)
class _Backward:
    """One backward of an operator, between two nodes of the graph."""

    name: str
    clock: Clock
    start: Mark = None


class _Begin(torch.autograd.Function):
    """The identity of a result; in backward the operator's own comes next."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, state: _Backward) -> Tensor:
        ctx.state = state
        return out.view_as(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.state.start = ctx.state.clock.mark()
        return grad, None


class _End(torch.autograd.Function):
    """The identity of all inputs; in backward the operator's own has just ended."""

    @staticmethod
    def forward(ctx: Any, state: _Backward, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.state = state
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        state: _Backward = ctx.state
        state.clock.spans[state.name, 1].append((state.start, state.clock.mark()))
        return None, *grads


class TimedBackend:
    """A backend whose operators are timed, forward and backward; it computes the same."""

    def __init__(self, inner: Backend, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._timed(value, OPERATORS[name]) if name in OPERATORS else value

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        clock = self._clock

        def call(*args: Any, **options: Any) -> Any:
            state, given = _Backward(name, clock), list(args)
            wanted = [at for at, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
            if wanted and torch.is_grad_enabled():
                inputs = _End.apply(state, *(args[at] for at in wanted))
                for at, x in zip(wanted, inputs, strict=True):
                    given[at] = x
            start = clock.mark()
            found = function(*given, **options)
            # What backward computes again is a part of its time.
            if torch._C._current_graph_task_id() == -1:
                clock.spans[name, 0].append((start, clock.mark()))
            if isinstance(found, Tensor):
                return _Begin.apply(found, state) if found.requires_grad else found
            results = list(found)
            # With a gate the gradient comes through the summand, which is the last.
            at = -1 if options.get("gate") is not None else 0
            if results[at].requires_grad:
                results[at] = _Begin.apply(results[at], state)
            return tuple(results)

        return call


def times_of_rank(run: Callable[[], Any], clock: Clock) -> dict[tuple[str, int], float]:
    """Milliseconds by operator and pass, medians over ``REPEATS`` after a warm-up; collective.

    Args:
        run: a forward and a backward.
    """
    run()
    found = defaultdict(list)
    for _ in range(REPEATS):
        clock.spans.clear()
        run()
        for name, ms in clock.milliseconds().items():
            found[name].append(ms)
    return {name: median(values) for name, values in found.items()}


@dataclass(frozen=True)
class Balance:
    """One operator over ranks.

    Args:
        forward_ms, backward_ms: of each rank.
        work: useful operations of each rank, forward and backward.
    """

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    work: tuple[float, ...]


def balance(
    config: NSAConfig, plan: Plan, times: dict[tuple[str, int], float], context: ContextGroup
) -> dict[str, Balance]:
    """By operator, and in ``all``, what every rank took and did; collective."""
    tokens = plan.batch * plan.local_length
    work = call_flops(config, pairs_at(config, plan.positions.cpu()), tokens)
    own = []
    for name in OPERATORS.values():
        spent = times.get((name, 0), 0.0), times.get((name, 1), 0.0)
        own.append([*spent, work[name].forward + work[name].backward])
    mine = torch.tensor([*own, [0.0] * 3], dtype=torch.float64)
    mine[-1] = mine[:-1].sum(0)
    parts = [torch.empty_like(mine, device=context.device) for _ in range(context.size)]
    dist.all_gather(parts, mine.to(context.device), group=context.process_group)
    of_ranks = torch.stack(parts).cpu()
    return {
        name: Balance(
            tuple(of_ranks[:, at, 0].tolist()),
            tuple(of_ranks[:, at, 1].tolist()),
            tuple(of_ranks[:, at, 2].tolist()),
        )
        for at, name in enumerate((*OPERATORS.values(), "all"))
    }


def of_ranks(
    local: Sequence[Tensor],
    stream: Stream,
    layout: str,
    context: ContextGroup,
    *,
    fetch_again: bool | None = None,
    recompute_branches: Sequence[str] = (),
    fetch: str = "chosen",
    ranks_per_node: int | None = None,
) -> dict[str, Balance]:
    """Time and work by operator and rank of ``native_sparse_attention``'s pass; a collective.

    Args:
        local: this rank's q, gates, and keys and values of each branch, [L, heads, width].
    """
    config, counter = stream.config, CommunicationCounter()
    clock = Clock(stream.device)
    plan = get_plan(
        config,
        layout,
        context,
        batch=1,
        local_length=stream.length // context.size,
        cu_seqlens=stream.boundaries(layout),
        dtype=stream.dtype,
        device=stream.device,
    )
    call = Call(
        config,
        cast(Backend, TimedBackend(stream.ops, clock)),
        plan,
        Channel(context, counter, plan),
        None,
        fetches_again(config, fetch_again, context.size),
        tuple(recompute_branches),
        fetch,
        ranks_per_node,
    ).with_nodes()
    q, gates, *rest = local
    k, v = (dict(zip(BRANCHES, given, strict=True)) for given in (rest[:3], rest[3:6]))
    selector = CompressedSelector(*stream.compressors)

    def run() -> None:
        out = attend_branches(call, q, k, v, gates, selector).out_NHD
        torch.autograd.grad(out.sum(), [q, gates, *rest[:6]])

    return balance(config, plan, times_of_rank(run, clock), context)


def over_mean(values: Sequence[float]) -> float:
    """The largest over the mean, less 1; 0 of nothing."""
    return max(values) * len(values) / sum(values) - 1 if sum(values) else 0.0


def markdown(found: dict[str, Balance]) -> str:
    """Milliseconds of every rank, and of time and work the largest over the mean."""
    lines = []
    for name, one in found.items():
        pairs = list(zip(one.forward_ms, one.backward_ms, strict=True))
        lines.append(
            [
                name.replace("_", " "),
                ", ".join(f"{forward:.2f} / {backward:.2f}" for forward, backward in pairs),
                f"{over_mean([sum(pair) for pair in pairs]):.1%}",
                f"{over_mean(one.work):.1%}",
            ]
        )
    head = ["operator", "ms of each rank, forward / backward", "time", "work"]
    return table(head, lines)

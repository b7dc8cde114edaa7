"""Ranks that part where no plan is made: one errs while the others have a plan already, or none.

No rank may wait for ever and none may return a result that it computed on another's wrong rows:
every rank ends in an error within the group's timeout, and where messages carry the plan's stamp
at once, in a ValueError.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist import NativeSparseAttention, planning
from tests.distributed.bad_call import (
    END,
    LOCAL,
    Outcome,
    attempt,
    call_layer,
    cu_seqlens,
    is_bad_rank,
)
from tests.distributed.layer_case import HIDDEN, SMALL
from tests.distributed.ranks import Ranks

TIMEOUT = timedelta(seconds=3)
SLACK_SECONDS = 10.0

# Two streams whose every message has one size: documents change inside the first rank's tokens.
FIRST = (0, 8, 24, END)
SECOND = (0, 16, 24, END)
Call = Callable[[], Any]


def built(group: Any, **changes: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(
        HIDDEN, replace(SMALL, **changes), layout="contiguous", group=group
    )


def with_plans(group: Any, *boundaries: tuple[int, ...], **changes: Any) -> Callable[..., Tensor]:
    """A layer of which every rank has the plans for these boundaries."""
    layer = built(group, **changes)

    def call(given: tuple[int, ...], width: int = HIDDEN) -> Tensor:
        return layer(torch.ones(1, LOCAL, width), cu_seqlens=cu_seqlens(group, given))

    for given in boundaries:
        call(given)
    return call


def stale(group: Any, **changes: Any) -> Call:
    """Both plans are known to all; the last rank uses the older one."""
    call = with_plans(group, FIRST, SECOND, **changes)
    return lambda: call(FIRST if is_bad_rank() else SECOND)


def stale_config(group: Any) -> Call:
    """As ``stale``, for configs that differ in nothing but the values computed."""
    calls = [with_plans(group, FIRST, scale=scale) for scale in (0.5, 0.6)]
    return lambda: calls[is_bad_rank()](FIRST)


def stale_cache(group: Any) -> Call:
    """The last rank's cache holds another batch's plan under this one's values."""
    call = with_plans(group, FIRST, SECOND)
    if is_bad_rank():
        plans = planning._plans_of_groups[group]
        plans[1] = replace(plans[1], plan=plans[0].plan)
    return lambda: call(SECOND)


def less_halo(group: Any) -> Call:
    """The last rank expects more tokens of its neighbour than come."""
    longer, shorter = with_plans(group, FIRST), with_plans(group, FIRST, window=5)
    return lambda: (longer if is_bad_rank() else shorter)(FIRST)


STALE = {
    "documents": stale,
    "documents-compressed-only": lambda group: stale(group, branches=("compressed",)),
    "documents-compressed-and-window": lambda g: stale(g, branches=("compressed", "window")),
    "documents-window-only": lambda group: stale(group, branches=("window",)),
    "documents-shared": lambda group: stale(group, independent_kv=False),
    "config": stale_config,
    "cache": stale_cache,
    "shorter-messages": less_halo,
}


def new_values(group: Any) -> Call:
    """All others find their plan; the last rank has to make one."""
    call = with_plans(group, FIRST)
    return lambda: call(SECOND if is_bad_rank() else FIRST)


def bad_input(group: Any) -> Call:
    """All others find their plan; the last rank's input is refused."""
    call = with_plans(group, FIRST)
    return lambda: call(FIRST, HIDDEN - is_bad_rank())


def no_halo(group: Any) -> Call:
    """As ``new_values``, where the others' first message is a gather."""
    call = with_plans(group, (0, LOCAL, END), branches=("compressed",), compress_block=2)
    return lambda: call(FIRST if is_bad_rank() else (0, LOCAL, END))


def users_error(group: Any) -> Call:
    """The last rank never makes the call that the others make a plan for."""
    layer = built(group)

    def call() -> Tensor:
        if is_bad_rank():
            raise RuntimeError("a user's own error")
        return layer(torch.ones(1, LOCAL, HIDDEN))

    return call


def users_error_later(group: Any) -> Call:
    """As ``users_error``, with plans that all have."""
    call = with_plans(group, FIRST)

    def step() -> Tensor:
        if is_bad_rank():
            raise RuntimeError("a user's own error")
        return call(FIRST)

    return step


def no_backward(group: Any) -> Call:
    """The last rank fails between forward and backward."""
    call = with_plans(group, FIRST)

    def step() -> None:
        out = call(FIRST)
        if is_bad_rank():
            raise RuntimeError("a user's own error")
        out.sum().backward()

    return step


def bad_option(group: Any) -> Call:
    """The last rank's layer is refused when it is built."""
    return lambda: call_layer(group, layer={"dropout": 2.0} if is_bad_rank() else {})


def other_group(group: Any) -> Call:
    """The last rank passes another group of the same ranks."""
    other = dist.new_group(timeout=TIMEOUT)
    return lambda: call_layer(other if is_bad_rank() else group)


class Mean(nn.Module):
    """A custom compressor that keeps a dimension too many on the last rank."""

    def forward(self, blocks: Tensor) -> Tensor:
        return blocks.mean(2, keepdim=is_bad_rank())


def bad_compressor(group: Any) -> Call:
    """The last rank's custom compressor fails in the middle of a forward."""
    options = {"k_compressor": Mean(), "v_compressor": Mean()}
    return lambda: call_layer(group, compress="custom", layer=options)


PARTED = {
    call.__name__.replace("_", "-"): call
    for call in (
        new_values,
        bad_input,
        no_halo,
        users_error,
        users_error_later,
        no_backward,
        bad_option,
        other_group,
        bad_compressor,
    )
}


def run_parted() -> dict[str, Outcome]:
    """All the cases at once, each in a group and a thread of its own, to wait but once."""
    calls = {name: prepare(dist.new_group(timeout=TIMEOUT)) for name, prepare in PARTED.items()}
    outcomes: dict[str, Outcome] = {}

    def end(name: str) -> None:
        outcomes[name] = attempt(calls[name])

    threads = [threading.Thread(target=end, args=(name,)) for name in calls]
    dist.barrier()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture(scope="module")
def parted(ranks_of: Callable[[int], Ranks]) -> Callable[[int], list[dict[str, Outcome]]]:
    """parted(P): each rank's outcomes of the ``PARTED`` cases on P ranks."""
    known: dict[int, list[dict[str, Outcome]]] = {}

    def get(size: int) -> list[dict[str, Outcome]]:
        if size not in known:
            known[size] = ranks_of(size).run(run_parted)
        return known[size]

    return get


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", PARTED)
def test_every_rank_ends_in_an_error_within_the_timeout(
    name: str, size: int, parted: Callable[[int], list[dict[str, Outcome]]]
) -> None:
    for outcomes in parted(size):
        assert outcomes[name].error is not None
        assert outcomes[name].seconds < TIMEOUT.total_seconds() + SLACK_SECONDS


def run_stale(name: str) -> Outcome:
    return attempt(STALE[name](dist.new_group(timeout=TIMEOUT)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", STALE)
def test_every_rank_sees_that_plans_differ(
    name: str, size: int, ranks_of: Callable[[int], Ranks]
) -> None:
    outcomes = ranks_of(size).run(run_stale, name)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error == "ValueError", outcome
        others = [size - 1] if rank < size - 1 else list(range(size - 1))
        assert f"rank {rank} runs another plan than ranks {others}" in outcome.message
        assert outcome.seconds < TIMEOUT.total_seconds()


def run_more_halo() -> Outcome:
    """The last rank is sent more than it expects, which gloo ends the process for."""
    group = dist.new_group(timeout=TIMEOUT)
    longer, shorter = with_plans(group, FIRST), with_plans(group, FIRST, window=5)
    return attempt(lambda: (shorter if is_bad_rank() else longer)(FIRST))


def test_no_rank_returns_from_messages_that_are_too_long() -> None:
    ranks = Ranks(2, TIMEOUT)
    try:
        for pipe in ranks._pipes:
            pipe.send((run_more_halo, ()))
        for pipe in ranks._pipes:
            assert pipe.poll(60), "a hang"
            try:
                _, outcome = pipe.recv()
            except EOFError:
                continue
            assert outcome.error is not None
    finally:
        ranks.close()


def counted_run() -> None:
    """A plan is made, and agreed on, once for each new batch; what it computes is the batch's."""
    group = dist.new_group(timeout=timedelta(seconds=30))
    layer = built(group)
    x = torch.randn(1, LOCAL, HIDDEN)
    made: list[str] = []
    originals = {name: getattr(planning, name) for name in ("agree", "build_plan")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            return originals[name](*args, **options)

        return call

    def step(boundaries: tuple[int, ...]) -> Tensor:
        made.clear()
        layer.communication.reset()
        return layer(x, cu_seqlens=cu_seqlens(group, boundaries))

    for name in originals:
        setattr(planning, name, counted(name))
    try:
        new = ["agree", "build_plan"]
        first = step(FIRST)
        assert made == new and layer.communication.received["plan"] > 0
        again = step(FIRST)
        assert made == [] and layer.communication.received["plan"] == 0
        assert torch.equal(again, first)
        second = step(SECOND)
        assert made == new and layer.communication.received["plan"] > 0
        assert step(FIRST) is not None and made == []
        fresh = dist.new_group(timeout=timedelta(seconds=30))
        other = built(fresh)
        expected = other(x, cu_seqlens=cu_seqlens(fresh, SECOND))
        assert torch.equal(second, expected)
        assert dist.get_rank() > 0 or not torch.equal(second, first)
    finally:
        for name, original in originals.items():
            setattr(planning, name, original)


@pytest.mark.parametrize("size", [2, 4])
def test_a_plan_is_made_once_for_the_same_values_and_anew_for_others(
    size: int, ranks_of: Callable[[int], Ranks]
) -> None:
    ranks_of(size).run(counted_run)


def alone_between_steps() -> None:
    """One rank makes more plans than a cache holds, for itself, between two steps of all."""
    group = dist.new_group(timeout=timedelta(seconds=30))
    call = with_plans(group, FIRST)
    if is_bad_rank():
        single = built(None)
        for length in range(1, 2 * planning.CACHED_PLANS):
            single(torch.ones(1, length, HIDDEN))
    call(FIRST)


def test_what_a_rank_does_alone_drops_no_plan_of_the_group(
    ranks_of: Callable[[int], Ranks],
) -> None:
    ranks_of(2).run(alone_between_steps)

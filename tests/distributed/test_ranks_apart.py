"""Ranks that part: one errs, or does something else, while the others have a plan already, or none.

No rank may wait for ever, none may be ended by messages of unlike sizes, and none may return a
result that it computed on another's wrong rows. What the library itself sees is told at once on
every rank, in the words of the rank that saw it; a wait for a rank that does not come ends within
the group's timeout, in an error that says what was waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.attention import plan_cache
from tests.distributed.bad_call import (
    END,
    LOCAL,
    Outcome,
    attempt,
    call_layer,
    cu_seqlens,
    is_bad_rank,
)
from tests.distributed.layer_case import HIDDEN
from tests.distributed.parting import (
    FIRST,
    KINDS,
    SECOND,
    STALE,
    TIMEOUT,
    TOLD,
    WAITING,
    Call,
    built,
    stopped,
    stops,
    with_plans,
)
from tests.distributed.ranks import Ranks

SLACK_SECONDS = 10.0


def run_at_once() -> dict[str, Outcome]:
    """Cases, each in a group and a thread of its own, to wait but once."""
    prepares: dict[str, Callable[[Any], Call]] = {
        **{f"told-{name}": prepare for name, (prepare, _) in TOLD.items()},
        **{f"waiting-{name}": prepare for name, (prepare, _) in WAITING.items()},
        **{f"kind-{kind}": partial(stopped, kind=kind) for kind in KINDS},
    }
    calls = {name: prepare(dist.new_group(timeout=TIMEOUT)) for name, prepare in prepares.items()}
    outcomes: dict[str, Outcome] = {}

    def end(name: str) -> None:
        outcomes[name] = attempt(calls[name])

    threads = [threading.Thread(target=end, args=(name,)) for name in calls]
    dist.barrier()
    with stops():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


@pytest.fixture(scope="module")
def parted(ranks_of: Callable[[int], Ranks]) -> Callable[[int], list[dict[str, Outcome]]]:
    """parted(P): each rank's outcomes of all the cases on P ranks."""
    known: dict[int, list[dict[str, Outcome]]] = {}

    def get(size: int) -> list[dict[str, Outcome]]:
        if size not in known:
            known[size] = ranks_of(size).run(run_at_once)
        return known[size]

    return get


Parted = Callable[[int], list[dict[str, Outcome]]]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", TOLD)
def test_a_ranks_problem_is_told_in_its_words_on_every_rank(
    name: str, size: int, parted: Parted
) -> None:
    for outcomes in parted(size):
        outcome = outcomes[f"told-{name}"]
        assert outcome.error == "ValueError", outcome
        assert f"rank {size - 1}: " in outcome.message
        assert TOLD[name][1] in outcome.message
        assert outcome.seconds < TIMEOUT.total_seconds()


def assert_named(outcome: Outcome, kind: str, rank: int, size: int) -> None:
    """A wait that ended within the timeout, in an error that says where."""
    assert outcome.error == "RuntimeError", outcome
    assert outcome.message.startswith(f"{kind}: failed after "), outcome
    where = f"on rank {rank} of the group of global ranks {list(range(size))}, in the "
    assert where in outcome.message
    assert f"local sequence length {LOCAL}, cu_seqlens " in outcome.message
    assert outcome.seconds < TIMEOUT.total_seconds() + SLACK_SECONDS


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", WAITING)
def test_a_wait_for_a_rank_that_does_not_come_is_named(
    name: str, size: int, parted: Parted
) -> None:
    own = WAITING[name][1]
    for rank, outcomes in enumerate(parted(size)):
        outcome = outcomes[f"waiting-{name}"]
        if own is not None and rank == size - 1:
            assert own in outcome.message
        else:
            assert_named(outcome, "plan", rank, size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_in_the_middle_is_named_by_its_kind(kind: str, size: int, parted: Parted) -> None:
    for rank, outcomes in enumerate(parted(size)[:-1]):
        outcome = outcomes[f"kind-{kind}"]
        # A rank that needs nothing of the last one finds out at a later message.
        later = (*KINDS[KINDS.index(kind) :], "halo_grad", "gather_grad", "fetch_grad", "plan")
        found = outcome.message.split(":")[0]
        assert found == kind or (size > 2 and found in later), outcome
        assert_named(outcome, found, rank, size)


def run_stale(name: str) -> tuple[Outcome, Outcome]:
    """The call, and another that is right in the same group."""
    group = dist.new_group(timeout=TIMEOUT)
    outcome = attempt(STALE[name][0](group))
    return outcome, attempt(lambda: call_layer(group))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", STALE)
def test_every_rank_sees_that_plans_differ(
    name: str, size: int, ranks_of: Callable[[int], Ranks]
) -> None:
    _, option, found, others = STALE[name]
    messages = set()
    for outcome, after in ranks_of(size).run(run_stale, name):
        assert outcome.error == "ValueError", outcome
        assert outcome.seconds < TIMEOUT.total_seconds()
        assert after.error is None, after
        messages.add(outcome.message)
    (message,) = messages
    assert f"{option} must be equal on all ranks, got rank 0: {others}" in message
    assert f"rank {size - 1}: {found}" in message


def run_death() -> Outcome:
    """The last rank's process ends in the middle of a run."""
    group = dist.new_group(timeout=TIMEOUT)
    call = with_plans(group, FIRST)
    if is_bad_rank():
        os._exit(1)
    return attempt(lambda: call(FIRST))


def test_a_rank_that_ends_is_named() -> None:
    ranks = Ranks(2, TIMEOUT)
    try:
        for pipe in ranks._pipes:
            pipe.send((run_death, ()))
        assert ranks._pipes[0].poll(60), "a hang"
        _, outcome = ranks._pipes[0].recv()
        assert_named(outcome, "plan", 0, 2)
    finally:
        ranks.close()


def counted_run() -> None:
    """A plan is made once for each new batch; what it computes is the batch's."""
    group = dist.new_group(timeout=timedelta(seconds=30))
    layer = built(group)
    x = torch.randn(1, LOCAL, HIDDEN)
    made: list[tuple[int, ...]] = []
    original = plan_cache.build_plan

    def counted(*args: Any) -> Any:
        boundaries = next(x for x in args if isinstance(x, Tensor))
        made.append((*boundaries.tolist()[:-1], END))
        return original(*args)

    def step(boundaries: tuple[int, ...]) -> Tensor:
        made.clear()
        layer.communication.reset()
        out = layer(x, cu_seqlens=cu_seqlens(group, boundaries))
        # Agreement on it is one message of two numbers, whether it was made or found.
        assert layer.communication.received["plan"] == 16 * (dist.get_world_size() - 1)
        assert isinstance(out, Tensor)
        return out

    plan_cache.build_plan = counted
    try:
        first = step(FIRST)
        assert made == [FIRST]
        again = step(FIRST)
        assert made == []
        assert torch.equal(again, first)
        second = step(SECOND)
        assert made == [SECOND]
        assert step(FIRST) is not None and made == []
        fresh = dist.new_group(timeout=timedelta(seconds=30))
        other = built(fresh)
        expected = other(x, cu_seqlens=cu_seqlens(fresh, SECOND))
        assert torch.equal(second, expected)
        assert dist.get_rank() > 0 or not torch.equal(second, first)
    finally:
        plan_cache.build_plan = original


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
        for length in range(1, 2 * plan_cache.CACHED_PLANS):
            single(torch.ones(1, length, HIDDEN))
    call(FIRST)


def test_what_a_rank_does_alone_drops_no_plan_of_the_group(
    ranks_of: Callable[[int], Ranks],
) -> None:
    ranks_of(2).run(alone_between_steps)

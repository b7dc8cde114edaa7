"""Messages behind computation when a rank is late, ends, holds nothing, or is in two groups."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nsa_dist.comm import fetch
from tests.distributed.bad_call import Outcome, attempt, is_bad_rank
from tests.distributed.layer_case import (
    LayerCase,
    LayerResult,
    assert_results_close,
    run_layer,
    variants,
)
from tests.distributed.parting import TIMEOUT
from tests.distributed.ranks import Ranks
from tests.distributed.test_nccl import bits, two_groups

HEADS = 4
CASE = variants(LayerCase(lengths=(60, 97, 45)), num_kv_heads=HEADS, num_heads=2 * HEADS)
RanksOf = Callable[[int], Ranks]


@contextmanager
def before_a_message(kind: str, number: int, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Call ``act`` before this rank's message of a kind with that number; gives all that began."""
    original, begun = fetch.begin_all_to_all, []

    def begin(*args: Any, **options: Any) -> Any:
        begun.append(args[-1])
        if args[-1] == kind and begun.count(kind) == number + 1:
            act()
        return original(*args, **options)

    fetch.begin_all_to_all = begin
    try:
        yield begun
    finally:
        fetch.begin_all_to_all = original


# Where a rank stops: at its second fetch, at the second of those that backward begins again, and
# at the first return of gradients.
PLACES = [("fetch", 1), ("fetch", HEADS + 1), ("fetch_grad", 0)]


def late_result(case: LayerCase) -> tuple[bool, float]:
    """Whether bits stay where one rank is two seconds late, and how long that took."""
    expected = bits(run_layer(case, dist.group.WORLD, fetch_again=True))
    start, same = time.monotonic(), True
    for late, (kind, number) in enumerate(PLACES):
        here = late == dist.get_rank()
        with before_a_message(kind, number, lambda here=here: time.sleep(2.0 * here)) as begun:
            found = bits(run_layer(case, dist.group.WORLD, fetch_again=True))
        assert begun.count(kind) > number
        same &= all(map(torch.equal, found, expected))
    return same, time.monotonic() - start


def test_a_late_rank_changes_no_bit(ranks_of: RanksOf) -> None:
    for same, seconds in ranks_of(4).run(late_result, CASE):
        assert same
        assert seconds > 2.0 * len(PLACES)  # Nobody went on without the late rank.


def killed_at(case: LayerCase, kind: str, number: int) -> Outcome:
    """The last rank's process is killed before a message, while another one travels."""

    def end() -> None:
        if is_bad_rank():
            os.kill(os.getpid(), signal.SIGKILL)

    group = dist.new_group(timeout=TIMEOUT)
    with before_a_message(kind, number, end):
        return attempt(lambda: run_layer(case, group, fetch_again=True))


def test_a_rank_killed_inside_a_fetch_is_named() -> None:
    groups = [Ranks(3, TIMEOUT) for _ in PLACES]
    try:
        for ranks, place in zip(groups, PLACES, strict=True):
            for pipe in ranks._pipes:
                pipe.send((killed_at, (CASE, *place)))
        for ranks in groups:
            for rank, pipe in enumerate(ranks._pipes[:-1]):
                assert pipe.poll(90), "a hang"
                ok, outcome = pipe.recv()
                assert ok, outcome
                assert outcome.error == "RuntimeError", outcome
                # A message that began before may have been still on its way.
                assert outcome.message.split(":")[0] in ("fetch", "fetch_grad"), outcome
                where = f"on rank {rank} of the group of global ranks [0, 1, 2], in the "
                assert where in outcome.message
                assert outcome.seconds < TIMEOUT.total_seconds() + 10
    finally:
        for ranks in groups:
            ranks.close()


def test_two_groups_at_once(ranks_of: RanksOf) -> None:
    """Layers of two groups of the same ranks, whose forwards and backwards alternate."""
    assert all(ranks_of(4).run(two_groups, CASE))


def result_of(case: LayerCase, options: dict[str, Any]) -> LayerResult:
    return run_layer(case, dist.group.WORLD, **options)


EMPTY = {
    "nobody-fetches": (40, 40, 40, 40),
    "one-fetches": (40, 40, 60, 20),
    "no-block-of-compression": (*[3] * 40, 40),
    "padding-alone": (5,),
}
"""Documents over four ranks in contiguous chunks."""


@pytest.mark.parametrize("options", [{"fetch_again": True}, {"fetch": "full"}], ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_ranks_that_have_nothing_finish_with_the_others(
    name: str, options: dict[str, Any], ranks_of: RanksOf
) -> None:
    case = replace(CASE, lengths=EMPTY[name], layout="contiguous")
    expected = run_layer(case)
    found = ranks_of(4).run(result_of, case, options)
    fetched = [result.received["fetch"] for result in found]
    assert min(fetched) == 0
    if name == "one-fetches":
        assert sum(bytes_ > 0 for bytes_ in fetched) == 1
    for result in found:
        assert_results_close(result, expected, 1e-12)

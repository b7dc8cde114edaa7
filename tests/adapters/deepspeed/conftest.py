"""Ranks for DeepSpeed's tests, of their own: it keeps groups and options in the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import DEEPSPEED, DEEPSPEED_RUNS, Ranks, preload, rank_pool

preload(*DEEPSPEED)


@pytest.fixture(scope="package")
def deepspeed_ranks() -> Iterator[Callable[[int], Ranks]]:
    with rank_pool(DEEPSPEED_RUNS) as get:
        yield get

"""Ranks for the tests of converted models, of their own: FSDP2 and examples make groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks, preload, rank_pool

preload("nsa_dist.adapters.huggingface")


@pytest.fixture(scope="package")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    with rank_pool(ends_groups=True) as get:
        yield get

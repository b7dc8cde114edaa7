"""Ranks for the tests of converted models, of their own: FSDP2 and examples make groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks, rank_pool


@pytest.fixture(scope="package")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    with rank_pool(ends_groups=True) as get:
        yield get

"""Tests of dense attention over ranks: skipped without ring-flash-attn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks, rank_pool

MISSING = importlib.util.find_spec("ring_flash_attn") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if "adapters/ring" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs ring-flash-attn, not here"))


@pytest.fixture(scope="package")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """As everywhere, but processes of these tests alone."""
    with rank_pool(ends_groups=True) as get:
        yield get

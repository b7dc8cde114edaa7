"""Megatron's tests: skipped without megatron-core, on ranks of their own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import MEGATRON, Ranks, preload, rank_pool

preload(*MEGATRON)
MISSING = importlib.util.find_spec("megatron") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if "adapters/megatron" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs megatron-core, which is not here"))


@pytest.fixture(scope="package")
def megatron_ranks() -> Iterator[Callable[[int], Ranks]]:
    """As ``ranks_of``, but processes that answer for Megatron's GPUs."""
    with rank_pool(ends_groups=True) as get:
        yield get

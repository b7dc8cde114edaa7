"""Processes and documents that the training tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.ranks import DEEPSPEED_RUNS, Ranks, preload, rank_pool
from tests.launch.common import write_documents

preload("launch.train")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``documents/`` to train on and room for runs."""
    root = tmp_path_factory.mktemp("training")
    write_documents(root)
    return root


@pytest.fixture(scope="package")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """As everywhere, but processes of these tests alone."""
    with rank_pool(ends_groups=True) as get:
        yield get


@pytest.fixture(scope="package")
def starting_ranks() -> Iterator[Callable[[int], Ranks]]:
    """As ``ranks_of``, for functions that make groups once or not at all."""
    with rank_pool() as get:
        yield get


@pytest.fixture(scope="package")
def megatron_ranks() -> Iterator[Callable[[int], Ranks]]:
    """As ``ranks_of``, but processes that answer for Megatron's GPUs."""
    with rank_pool(ends_groups=True) as get:
        yield get


@pytest.fixture(scope="module")
def deepspeed_ranks() -> Iterator[Callable[[int], Ranks]]:
    """As ``ranks_of``, but processes in which DeepSpeed keeps groups and their threads."""
    with rank_pool(DEEPSPEED_RUNS) as get:
        yield get

"""Processes and documents that the training tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks
from tests.launch.common import write_documents


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``documents/`` to train on and room for runs."""
    root = tmp_path_factory.mktemp("training")
    write_documents(root)
    return root


@pytest.fixture(scope="session")
def megatron_ranks() -> Iterator[Callable[[int], Ranks]]:
    """As ``ranks_of``, but processes that answer for Megatron's GPUs."""
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield get
    for ranks in started.values():
        ranks.close()

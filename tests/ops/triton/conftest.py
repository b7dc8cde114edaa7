"""Kernels run natively where there is a GPU, else in Triton's interpreter under a guard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ops.backends import INTERPRETED, guarded_kernels

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set where all tests begin"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs natively are tests of the GPU: `pytest -m gpu` has them."""
    here = Path(__file__).parent
    for item in items:
        if not INTERPRETED and item.path.parent == here:
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded_kernels():
        yield

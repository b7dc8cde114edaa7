"""torchtitan's tests: skipped without it, and run by the interpreter that has it."""

from __future__ import annotations

import importlib.util

import pytest

MISSING = importlib.util.find_spec("torchtitan") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if "adapters/torchtitan" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs torchtitan, which is not here"))

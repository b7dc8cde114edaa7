"""Processes and documents that the training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.common import write_documents


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``documents/`` to train on and room for runs."""
    root = tmp_path_factory.mktemp("training")
    write_documents(root)
    return root

"""Backends as tests call them, and small tiles, so that small inputs take several of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import pytest

from nsa_kernels.pytorch import _common
from tests.ops.backends import BACKENDS, INTERPRETED, TRITON, BackendOnDevice, guarded_kernels


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[BackendOnDevice]:
    """The backend of the test's parameter; kernels run as in all tests of ops/triton."""
    tested = BACKENDS[request.param]
    with guarded_kernels() if tested is TRITON else nullcontext():
        yield tested


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the PyTorch backend."""
    monkeypatch.setattr(_common, "TILE_ELEMENTS", 1 << 11)


@pytest.fixture
def _same_bits_in_any_row(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests that compare bits: a dot's row must not depend on where it stands in the tile."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")  # The guard first: this changes what it has set.
    if INTERPRETED and find_spec("triton") is not None:
        from tests.ops.triton.guard import fixed_order_dot

        with fixed_order_dot():
            yield
    else:
        yield

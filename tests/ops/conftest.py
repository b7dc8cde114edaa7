"""Small tiles, so that small inputs take several of them."""

from __future__ import annotations

import pytest

from nsa_kernels.pytorch import _common


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "TILE_ELEMENTS", 1 << 11)

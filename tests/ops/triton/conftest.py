"""Kernels run natively where there is a GPU, else in Triton's interpreter under a guard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter takes bfloat16 for integers.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
if not INTERPRETED:
    # Products of the plain code, which sets the tolerance, are summed in float32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set where all tests begin"


def natively_all(interpreted: torch.dtype) -> list[torch.dtype]:
    """Every dtype where there is a GPU; the interpreter is too slow for more than one each time."""
    return [interpreted] if INTERPRETED else DTYPES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs natively are tests of the GPU: `pytest -m gpu` has them."""
    here = Path(__file__).parent
    for item in items:
        if not INTERPRETED and item.path.parent == here:
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    """Out-of-bounds accesses, races between programs and int32 overflow fail the test."""
    if INTERPRETED:
        from tests.ops.triton.guard import guarded

        with guarded():
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _many_lines_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation takes the interpreter as long on one line of scores as on a thousand."""
    if INTERPRETED:
        from nsa_kernels.triton.selection import choose

        monkeypatch.setattr(choose, "LINE_ELEMENTS", 1 << 13)


@pytest.fixture
def _same_bits_in_any_row() -> Iterator[None]:
    """For tests that compare bits: a dot's row must not depend on where it stands in the tile."""
    if INTERPRETED:
        from tests.ops.triton.guard import fixed_order_dot

        with fixed_order_dot():
            yield
    else:
        yield

"""From rotated queries and keys on, the Triton kernels under Megatron give the functional form's
bits, on every split."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.adapters.megatron.core_case import core_bits
from tests.adapters.megatron.small_gpt import Layout
from tests.distributed.ranks import Ranks

CASES = {
    "TP2xCP2-packed": (Layout(tp=2, cp=2), True, {}),
}
SLOW_CASES = {
    "CP4-rows-shared": (Layout(cp=4), False, {"independent_kv": False}),
    "TP2xCP2-rows-per-head": (Layout(tp=2, cp=2), False, {"compress_per_head": True}),
    "CP4-packed-selected-and-window": (Layout(cp=4), True, {"branches": ("selected", "window")}),
}


@pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_the_core_has_the_bits_of_the_functional_form(
    name: str, megatron_ranks: Callable[[int], Ranks]
) -> None:
    case: tuple[Layout, bool, dict[str, Any]] = (CASES | SLOW_CASES)[name]
    assert megatron_ranks(4).run(core_bits, *case) == [True] * 4

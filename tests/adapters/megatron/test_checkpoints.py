"""Megatron's distributed checkpoints: written on one layout, read on others, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters.megatron.small_gpt import (
    Case,
    Layout,
    load_checkpoint,
    run_whole,
    save_checkpoint,
)
from tests.distributed.ranks import Ranks

SPLIT = Layout(tp=2, cp=2, sp=True)
PIPELINE = Layout(cp=2, pp=2)


@pytest.mark.parametrize(
    "variant",
    [
        "shared-per-head",
        pytest.param("independent-mlp", marks=pytest.mark.slow),
        pytest.param("mlp-gate-conv1d", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_loads_on_other_layouts(
    variant: str, megatron_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    one, four = megatron_ranks(1), megatron_ranks(4)
    _, weights, *_ = one.run(run_whole, Case(variant))[0]
    split, whole = tmp_path / "split", tmp_path / "whole"
    for folder in (split, whole):
        folder.mkdir()
    four.run(save_checkpoint, Case(variant, SPLIT), weights, str(split))
    assert one.run(load_checkpoint, Case(variant), weights, str(split)) == [[]]
    assert four.run(load_checkpoint, Case(variant, PIPELINE), weights, str(split)) == [[]] * 4
    one.run(save_checkpoint, Case(variant), weights, str(whole))
    assert four.run(load_checkpoint, Case(variant, SPLIT), weights, str(whole)) == [[]] * 4

"""Megatron's distributed checkpoints: written on one layout, read on others, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters.megatron.dense_case import load_dense, save_dense
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


@pytest.mark.parametrize(
    "gate", ["linear", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mlp", "static"))]
)
def test_a_dense_checkpoint_starts_a_sparse_model(
    gate: str, megatron_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """Weights as they are, gates and compressors new; near dense on request."""
    (dense,) = megatron_ranks(1).run(save_dense, str(tmp_path))

    def loaded(ranks: int, layout: Layout, flags: str) -> float:
        flags = f"--nsa-gate {gate} {flags}"
        answers = megatron_ranks(ranks).run(load_dense, layout, str(tmp_path), flags, dense)
        for new, _ in answers:
            assert new
            assert all("gate" in name or "compressor" in name for name in new)
        return max(error for _, error in answers)

    # The compressed branch is let through by 4.5e-5, or by 4e-18.
    for ranks, layout in ((1, Layout()), (4, SPLIT)):
        assert loaded(ranks, layout, "--nsa-from-dense") < 1e-3
        assert loaded(ranks, layout, "--nsa-from-dense --nsa-gate-init -40 0 0") < 1e-12
    assert loaded(1, Layout(), "") > 1e-3

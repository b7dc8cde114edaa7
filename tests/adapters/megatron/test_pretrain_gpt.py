"""Megatron-LM's own ``pretrain_gpt.py`` with the change that the documents show.

The script is of a checkout of Megatron-LM, not of the package megatron-core:

    MEGATRON_LM=folder pytest --run-slow tests/adapters/megatron/test_pretrain_gpt.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")

from launch.bench.megatron_lm import Case, Comparison, MegatronOptions, difference, layout_of

CHECKOUT = os.environ.get("MEGATRON_LM", "")
GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHECKOUT, reason="needs MEGATRON_LM, a checkout of Megatron-LM"),
]

SMALL_ATTENTION = (
    "--qk-layernorm --nsa-compress-block 8 --nsa-compress-stride 4 --nsa-select-block 16 "
    "--nsa-num-selected 4 --nsa-window 32"
)
ON_CPUS = "--distributed-backend gloo --clip-grad 0 --no-bias-swiglu-fusion"
LAYOUTS = ("cp2", "cp4", "tp2", "tp2-cp2", "cp2>cp4", "cp2>one")

Losses = Callable[..., list[float]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Of a layout's steps, by its name and precision; with ``like``, of the run on one GPU from
    the weights of that layout's run."""
    folder = tmp_path_factory.mktemp("runs")
    flags = SMALL_ATTENTION if GPUS else f"{SMALL_ATTENTION} {ON_CPUS}"
    sizes = {} if GPUS else {"length": 256, "steps": 6}
    options = MegatronOptions(Path(CHECKOUT), flags=flags, **sizes)  # type: ignore[arg-type]
    on_cpus = {
        "optimizer": (),
        "runner": ["-m", "tests.adapters.megatron.pretrain_on_cpus"],
    }
    comparison = Comparison(options, folder, **({} if GPUS else on_cpus))  # type: ignore[arg-type]

    @cache
    def run(layout: str, precision: str, *, like: bool = False) -> list[float]:
        case = Case(layout, "sparse", precision)
        if like:
            return run(options.baseline(case, precision).layout, precision)
        try:
            found = comparison.run(case).losses
        except RuntimeError as error:
            pytest.fail(str(error), pytrace=False)
        assert len(found) == options.steps
        return found

    return run


@pytest.mark.skipif(GPUS > 0, reason="float32 on CPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_cpus(layout: str, losses: Losses) -> None:
    """float32: within 1e-5 of one process, by the rule for training runs."""
    one = losses(layout, "float32", like=True)
    assert losses(layout, "float32") == pytest.approx(one, rel=1e-5)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_gpus(layout: str, losses: Losses) -> None:
    """bfloat16: by the 2x rule, as near to float32 as one GPU's, whose mean distance it may have
    twice. Data parallel ranks would be no measure: they round what one GPU rounds."""
    ranks = max(layout_of(part).ranks for part in layout.split(">"))
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} CUDA devices, found {GPUS}")
    one, exact = (losses(layout, x, like=True) for x in ("bfloat16", "float32"))
    found = losses(layout, "bfloat16")
    print(f"{layout}: {found}\none: {one}\nfloat32: {exact}")
    assert difference(found, exact) <= 2 * difference(one, exact)

"""Training by DeepSpeed on GPUs: bfloat16, ZeRO 2 and 3, sequences split over two, over NCCL.

Losses by the loss rule: the mean difference from FSDP2 on one GPU over 50 steps is at most twice
that of FSDP2 on two. The first step's gradients by the 2x rule, FSDP2 being the plain code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.settings import Settings
from launch.train import Result
from tests.distributed.ranks import Ranks
from tests.launch.common import Gradients, replaced
from tests.launch.deepspeed import broken_off, deepspeed_gradients, needs_deepspeed, run_deepspeed
from tests.launch.megatron import (
    exact_gradients_on_a_gpu,
    fsdp2_gradients_on_gpus,
    run_fsdp2_on_gpus,
)
from tests.launch.test_megatron_engine import mean_difference
from tests.launch.test_megatron_gpus import on_gpus

RanksOf = Callable[[int], Ranks]

pytestmark = [needs_deepspeed, pytest.mark.multi_gpu, pytest.mark.timeout(600)]

STAGES = (2, 3)


@pytest.fixture(scope="module")
def gpus() -> Iterator[RanksOf]:
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size, timedelta(seconds=300), "nccl")
        return started[size]

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    yield get
    for ranks in started.values():
        ranks.close()


def deepspeed(root: Path, stage: int, **run: Any) -> Settings:
    return on_gpus(root, {"engine": "deepspeed", "zero_stage": stage, "cp": 2}, **run)


@pytest.fixture(scope="module")
def by_fsdp2(gpus: RanksOf, root: Path) -> dict[int, Result]:
    """The run by FSDP2, by ranks that share the sequence."""
    found = {}
    for cp in (1, 2):
        settings = on_gpus(root, {"cp": cp}, folder=str(root / f"gpu-beside-deepspeed-{cp}"))
        found[cp], *_ = gpus(cp).run(run_fsdp2_on_gpus, settings)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_fsdp2(
    gpus: RanksOf, root: Path, by_fsdp2: dict[int, Result], stage: int
) -> None:
    settings = deepspeed(root, stage, folder=str(root / f"gpu-deepspeed-{stage}"))
    found, *_ = gpus(2).run(run_deepspeed, settings)
    reference = mean_difference(by_fsdp2[1], by_fsdp2[2])
    difference = mean_difference(found, by_fsdp2[1])
    print(
        f"ZeRO {stage}: mean difference {difference:.2e}, of FSDP2 at cp 2 {reference:.2e}; "
        f"{found.tokens_per_second:,.0f} tokens/s, FSDP2 at cp 2 "
        f"{by_fsdp2[2].tokens_per_second:,.0f}"
    )
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert sum(found.received.values()) > 0
    assert difference <= 2 * reference


@pytest.fixture(scope="module")
def first(gpus: RanksOf, root: Path) -> tuple[Gradients, Gradients]:
    """The first step's gradients in float64, and by FSDP2 in bfloat16."""
    settings = on_gpus(root, {})
    (exact,) = gpus(1).run(exact_gradients_on_a_gpu, settings)
    (plain,) = gpus(1).run(fsdp2_gradients_on_gpus, settings)
    return exact, plain


@pytest.mark.parametrize("stage", STAGES)
def test_first_gradients_are_as_near_to_float64_as_those_of_fsdp2(
    gpus: RanksOf, root: Path, first: tuple[Gradients, Gradients], stage: int
) -> None:
    exact, plain = first
    eps = torch.finfo(torch.bfloat16).eps
    for found in gpus(2).run(deepspeed_gradients, deepspeed(root, stage)):
        assert found.grads.keys() == exact.grads.keys() == plain.grads.keys()
        for name, grad in exact.grads.items():
            error, plain_error = (
                float((x.grads[name].double() - grad).abs().max()) for x in (found, plain)
            )
            bound = 2 * plain_error + 0.5 * eps * float(grad.abs().max())
            assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes_bit_for_bit(gpus: RanksOf, root: Path, stage: int) -> None:
    options = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0}
    folder = str(root / f"gpu-whole-deepspeed-{stage}")
    settings = deepspeed(root, stage, **options, folder=folder)
    whole, *_ = gpus(2).run(run_deepspeed, settings)
    half = broken_off(settings, root, f"gpu-half-deepspeed-{stage}", "step_00000006")
    result, *_ = gpus(2).run(run_deepspeed, replaced(half, "run", resume=True))
    assert result.losses == whole.losses[3:]
    assert result.grad_norms == whole.grad_norms[3:]
    assert result.validation_loss == whole.validation_loss

"""One step under DeepSpeed is the step of one process: stages, sizes, masks, dtypes, options.

By the rule of ``tests/ops/accuracy.py``, on weights after one step of SGD without clipping. The
rate is large, so that such a weight is its gradient, and a scale off by any factor shows. Where
weights are float32, activations are float64: what is left of rounding is that of gradients and of
their sums over micro-batches and ranks. In float32 that of the model itself would hide theirs: it
is up to twenty times as large, and differs with the order in which this processor's BLAS adds up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from operator import attrgetter
from typing import Any

import pytest
import torch

from tests.adapters.deepspeed.small_model import Case, Run, plain_step, stepped
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x
from tests.traps.mutation import Replaced, Rewritten, catches

pytest.importorskip("deepspeed")

from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from nsa_dist.adapters.deepspeed import scale_loss
from nsa_dist.adapters.deepspeed.loss import _ONLY_ENGINE

GetRanks = Callable[[int], Ranks]
FP32, BF16 = torch.float32, torch.bfloat16
RATE = 1e5

FACTORS = (range(4), (1, 2), (1, 2, 3, 4), (FP32, BF16))
# (stage, dp, cp, dtype): every pair of values of two factors is in some row.
PAIRWISE: list[tuple[int, int, int, torch.dtype]] = [
    (0, 1, 1, FP32),
    (0, 2, 2, BF16),
    (0, 1, 3, BF16),
    (0, 2, 4, FP32),
    (1, 2, 1, BF16),
    (1, 1, 2, FP32),
    (1, 2, 3, FP32),
    (1, 1, 4, BF16),
    (2, 1, 1, BF16),
    (2, 2, 2, FP32),
    (2, 1, 3, FP32),
    (2, 2, 4, BF16),
    (3, 2, 1, FP32),
    (3, 1, 2, BF16),
    (3, 2, 3, BF16),
    (3, 1, 4, FP32),
]
OTHERS = [row for row in product(*FACTORS) if row not in PAIRWISE]


def test_the_set_covers_every_pair() -> None:
    for a, b in combinations(range(len(FACTORS)), 2):
        assert {(row[a], row[b]) for row in PAIRWISE} == {*product(FACTORS[a], FACTORS[b])}


def name_of(row: tuple[int, int, int, torch.dtype]) -> str:
    stage, dp, cp, dtype = row
    return f"ZeRO{stage}-dp{dp}-cp{cp}-{str(dtype).removeprefix('torch.')}"


def _row(*row: Any) -> Any:
    """Six and more processes take long to start."""
    return pytest.param(row, marks=pytest.mark.slow if row[1] * row[2] > 4 else (), id=name_of(row))


def assert_a_step_of_one_process(ranks: Ranks, case: Case) -> None:
    if case.dtype == FP32:
        case = replace(case, compute=torch.float64)
    loss64, exact = plain_step(case, torch.float64)
    plain_loss, plain = plain_step(case, case.dtype)
    plain["loss"], exact["loss"] = (
        torch.tensor([plain_loss]),
        torch.tensor([loss64], dtype=torch.float64),
    )
    for loss, weights in ranks.run(stepped, case):
        weights["loss"] = torch.tensor([loss])
        assert weights.keys() == exact.keys()
        for name, x64 in exact.items():
            assert_2x(weights[name], plain[name], x64, case.dtype, name)


def counted_on_each_rank(count_targets: Any, batches: Any, mpu: Any) -> int:
    return count_targets(batches, mpu) * mpu.get_sequence_parallel_world_size()


@catches(
    "gradients divided by ranks that share a sequence",
    "ZeRO 3 is taken to divide by the replicas alone, as the other stages do",
    Rewritten(
        "nsa_dist.adapters.deepspeed:_divisor",
        "dist.get_world_size($MPU.get_sequence_data_parallel_group())",
        "$MPU.get_data_parallel_world_size()",
    ),
    case="ZeRO3-dp1-cp2-bfloat16",
)
@catches(
    "targets counted once for each rank that shares them",
    "the sum over ranks is not divided by those of a sequence",
    Replaced("nsa_dist.adapters.deepspeed:count_targets", counted_on_each_rank),
    case="ZeRO1-dp1-cp2-float32",
)
@pytest.mark.parametrize("row", [_row(*row) for row in PAIRWISE])
def test_one_step_is_that_of_one_process(
    deepspeed_ranks: GetRanks, row: tuple[int, int, int, torch.dtype]
) -> None:
    case = Case(*row, lr=RATE)
    assert_a_step_of_one_process(deepspeed_ranks(case.size), case)


@pytest.mark.slow
@pytest.mark.parametrize("row", OTHERS, ids=name_of)
def test_one_step_is_that_of_one_process_in_the_full_product(
    deepspeed_ranks: GetRanks, row: tuple[int, int, int, torch.dtype]
) -> None:
    case = Case(*row, lr=RATE)
    assert_a_step_of_one_process(deepspeed_ranks(case.size), case)


LARGEST = 512  # Elements of the largest parameter.
OFFLOADED = ("offload_optimizer", {"device": "cpu"})
ANY_OPTIMIZER = ("zero_force_ds_cpu_optimizer", False)  # Else DeepSpeed compiles one of its own.

OPTIONS: dict[str, Case] = {
    # What changes what DeepSpeed divides gradients by.
    "accumulation": Case(2, dp=2, cp=2, streams=4),
    "accumulation-ZeRO3": Case(3, dp=2, cp=2, streams=4),
    "ZeRO3-all-reduce": Case(3, dp=2, cp=2, zero=(("reduce_scatter", False),)),
    "ZeRO2-all-reduce": Case(2, dp=2, cp=2, zero=(("reduce_scatter", False),)),
    "prescaled": Case(0, dp=2, cp=2, options=(("prescale_gradients", True),)),
    "ZeRO3-all-reduce-of-one": Case(
        3, dp=2, cp=2, zero=(("reduce_scatter", False), ("reduce_bucket_size", LARGEST))
    ),
    "ZeRO3-all-reduce-without-a-bucket": Case(
        3, dp=2, cp=2, zero=(("reduce_scatter", False), ("contiguous_gradients", False))
    ),
    "ZeRO3-without-a-bucket": Case(3, dp=2, cp=2, zero=(("contiguous_gradients", False),)),
    "offload-ZeRO1": Case(1, dp=2, cp=2, streams=4, zero=(OFFLOADED,), options=(ANY_OPTIMIZER,)),
    "offload-ZeRO2": Case(2, dp=2, cp=2, streams=4, zero=(OFFLOADED,), options=(ANY_OPTIMIZER,)),
    "offload-ZeRO3": Case(3, dp=2, cp=2, streams=4, zero=(OFFLOADED,), options=(ANY_OPTIMIZER,)),
    "offload-ZeRO3-weights": Case(
        3,
        dp=2,
        cp=2,
        zero=(OFFLOADED, ("offload_param", {"device": "cpu"})),
        options=(ANY_OPTIMIZER,),
    ),
    "sums": Case(1, dp=2, cp=2, options=(("gradient_allreduce_op", "sum"),)),
    "sums-ZeRO0": Case(0, dp=2, cp=2, options=(("gradient_allreduce_op", "sum"),)),
    "zigzag": Case(3, cp=4, layout="zigzag"),
}
# What divides by the same number as another row.
SLOW_OPTIONS = (
    "ZeRO3-all-reduce-of-one",
    "ZeRO3-without-a-bucket",
    "offload-ZeRO1",
    "offload-ZeRO2",
    "sums-ZeRO0",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in SLOW_OPTIONS else ()) for x in OPTIONS],
)
def test_one_step_is_that_of_one_process_with_options(deepspeed_ranks: GetRanks, name: str) -> None:
    case = replace(OPTIONS[name], lr=RATE)
    assert_a_step_of_one_process(deepspeed_ranks(case.size), case)


def no_group(get_model_parallel_group: Any, mpu: Any) -> None:
    return None


@catches(
    "a gradient norm added over ranks that hold the same",
    "DeepSpeed is told of no model parallel group, and takes all ranks",
    Replaced("nsa_dist.adapters.deepspeed:SequenceParallelMPU.get_model_parallel_group", no_group),
    case="0",
)
@pytest.mark.parametrize("stage", range(4))
def test_clipping_takes_the_norm_of_one_process(deepspeed_ranks: GetRanks, stage: int) -> None:
    """DeepSpeed adds squared norms over the model parallel group, too."""
    case = Case(stage, dp=2, cp=2, lr=1.0)
    (_, before), (_, after) = (plain_step(replace(case, lr=lr), torch.float64) for lr in (0.0, 1.0))
    norm = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    clip = norm / 3
    clipped = replace(case, options=(("gradient_clipping", clip),))
    _, exact = plain_step(replace(case, lr=clip / norm), torch.float64)
    for _, weights in deepspeed_ranks(4).run(stepped, clipped):
        for name, x64 in exact.items():
            # The norm is rounded, and DeepSpeed adds 1e-6 to it.
            allowed = 1e-5 * float((x64 - before[name]).abs().max()) + 2e-7 * float(x64.abs().max())
            assert float((weights[name].double() - x64).abs().max()) <= allowed, name


def test_a_batch_without_targets_changes_nothing(deepspeed_ranks: GetRanks) -> None:
    for stage in (2, 3):
        case = Case(stage, dp=2, cp=2, lr=1.0, targets=False)
        _, before = plain_step(replace(case, lr=0.0), FP32)
        for _, weights in deepspeed_ranks(4).run(stepped, case):
            assert all(torch.equal(weights[name], before[name]) for name in before)


UNKNOWN: dict[str, tuple[Case, dict[str, Any], str]] = {
    # By option: a case, what is set in the engine where DeepSpeed could not build it here, and
    # what is said.
    "gradient_predivide_factor": (
        Case(0, cp=2, options=(("gradient_predivide_factor", 2.0),)),
        {},
        r"must be 1.0 for scale_loss, got 2.0",
    ),
    "zero_optimization.zero_quantized_gradients": (
        Case(3, cp=2, zero=(("zero_quantized_gradients", True),)),
        {},
        r"must be False for scale_loss, got True",
    ),
    "zero_optimization.zero_hpz_partition_size": (
        Case(3, cp=2, zero=(("zero_hpz_partition_size", 2),)),
        {},
        r"must be 1 for scale_loss, got 2",
    ),
    "zero_optimization.offload_optimizer.device": (
        Case(3, cp=2),
        {
            "_config.zero_config.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig(
                device="nvme"
            )
        },
        r"must be 'none' or 'cpu' for scale_loss, got 'nvme'",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        Case(3, cp=2, zero=(OFFLOADED,), options=(ANY_OPTIMIZER,)),
        {"_config.zero_config.offload_optimizer.super_offload": True},
        r"must be False for scale_loss, got True",
    ),
    "zero_optimization.offload_param.device": (
        Case(3, cp=2),
        {"_config.zero_config.offload_param": DeepSpeedZeroOffloadParamConfig(device="nvme")},
        r"must be 'none' or 'cpu' for scale_loss, got 'nvme'",
    ),
    "zero_optimization.zenflow": (
        Case(2, cp=2),
        {"_config.zero_config.zenflow": ZenFlowConfig()},
        r"must be None for scale_loss, got ZenFlowConfig",
    ),
    "compile.deepcompile": (
        Case(3, cp=2, options=(("compile", {"deepcompile": True}),)),
        {},
        r"must be False for scale_loss, got True",
    ),
    "tensor_parallel.autotp_size": (
        Case(1, cp=2),
        {"_config.tensor_parallel_config.autotp_size": 2},
        r"must be 0 or 1 for scale_loss, got 2",
    ),
    "MoE layers in the model": (
        Case(1, cp=2),
        {"has_moe_layers": True},
        r"must be False for scale_loss, got True",
    ),
    "zero_optimization.reduce_bucket_size": (
        Case(3, cp=2, zero=(("reduce_scatter", False), ("reduce_bucket_size", LARGEST - 1))),
        {},
        "must be at least 512, the elements of the largest parameter, .*, got 511",
    ),
    "mpu": (
        Case(0, cp=2, mpu=False),
        {},
        r"must be .*deepspeed.initialize\(mpu=make_mpu\(group\)\), got None",
    ),
}


def refused(case: Case, changes: dict[str, Any]) -> str:
    """On every rank: what ``scale_loss`` says."""
    run = Run(case)
    for path, value in changes.items():
        owner, _, name = path.rpartition(".")
        setattr(attrgetter(owner)(run.engine) if owner else run.engine, name, value)
    try:
        scale_loss(run.engine, torch.ones(()), 1)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("option", UNKNOWN)
def test_what_would_scale_gradients_otherwise_or_is_untried_is_refused(
    deepspeed_ranks: GetRanks, option: str
) -> None:
    case, changes, said = UNKNOWN[option]
    for message in deepspeed_ranks(2).run(refused, case, changes):
        assert re.match(f"{re.escape(option)} {said}", message), message


def test_each_refused_option_is_tested() -> None:
    assert {option for option, *_ in _ONLY_ENGINE} < UNKNOWN.keys()


def test_one_rank_to_a_sequence_goes_with_any_bucket(deepspeed_ranks: GetRanks) -> None:
    zero = (("reduce_scatter", False), ("reduce_bucket_size", LARGEST - 1))
    case = Case(3, dp=2, zero=zero, lr=RATE)
    assert_a_step_of_one_process(deepspeed_ranks(2), case)

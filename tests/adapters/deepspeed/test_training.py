"""One step under DeepSpeed is the step of one process: stages, sizes, masks, dtypes, options.

By the rule of ``tests/ops/accuracy.py``, on weights after one step of SGD without clipping. The
rate is large, so that such a weight is its gradient, and a scale off by any factor shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch

from tests.adapters.deepspeed.case import Case, plain_step, stepped
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x

pytest.importorskip("deepspeed")

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


def assert_a_step_of_one_process(ranks: Ranks, case: Case) -> None:
    loss64, exact = plain_step(case, torch.float64)
    _, plain = plain_step(case, case.dtype)
    for loss, weights in ranks.run(stepped, case):
        assert math.isclose(loss, loss64, rel_tol=10 * torch.finfo(case.dtype).eps)
        assert weights.keys() == exact.keys()
        for name, x64 in exact.items():
            assert_2x(weights[name], plain[name], x64, case.dtype, name)


@pytest.mark.parametrize("row", PAIRWISE, ids=name_of)
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


OPTIONS: dict[str, Case] = {
    # What changes what DeepSpeed divides gradients by.
    "accumulation": Case(2, dp=2, cp=2, streams=4),
    "accumulation-ZeRO3": Case(3, dp=2, cp=2, streams=4),
    "ZeRO3-all-reduce": Case(3, dp=2, cp=2, zero=(("reduce_scatter", False),)),
    "ZeRO2-all-reduce": Case(2, dp=2, cp=2, zero=(("reduce_scatter", False),)),
    "prescaled": Case(0, dp=2, cp=2, options=(("prescale_gradients", True),)),
    "sums": Case(1, dp=2, cp=2, options=(("gradient_allreduce_op", "sum"),)),
    "sums-ZeRO0": Case(0, dp=2, cp=2, options=(("gradient_allreduce_op", "sum"),)),
    "zigzag": Case(3, cp=4, layout="zigzag"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_step_is_that_of_one_process_with_options(deepspeed_ranks: GetRanks, name: str) -> None:
    case = replace(OPTIONS[name], lr=RATE)
    assert_a_step_of_one_process(deepspeed_ranks(case.size), case)


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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"options": (("gradient_predivide_factor", 2.0),)}, "gradient_predivide_factor: found 2"),
        ({"mpu": False}, r"mpu: found None; deepspeed.initialize\(mpu=make_mpu"),
    ],
)
def test_what_would_scale_gradients_otherwise_is_refused(
    deepspeed_ranks: GetRanks, changes: dict[str, Any], message: str
) -> None:
    answers = deepspeed_ranks(2).try_run(stepped, Case(0, cp=2, **changes))
    assert [not ok and re.search(message, text) is not None for ok, text in answers] == [True, True]

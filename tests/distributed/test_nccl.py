"""The layer on real GPUs over NCCL against one GPU and against the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nsa_dist import RotaryConfig
from tests.distributed.layer_case import (
    LayerCase,
    LayerResult,
    assert_results_close,
    run_layer,
    run_on_rank,
    variants,
)
from tests.distributed.ranks import Ranks

PACKED = (1, 60, 3, 97, 0, 45, 11)
CASES = {
    f"{layout}-{name}": LayerCase(layout=layout, lengths=lengths)
    for layout in ("contiguous", "zigzag", "zigzag_per_document")
    for name, lengths in (("one-document", None), ("packed", PACKED))
} | {
    "shared-kv-pre-rope": variants(
        LayerCase(lengths=PACKED, rotary=RotaryConfig(dim=4)),
        independent_kv=False,
        compress_pre_rope=True,
    ),
    "selected-only": variants(LayerCase(lengths=PACKED), branches=("selected",)),
    "recomputation": LayerCase(lengths=PACKED, checkpoint=True),
    "long-window": variants(LayerCase(lengths=PACKED), window=60),
}


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    size = torch.cuda.device_count()
    ranks = Ranks(size, timedelta(seconds=120), "nccl")
    yield ranks
    ranks.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_one_gpu_equals_cpu(name: str) -> None:
    case = CASES[name]
    found = run_layer(replace(case, device="cuda")).cpu()
    assert_results_close(found, run_layer(case), 1e-12)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", CASES)
def test_gpus_equal_one_rank(name: str, gpus: Ranks) -> None:
    case = CASES[name]
    found = gpus.run(run_on_rank, replace(case, device="cuda"))[0]
    assert_results_close(found, run_layer(replace(case, checkpoint=False)), 1e-12)


def repeated(case: LayerCase) -> bool:
    first, second = (run_layer(case, dist.group.WORLD) for _ in range(2))
    return all(torch.equal(first.grads[name], second.grads[name]) for name in first.grads) and (
        torch.equal(first.output, second.output)
        and torch.equal(first.grad_input, second.grad_input)
    )


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_repeat_bitwise(dtype: torch.dtype, gpus: Ranks) -> None:
    assert all(gpus.run(repeated, LayerCase(lengths=PACKED, dtype=dtype, device="cuda")))


def error_on_one_rank(case: LayerCase) -> str:
    # Windows that no rank has a plan for, else that rank would ask nobody.
    bad = variants(case, window=21 + dist.get_rank())
    try:
        run_layer(bad, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.multi_gpu
def test_disagreement_is_an_error_on_every_rank(gpus: Ranks) -> None:
    case = LayerCase(lengths=PACKED, device="cuda")
    for message in gpus.run(error_on_one_rank, case):
        assert "window" in message
        assert "rank 1" in message
    result: LayerResult = gpus.run(run_on_rank, case)[0]
    assert_results_close(result, run_layer(replace(case, device="cpu")), 1e-12)

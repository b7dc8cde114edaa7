"""Dense attention over GPUs and NCCL, on flash kernels in bfloat16.

``masked_dense`` is dense attention by torch in that dtype and in float64: the 2x rule judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nsa_dist.adapters.ring.flash import FLASH_WIDTH, flash_kind
from tests.adapters.ring.case import Case, Tensors, assert_right, masked_dense, on_ranks
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x

LARGE: dict[str, Any] = {"heads": 16, "kv_heads": 4, "head_dim": 64, "value_dim": 64}
PACKED = (300, 17, 0, 1025, 640, 131)
CASES = {
    "zigzag": Case("zigzag", length=2045, **LARGE),
    "zigzag-rows": Case("zigzag", batch=2, length=701, **LARGE),
    "zigzag-fp16-width-100": Case(
        "zigzag", torch.float16, length=701, heads=4, head_dim=100, value_dim=72
    ),
    "varlen": Case("zigzag_per_document", lengths=PACKED, **LARGE),
    "varlen-one-document": Case("zigzag_per_document", lengths=(2045,), **LARGE),
    "llama3": Case("contiguous", length=2045, **LARGE),
    "llama3-rows": Case("contiguous", batch=2, length=701, **LARGE),
    "llama3-packed": Case("contiguous", lengths=PACKED, **LARGE),
    "llama3-packed-mqa-128": Case(
        "contiguous", lengths=PACKED, heads=8, kv_heads=1, head_dim=128, value_dim=128
    ),
    "llama3-packed-fp32": Case("contiguous", torch.float32, lengths=PACKED, **LARGE),
}

pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def gpus() -> Iterator[Callable[[], Ranks]]:
    """One process a GPU, two at least, started at the first request."""
    started: list[Ranks] = []

    def get() -> Ranks:
        if not started:
            started.append(Ranks(torch.cuda.device_count(), timedelta(seconds=120), "nccl"))
        return started[0]

    yield get
    for ranks in started:
        ranks.close()


def on_gpus(case: Case) -> Tensors:
    found, received = on_ranks(case, dist.group.WORLD)
    assert received["ring"] > 0 and received["ring_grad"] > 0
    return found


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", CASES)
def test_ring_dense_is_torch_dense(gpus: Callable[[], Ranks], name: str) -> None:
    case = replace(CASES[name], device="cuda")
    for found in gpus().run(on_gpus, case):
        assert_right(case, found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_one_gpu_is_torch_dense(name: str) -> None:
    case = replace(CASES[name], device="cuda")
    found, _ = on_ranks(case)
    assert_right(case, found)


def repeated(case: Case) -> bool:
    """Whether the same call has the same bits, gradients included."""
    (first, _), (second, _) = (on_ranks(case, dist.group.WORLD) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["zigzag", "varlen", "llama3-packed"])
def test_gradients_repeat_bitwise(gpus: Callable[[], Ranks], name: str) -> None:
    assert all(gpus().run(repeated, replace(CASES[name], device="cuda")))


def error_on_ranks(case: Case) -> str:
    try:
        on_ranks(case, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.multi_gpu
def test_what_has_no_kernel_is_refused_on_every_rank(gpus: Callable[[], Ranks]) -> None:
    wide = Case("contiguous", head_dim=FLASH_WIDTH + 8, device="cuda")
    for message in gpus().run(error_on_ranks, wide):
        assert f"found {FLASH_WIDTH + 8}; at most {FLASH_WIDTH} works" in message
    for message in gpus().run(error_on_ranks, Case("zigzag", torch.float32, device="cuda")):
        assert "'contiguous' works in every dtype" in message


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [(130, 64, 0), (190, 64, 33)], ids=["square", "more-keys"])
def test_flash_kernels_of_torch_are_those_that_the_ring_expects(
    causal: bool, keys: tuple[int, ...]
) -> None:
    """Of packed documents with more keys than queries, by the plain kernels, also in float64."""
    from nsa_dist.adapters.ring.flash import PLAIN, TORCH, Bounds

    queries = (130, 64, 0)
    bounds = Bounds(
        *(torch.tensor([0, *x]).cumsum(0).int().cuda() for x in (queries, keys)),
        *(max(queries), max(keys)),
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), 8), (sum(keys), 2), (sum(keys), 2), (sum(queries), 8)]
    drawn = [torch.randn(*shape, 64, generator=generator).cuda().bfloat16() for shape in shapes]

    def run(kernels: Any, dtype: torch.dtype) -> Tensors:
        q, k, v, grad = (x.to(dtype) for x in drawn)
        out, lse = kernels.forward(q, k, v, bounds, 0.125, causal)
        grads = kernels.backward(grad, q, k, v, out, lse.contiguous(), bounds, 0.125, causal)
        return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))

    assert flash_kind(torch.device("cuda"), torch.bfloat16) != "plain"
    exact, plain = run(PLAIN, torch.float64), run(PLAIN, torch.bfloat16)
    for name, found in run(TORCH, torch.bfloat16).items():
        assert_2x(found, plain[name], exact[name], torch.bfloat16, name)


@pytest.mark.gpu
def test_masked_dense_is_what_torch_computes() -> None:
    """The reference of this file against ``scaled_dot_product_attention`` in float64."""
    case = replace(CASES["varlen"], device="cuda", dtype=torch.float64)
    found, _ = on_ranks(replace(case, layout="contiguous"))
    for name, exact in masked_dense(case, torch.float64).items():
        torch.testing.assert_close(found[name], exact.cpu(), rtol=1e-10, atol=1e-10)

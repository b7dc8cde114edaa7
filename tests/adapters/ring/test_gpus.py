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

from nsa_dist.adapters.ring.flash import FLASH_WIDTH, TORCH, Bounds
from tests.adapters.ring.attention_case import Case, Tensors, assert_right, masked_dense, on_ranks
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
        assert (
            f"width of heads must be at most {FLASH_WIDTH} on cuda, got {FLASH_WIDTH + 8}"
            in message
        )
    for message in gpus().run(error_on_ranks, Case("zigzag", torch.float32, device="cuda")):
        assert "layout must be 'contiguous'" in message and "torch.float32" in message


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [(130, 64), (190, 97)], ids=["as many keys", "more keys"])
def test_flash_kernels_of_torch_are_those_that_the_ring_expects(
    causal: bool, keys: tuple[int, ...]
) -> None:
    """Causal from the last query and key back, where a document has more keys than queries."""
    queries = (130, 64)
    bounds = Bounds(
        *(torch.tensor([0, *x]).cumsum(0).int().cuda() for x in (queries, keys)),
        *(max(queries), max(keys)),
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), 8), (sum(keys), 2), (sum(keys), 2), (sum(queries), 8)]
    drawn = [torch.randn(*shape, 64, generator=generator).cuda().bfloat16() for shape in shapes]

    def dense(dtype: torch.dtype) -> Tensors:
        q, k, v, grad = (x.to(dtype).requires_grad_() for x in drawn)
        pieces = []
        parts = zip(*(x.split(n) for x, n in ((q, queries), (k, keys), (v, keys))), strict=True)
        for q_part, k_part, v_part in parts:
            k_part, v_part = (x.repeat_interleave(4, 1) for x in (k_part, v_part))
            logits = torch.einsum("thd,shd->hts", q_part, k_part) * 0.125
            if causal:
                hidden = torch.ones_like(logits[0], dtype=torch.bool)
                later = hidden.triu(1 + k_part.shape[0] - q_part.shape[0])
                logits = logits.masked_fill(later, -torch.inf)
            pieces.append(torch.einsum("hts,shd->thd", logits.softmax(-1), v_part))
        out = torch.cat(pieces)
        grads = torch.autograd.grad(out, (q, k, v), grad.detach())
        return {"out": out} | dict(zip(("dq", "dk", "dv"), grads, strict=True))

    q, k, v, grad = drawn
    out, lse = TORCH.forward(q, k, v, bounds, 0.125, causal)
    grads = TORCH.backward(grad, q, k, v, out, lse.contiguous(), bounds, 0.125, causal)
    found = {"out": out} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    exact, plain = dense(torch.float64), dense(torch.bfloat16)
    for name, x64 in exact.items():
        assert_2x(found[name], plain[name], x64, torch.bfloat16, name)


@pytest.mark.gpu
def test_masked_dense_is_what_torch_computes() -> None:
    """The reference of this file against ``scaled_dot_product_attention`` in float64."""
    case = replace(CASES["varlen"], device="cuda", dtype=torch.float64)
    found, _ = on_ranks(replace(case, layout="contiguous"))
    for name, exact in masked_dense(case, torch.float64).items():
        torch.testing.assert_close(found[name], exact.cpu(), rtol=1e-10, atol=1e-10)

"""The dense layer and block: the same on any number of ranks, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nsa_dist import NSABlock, NSAConfig, make_sharding
from nsa_dist.adapters.ring import DenseAttention, DenseBlock, dense_attention, loading
from nsa_dist.adapters.ring.attention import _splits
from tests.adapters.ring.attention_case import Case, on_ranks
from tests.adapters.ring.layer_case import (
    CONFIG,
    HIDDEN,
    ROTARY,
    DenseCase,
    masked_layer,
    on_world,
    run_dense,
)
from tests.distributed.bad_call import Outcome, attempt, is_bad_rank
from tests.distributed.layer_case import assert_results_close
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x
from tests.traps.mutation import Rewritten, catches

RanksOf = Callable[[int], Ranks]
CASES = {
    "packed": DenseCase(),
    "rows": DenseCase(lengths=None),
    "bias-norm-rotary": DenseCase(options={"bias": True, "qk_norm": True, "rotary": ROTARY}),
    "no-rotary": DenseCase(options={"rotary": None}),
    "positions": DenseCase(shift=3),
    "dropout": DenseCase(options={"dropout": 0.3}),
    "recomputation": DenseCase(checkpoint=True),
    "block": DenseCase(block=True),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_does(ranks_of: RanksOf, name: str, size: int) -> None:
    found = ranks_of(size).run(on_world, CASES[name])[0]
    assert_results_close(found, run_dense(replace(CASES[name], checkpoint=False)), 1e-12)


@pytest.mark.parametrize("name", ["packed", "rows", "bias-norm-rotary", "no-rotary", "positions"])
def test_the_layer_is_a_masked_softmax(name: str) -> None:
    found, expected = run_dense(CASES[name]).output, masked_layer(CASES[name])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


RINGS = {
    "zigzag": DenseCase("zigzag", lengths=None, dtype=torch.bfloat16),
    "varlen": DenseCase("zigzag_per_document", (20, 31, 0, 39), torch.bfloat16),
}


@pytest.mark.parametrize("name", RINGS)
def test_the_rings_serve_the_layer(ranks_of: RanksOf, name: str) -> None:
    case = RINGS[name]
    found = ranks_of(2).run(on_world, case)[0]
    plain = run_dense(case)
    layer = case.layer().double()
    x, grad = (t.double().requires_grad_() for t in case.inputs())
    out = layer(x, cu_seqlens=case.cu_seqlens)
    out.backward(grad.detach())
    exact = {n: p.grad for n, p in layer.named_parameters()} | {"x": x.grad, "out": out.detach()}
    ours = found.grads | {"x": found.grad_input, "out": found.output}
    theirs = plain.grads | {"x": plain.grad_input, "out": plain.output}
    for key, x64 in exact.items():
        assert x64 is not None
        assert_2x(ours[key], theirs[key], x64, torch.bfloat16, key)


def test_autocast_runs_the_ring_in_its_dtype(ranks_of: RanksOf) -> None:
    case = DenseCase("zigzag", lengths=None, dtype=torch.float32, autocast=True)
    found = ranks_of(2).run(on_world, case)[0]
    expected = run_dense(case)
    assert found.output.dtype == torch.bfloat16
    error = float((found.output - expected.output).float().norm())
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * float(expected.output.float().norm())


def two_in_flight() -> bool:
    """Gradients of two forwards whose backwards come later, against one after another."""
    case = DenseCase()
    group = dist.group.WORLD
    layer = case.layer(group)
    x, _ = case.inputs()
    batches = []
    for lengths in (case.lengths, (91,)):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        sharding = make_sharding(91, cu_seqlens=bounds, layout=case.layout, group=group)
        batches.append((sharding.shard(x), sharding.cu_seqlens))
    apart = []
    for local, bounds in batches:
        layer.zero_grad()
        layer(local, cu_seqlens=bounds).square().sum().backward()
        apart.append([p.grad.clone() for p in layer.parameters()])
    layer.zero_grad()
    losses = [layer(local, cu_seqlens=bounds).square().sum() for local, bounds in batches]
    for loss in losses:
        loss.backward()
    sums = [a + b for a, b in zip(*apart, strict=True)]
    return all(torch.equal(p.grad, s) for p, s in zip(layer.parameters(), sums, strict=True))


def test_several_forwards_may_be_in_flight(ranks_of: RanksOf) -> None:
    assert all(ranks_of(2).run(two_in_flight))


def empty_stream() -> tuple[list[int], bool]:
    layer = DenseCase().layer(dist.group.WORLD)
    x = torch.zeros(2, 0, HIDDEN, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    return list(out.shape), all(p.grad is not None for p in layer.parameters())


def test_a_stream_of_no_tokens_works(ranks_of: RanksOf) -> None:
    assert ranks_of(2).run(empty_stream) == [([2, 0, HIDDEN], True)] * 2


def on_a_mesh(case: Case) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    by_mesh, by_group = (on_ranks(case, group)[0] for group in (mesh, dist.group.WORLD))
    return all(torch.equal(by_mesh[name], by_group[name]) for name in by_mesh)


def test_a_mesh_is_its_group(ranks_of: RanksOf) -> None:
    assert all(ranks_of(2).run(on_a_mesh, Case("contiguous", torch.float32, length=40)))


def splits_left() -> int:
    """Splits that are kept after many batches, each of other documents."""
    layer = DenseCase().layer(dist.group.WORLD)
    for first in range(1, 25):
        x = torch.zeros(1, 50 // dist.get_world_size(), HIDDEN, dtype=torch.float64)
        layer(x, cu_seqlens=torch.tensor([0, first, 50], dtype=torch.int32))
    return len(_splits)


def test_splits_go_with_their_plans(ranks_of: RanksOf) -> None:
    assert max(ranks_of(2).run(splits_left)) < 24


# What is refused.

BF16, F32 = torch.bfloat16, torch.float32
REFUSED: dict[str, tuple[str, bool, torch.dtype, str]] = {
    "zigzag-packed": (
        *("zigzag", True, BF16),
        "layout must be 'contiguous', or in bfloat16 or float16 'zigzag_per_document', ",
    ),
    "zigzag-float32": (
        *("zigzag", False, F32),
        "in torch.float32, where the ring's gradients are wrong, got 'zigzag'; 'zigzag' needs ",
    ),
    "zigzag-packed-float64": (
        *("zigzag", True, torch.float64),
        "layout must be 'contiguous' ",
    ),
    "per-document-rows": (
        *("zigzag_per_document", False, BF16),
        "or in bfloat16 or float16 'zigzag', for dense attention over several ranks without cu_seq",
    ),
    "per-document-float32": (
        *("zigzag_per_document", True, F32),
        "got 'zigzag_per_document'; 'zigzag_per_document' needs bfloat16 or float16",
    ),
    "unknown": (
        "striped",
        False,
        BF16,
        "layout must be one of 'contiguous', 'zigzag', 'zigzag_per_document', got 'striped'",
    ),
}


def refused(layout: str, packed: bool, dtype: torch.dtype) -> Outcome:
    q, k, v = (torch.zeros(1, 8, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    total = 8 * dist.get_world_size()
    bounds = torch.tensor([0, 8, total], dtype=torch.int32) if packed else None
    options: dict[str, Any] = {"layout": layout, "group": dist.group.WORLD}
    return attempt(lambda: dense_attention(q, k, v, cu_seqlens=bounds, **options))


@catches(
    "a ring's gradients in float32",
    "the zigzag rings take every dtype",
    Rewritten(
        "nsa_dist.adapters.ring:_layout_problem", "dtype not in FLASH_DTYPES", "dtype is None"
    ),
    case="zigzag-float32",
)
@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_without_algorithm_is_refused_on_every_rank(ranks_of: RanksOf, name: str) -> None:
    layout, packed, dtype, message = REFUSED[name]
    for outcome in ranks_of(2).run(refused, layout, packed, dtype):
        assert outcome.error == "ValueError"
        assert message in outcome.message, outcome.message
        assert outcome.seconds < 5


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"length": 6}, "sequence length"),
    "documents": ({"bounds": (0, 9, 16)}, "cu_seqlens"),
    "no-documents": ({"bounds": None}, "cu_seqlens"),
    "dtype": ({"dtype": F32}, "dtype"),
    "kv-heads": ({"kv_heads": 3}, "got shape (1, 8, 3, 8)"),
    "scale": ({"scale": 0.5}, "scale"),
    "key-width": ({"key_width": 4}, "got shape (1, 8, 2, 4)"),
    "layout": ({"layout": "zigzag"}, "layout"),
}


def bad_on_one_rank(bad: dict[str, Any]) -> tuple[Outcome, Outcome]:
    """A call with ``bad`` arguments on the last rank, then a good one."""

    def call(
        length: int = 8,
        bounds: Any = (0, 5, 16),
        dtype: torch.dtype = torch.float64,
        kv_heads: int = 2,
        key_width: int = 8,
        scale: float | None = None,
        layout: str = "contiguous",
    ) -> None:
        q = torch.zeros(1, length, 4, 8, dtype=dtype)
        k = torch.zeros(1, length, kv_heads, key_width, dtype=dtype)
        v = torch.zeros(1, length, kv_heads, 6, dtype=dtype)
        documents = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        more: dict[str, Any] = {"layout": layout, "group": dist.group.WORLD, "scale": scale}
        dense_attention(q, k, v, cu_seqlens=documents, **more)

    return attempt(lambda: call(**(bad if is_bad_rank() else {}))), attempt(call)


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_on_one_rank_is_an_error_on_every_rank(ranks_of: RanksOf, name: str) -> None:
    bad, message = BAD[name]
    twice = ranks_of(2).run(bad_on_one_rank, bad) + ranks_of(2).run(bad_on_one_rank, bad)
    for outcome, after in twice:
        assert outcome.error == "ValueError"
        assert message in outcome.message, outcome.message
        assert "rank 1" in outcome.message
        assert outcome.seconds < 5
        assert after.error is None, after.message


def stale_on_one_rank() -> Outcome:
    """Two batches that all know, of which the last rank takes the older one."""
    layer = DenseCase().layer(dist.group.WORLD)
    x = torch.ones(1, 8, HIDDEN, dtype=torch.float64)
    older, newer = (torch.tensor([0, at, 16], dtype=torch.int32) for at in (3, 5))
    for documents in (older, newer):
        layer(x, cu_seqlens=documents)
    return attempt(lambda: layer(x, cu_seqlens=older if is_bad_rank() else newer))


@catches(
    "a ring over ranks with unlike documents",
    "ranks agree on new plans alone",
    Rewritten(
        "nsa_dist.adapters.ring:dense_attention",
        "$CONTEXT.size > 1 or $PROBLEM is not None",
        "$PROBLEM is not None",
    ),
)
def test_a_rank_with_another_batch_is_an_error_on_every_rank(ranks_of: RanksOf) -> None:
    message = "cu_seqlens must be equal on all ranks, got rank 0: [0, 5, 16], rank 1: [0, 3, 16]"
    for outcome in ranks_of(2).run(stale_on_one_rank):
        assert outcome.error == "ValueError"
        assert message in outcome.message


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"layout": "striped"},
            "layout must be one of 'contiguous', 'zigzag', 'zigzag_per_document', got 'striped'",
        ),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"qk_norm": None}, "qk_norm must be True or False, got None"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive finite number, got 0.0"),
        ({"dropout": 1.0}, "dropout must be a probability in [0, 1), got 1.0"),
        ({"rotary": "none"}, "rotary must be a RotaryConfig or None, got 'none'"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"config": 3}, "config must be an NSAConfig, got 3"),
        ({"group": "world"}, "group must be a process group"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_when_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        DenseAttention(**{"hidden_size": HIDDEN, "config": CONFIG} | options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(1, 8, HIDDEN + 1)}, f"hidden_size={HIDDEN}], got"),
        ({"x": torch.zeros(1, 8, HIDDEN, dtype=torch.float64)}, "got torch.float64"),
        ({"x": None}, "x must be a plain tensor, got None"),
        ({"position_ids": torch.zeros(1, 7).long()}, "position_ids must be integers of shape"),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, "last boundary 7"),
    ],
    ids=["width", "dtype", "none", "positions", "documents"],
)
def test_bad_input_is_refused_on_one_rank_too(change: dict[str, Any], message: str) -> None:
    layer = DenseAttention(HIDDEN, CONFIG)
    with pytest.raises(ValueError) as error:
        layer(**{"x": torch.zeros(1, 8, HIDDEN)} | change)
    assert message in str(error.value)


def test_a_plan_of_another_call_is_refused() -> None:
    from nsa_dist.adapters.ring import get_dense_plan

    q = torch.zeros(1, 8, 4, 8)
    sizes = {"batch": 1, "local_length": 9, "cu_seqlens": None, "dtype": q.dtype}
    plan = get_dense_plan("zigzag", None, device=q.device, **sizes)
    with pytest.raises(ValueError, match=r"plan must be .* \(1, 8\), got one for \(1, 9\)"):
        dense_attention(q, q, q, plan=plan)


def without_the_package() -> list[Outcome]:
    group, q = dist.group.WORLD, torch.zeros(1, 8, 4, 8)
    original, loading.PACKAGE = loading.PACKAGE, "ring_flash_attn_that_is_not_there"
    try:
        return [
            attempt(lambda: dense_attention(q, q, q, layout="contiguous", group=group)),
            attempt(lambda: DenseBlock(HIDDEN, CONFIG, mlp_hidden=8, group=group)),
            attempt(lambda: DenseBlock(HIDDEN, CONFIG, mlp_hidden=8)),
        ]
    finally:
        loading.PACKAGE = original


def test_without_the_package_several_ranks_are_refused(ranks_of: RanksOf) -> None:
    for outcomes in ranks_of(2).run(without_the_package):
        assert [outcome.error for outcome in outcomes] == ["ValueError", "ImportError", None]
        assert all("pip install nsa-dist[ring]" in outcome.message for outcome in outcomes[:2])


def test_a_dense_block_is_built_as_that_of_nsa() -> None:
    config = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, independent_kv=False)
    options: dict[str, Any] = {"mlp_hidden": 40, "bias": True, "qk_norm": True}
    dense, sparse = DenseBlock(HIDDEN, config, **options), NSABlock(HIDDEN, config, **options)
    shapes = [{n: p.shape for n, p in block.named_parameters()} for block in (dense, sparse)]
    extra = {name for name in shapes[1] if "gate.proj" in name or "compressor" in name}
    assert shapes[0].keys() == shapes[1].keys() - extra
    norm = "attention.k_norm.weight"
    assert all(shapes[0][n] == shapes[1][n] for n in shapes[0] if n != norm)
    for block in (dense, sparse):
        torch.manual_seed(0)
        block.reset_parameters()
    assert torch.equal(dense.attention.q_proj.weight, sparse.attention.q_proj.weight)

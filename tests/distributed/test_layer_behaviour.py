"""What users of a layer over several ranks rely on besides its numbers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import make_sharding
from nsa_kernels.reference import ReferenceOptions, RotaryOptions, layer_reference
from tests.distributed.layer_case import (
    SMALL,
    LayerCase,
    LayerResult,
    assert_results_close,
    run_built_layer,
    run_layer,
    run_on_rank,
    variants,
)
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x
from tests.ops.in_order import ProductsInOrder

PACKED = LayerCase(lengths=(1, 60, 3, 97, 0, 45, 11))
LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")


def same_bits(a: LayerResult, b: LayerResult) -> bool:
    tensors = [(a.output, b.output), (a.grad_input, b.grad_input)]
    tensors += [(a.grads[name], b.grads[name]) for name in a.grads]
    return all(torch.equal(x, y) for x, y in tensors)


# --- the 2x rule in float32 -----------------------------------------------------------------------


def plain_and_exact(case: LayerCase, selected: Tensor) -> tuple[LayerResult, LayerResult]:
    """The oracle in float32 and in float64 on the same float32 weights, inputs and choices."""
    layer = case.layer()
    results = []
    for dtype in (torch.float32, torch.float64):
        params = {k: p.detach().to(dtype).requires_grad_() for k, p in layer.named_parameters()}
        x, grad = (t.to(dtype) for t in case.inputs())
        x.requires_grad_()
        result = layer_reference(
            x[0],
            params,
            ReferenceOptions.from_config(case.config),
            rotary=RotaryOptions.from_config(case.rotary),
            cu_seqlens=case.cu_seqlens,
            selected=selected[0],
        )
        result.output.backward(grad[0])
        grads = {k: p.grad for k, p in params.items() if p.grad is not None}
        assert x.grad is not None
        results.append(LayerResult(result.output.detach(), x.grad[0], grads, None, {}, {}))
    return results[0], results[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.accuracy), 4])
def test_float32_is_within_twice_plain_error(
    size: int, layout: str, ranks_of: Callable[[int], Ranks]
) -> None:
    case = replace(PACKED, layout=layout, dtype=torch.float32)
    assert_2x_of_plain(
        case, run_layer(case) if size == 1 else ranks_of(size).run(run_on_rank, case)[0]
    )


@pytest.mark.accuracy
def test_float32_is_within_twice_plain_error_with_products_in_order() -> None:
    """Whatever the BLAS: one document after the other adds up better than all of them at once."""
    case = replace(PACKED, dtype=torch.float32)
    with ProductsInOrder():
        assert_2x_of_plain(case, run_layer(case))


def assert_2x_of_plain(case: LayerCase, ours: LayerResult) -> None:
    assert ours.selected is not None
    plain, exact = plain_and_exact(case, ours.selected)
    assert case.cu_seqlens is not None
    bounds = case.cu_seqlens.tolist()
    for name, a, b, c in (
        ("output", ours.output[0], plain.output, exact.output),
        ("grad of input", ours.grad_input[0], plain.grad_input, exact.grad_input),
    ):
        assert_2x(a, b, c, torch.float32, name, cu_seqlens=bounds)
    for name, grad in ours.grads.items():
        assert_2x(grad, plain.grads[name], exact.grads[name], torch.float32, name)


# --- bits -----------------------------------------------------------------------------------------


def repeated(case: LayerCase) -> bool:
    group = dist.group.WORLD
    return same_bits(run_layer(case, group), run_layer(case, group))


def test_gradients_repeat_bitwise(ranks_of: Callable[[int], Ranks]) -> None:
    assert all(ranks_of(4).run(repeated, replace(PACKED, dtype=torch.float32)))


def forward_modes(case: LayerCase) -> bool:
    group = dist.group.WORLD
    layer = case.layer(group)
    x, _ = case.inputs()
    sharding = case.sharding(group)
    local = sharding.shard(x).requires_grad_()
    with_grad = layer(local, cu_seqlens=sharding.cu_seqlens)
    with torch.no_grad():
        without = layer(local, cu_seqlens=sharding.cu_seqlens)
    with torch.inference_mode():
        inference = layer(local, cu_seqlens=sharding.cu_seqlens)
    return torch.equal(with_grad, without) and torch.equal(with_grad, inference)


def test_forward_bits_do_not_depend_on_grad_mode(ranks_of: Callable[[int], Ranks]) -> None:
    assert all(ranks_of(2).run(forward_modes, replace(PACKED, dtype=torch.float32)))


def perturbed(case: LayerCase, document: int, position: int) -> tuple[Tensor, Tensor]:
    """Outputs before and after a document changes from a position on and all others become NaN."""
    group = dist.group.WORLD
    layer = case.layer(group)
    x, _ = case.inputs()
    bounds = case.cu_seqlens
    assert bounds is not None
    sharding = make_sharding(x.shape[1], cu_seqlens=bounds, layout=case.layout, group=group)
    outputs = []
    start, end = bounds[document : document + 2].tolist()
    changed = torch.full_like(x, torch.nan)
    changed[:, start:end] = torch.randn_like(x[:, start:end]) * 50
    changed[:, start : start + position] = x[:, start : start + position]
    for values in (x, changed):
        out = layer(sharding.shard(values), cu_seqlens=sharding.cu_seqlens)
        outputs.append(sharding.unshard(out)[:, start : start + position])
    return outputs[0], outputs[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 4])
def test_later_tokens_and_other_documents_change_no_bit(
    size: int, layout: str, ranks_of: Callable[[int], Ranks]
) -> None:
    case = replace(PACKED, layout=layout, dtype=torch.float32)
    ranks = ranks_of(size)
    for document, position in ((3, 96), (3, 40), (1, 1), (5, 33)):
        before, after = ranks.run(perturbed, case, document, position)[0]
        assert before.shape[1] == position
        assert torch.equal(before, after)


# --- several at once ------------------------------------------------------------------------------


def in_flight(cases: list[LayerCase]) -> bool:
    """Forwards of all cases first, then their backwards in another order."""
    group = dist.group.WORLD
    expected = [run_layer(case, group) for case in cases]
    pending = []
    for case in cases:
        layer = case.layer(group)
        x, grad = case.inputs()
        sharding = case.sharding(group)
        local = sharding.shard(x).requires_grad_()
        out = layer(local, cu_seqlens=sharding.cu_seqlens)
        pending.append((layer, out, sharding.shard(grad), local, sharding))
    ok = True
    for (layer, out, grad, local, sharding), result in zip(pending, expected, strict=True):
        out.backward(grad)
        ok &= torch.equal(sharding.unshard(out), result.output)
        assert local.grad is not None
        ok &= torch.equal(sharding.unshard(local.grad), result.grad_input)
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=group)
            ok &= torch.equal(parameter.grad, result.grads[name])
    return ok


def test_several_forwards_before_their_backwards(ranks_of: Callable[[int], Ranks]) -> None:
    cases = [PACKED, replace(PACKED, layout="contiguous", lengths=(40, 100)), LayerCase(seed=3)]
    assert all(ranks_of(2).run(in_flight, cases))


def mesh_run(case: LayerCase) -> LayerResult | None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    layer = case.layer(mesh["cp"])
    group = mesh["cp"].get_group()
    return run_built_layer(layer, case, group)


def test_a_device_mesh_axis_is_a_group(ranks_of: Callable[[int], Ranks]) -> None:
    expected = run_layer(PACKED)
    for result in ranks_of(4).run(mesh_run, PACKED):
        assert_results_close(result, expected, 1e-12)


def after_the_end_of_its_group(case: LayerCase) -> tuple[bool, str]:
    """Whether a destroyed group lives on beside its layer and graph, and the error of a call."""
    group = dist.new_group()
    layer = case.layer(group)
    x, grad = case.inputs()
    sharding = case.sharding(group)
    local = sharding.shard(x).requires_grad_()
    out = layer(local, cu_seqlens=sharding.cu_seqlens)
    out.backward(sharding.shard(grad))
    alive = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    with pytest.raises(ValueError) as error:
        layer(local, cu_seqlens=sharding.cu_seqlens)
    return alive() is not None and out is not None, str(error.value)


def test_nothing_keeps_a_destroyed_group(ranks_of: Callable[[int], Ranks]) -> None:
    """Its threads would live until the interpreter exits, and may abort it there."""
    for alive, error in ranks_of(2).run(after_the_end_of_its_group, PACKED):
        assert not alive
        assert error == "group must be a process group in use, got one that was destroyed"


def accumulated(case: LayerCase) -> LayerResult:
    """Two backwards into the same gradients."""
    group = dist.group.WORLD
    layer = case.layer(group)
    run_built_layer(layer, case, group)
    return run_built_layer(layer, case, group)


def test_recomputation_on_one_rank() -> None:
    assert_results_close(run_layer(replace(PACKED, checkpoint=True)), run_layer(PACKED), 1e-12)


def test_gradients_accumulate(ranks_of: Callable[[int], Ranks]) -> None:
    expected = run_layer(PACKED)
    expected.grads = {name: 2 * grad for name, grad in expected.grads.items()}
    assert_results_close(ranks_of(2).run(accumulated, PACKED)[0], expected, 1e-12)


# --- dtypes, devices, copies ----------------------------------------------------------------------


def autocast_run(case: LayerCase) -> tuple[torch.dtype, Tensor, bool]:
    group = dist.group.WORLD
    layer = case.layer(group)
    x, _ = case.inputs()
    sharding = make_sharding(x.shape[1], layout=case.layout, group=group)
    local = sharding.shard(x).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(local)
    out.float().square().mean().backward()
    finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    return out.dtype, sharding.unshard(out).float(), finite


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
def test_autocast(qk_norm: bool, ranks_of: Callable[[int], Ranks]) -> None:
    case = LayerCase(dtype=torch.float32, qk_norm=qk_norm)
    plain = run_layer(case).output
    scale = float(plain.abs().max())
    for dtype, out, finite in ranks_of(2).run(autocast_run, case):
        assert dtype == torch.bfloat16
        assert finite
        # 16-bit projections may flip a choice of block, so only the size of the error is held.
        assert float((out - plain).abs().mean()) < 0.02 * scale


def bfloat16_run(case: LayerCase) -> tuple[torch.dtype, set[torch.dtype]]:
    result = run_layer(case, dist.group.WORLD)
    return result.output.dtype, {grad.dtype for grad in result.grads.values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_in_sixteen_bit_out(
    dtype: torch.dtype, ranks_of: Callable[[int], Ranks]
) -> None:
    for answer in ranks_of(2).run(bfloat16_run, replace(PACKED, dtype=dtype)):
        assert answer == (dtype, {dtype})


def test_deep_copies_share_the_group(ranks_of: Callable[[int], Ranks]) -> None:
    assert all(ranks_of(2).run(copied, PACKED))


def copied(case: LayerCase) -> bool:
    group = dist.group.WORLD
    layer = case.layer(group)
    twin = copy.deepcopy(layer)
    first, second = (run_built_layer(one, case, group) for one in (layer, twin))
    return same_bits(first, second)


# --- dropout --------------------------------------------------------------------------------------


def dropout_run(case: LayerCase) -> Tensor:
    group: Any = dist.group.WORLD if dist.get_world_size() > 1 else None
    layer = case.layer(group, dropout=0.4)
    x, _ = case.inputs()
    sharding = case.sharding(group)
    torch.manual_seed(11)
    return sharding.unshard(layer(sharding.shard(x), cu_seqlens=sharding.cu_seqlens))


@pytest.mark.parametrize("case", [PACKED, LayerCase(batch=2)], ids=["packed", "two-rows"])
def test_dropout_does_not_depend_on_the_split(
    case: LayerCase, ranks_of: Callable[[int], Ranks]
) -> None:
    expected = ranks_of(1).run(dropout_run, case)[0]
    dropped = (expected == 0).double()
    assert abs(float(dropped.mean()) - 0.4) < 0.02
    # Neither tokens nor channels share a mask.
    assert float(dropped.mean(-1).std()) < 0.2
    assert len({tuple(row) for row in dropped[0].tolist()}) > 0.9 * dropped.shape[1]
    for layout in LAYOUTS:
        out = ranks_of(4).run(dropout_run, replace(case, layout=layout))[0]
        assert torch.equal(out == 0, expected == 0)
        assert torch.allclose(out, expected, rtol=1e-12, atol=1e-14)


def test_dropout_draws_anew_and_rests_in_evaluation() -> None:
    layer = LayerCase(length=64).layer(dropout=0.5)
    x, _ = LayerCase(length=64).inputs()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --- choices --------------------------------------------------------------------------------------


def test_details() -> None:
    case = variants(PACKED, branches=("compressed", "selected"))
    layer = case.layer()
    x, _ = case.inputs()
    out, details = layer(x, cu_seqlens=case.cu_seqlens, return_details=True)
    assert torch.equal(out, layer(x, cu_seqlens=case.cu_seqlens))
    tokens = x.shape[1]
    assert details.selected.shape == (1, tokens, SMALL.num_kv_heads, SMALL.num_selected)
    assert details.selected.dtype == torch.int32
    assert details.gates.shape == (1, tokens, SMALL.num_heads, 2)
    assert set(details.lse) == {"compressed", "selected"}
    assert details.lse["compressed"].shape == (1, tokens, SMALL.num_heads)
    assert details.lse["compressed"][0, 0, 0] == -torch.inf

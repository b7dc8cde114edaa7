"""Another way to choose blocks goes in by the selector alone: flow, fetch and kernels stay.

The one here pools the keys of each selection block, and a group chooses the blocks whose pooled key
its queries like most. It has no branch of its own, and weights that only choose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist import NativeSparseAttention, NSAConfig, get_plan, native_sparse_attention
from nsa_dist.attention.call import Call
from nsa_dist.attention.selectors import Selection
from nsa_dist.comm import Work, begin_gather
from nsa_dist.plan import Grid
from nsa_kernels.reference import ReferenceOptions, RotaryOptions, layer_reference
from tests.distributed.layer_case import (
    HIDDEN,
    LayerCase,
    LayerResult,
    assert_results_close,
    assert_sparse_and_remote,
    run_layer,
    variants,
)
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x, plain_dtype

PACKED = (1, 60, 3, 97, 0, 45, 11)


class PooledSelector(nn.Module):
    """Blocks by the mean of their keys, scaled by a weight [G, D] of its own."""

    name, branch = "pooled", None

    def __init__(self, config: NSAConfig, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (config.num_kv_heads, config.head_dim)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, shape[0] * shape[1]).view(shape))
        self.to(dtype)

    def grids(self, config: NSAConfig) -> Mapping[str, Grid]:
        block = config.select_block
        return {"pooled": Grid("selected", block, block, whole=False)}

    def stated(self) -> Mapping[str, str]:
        return {}

    def problem(self, call: Call) -> str | None:
        return None

    def begin(
        self, call: Call, extended: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Work[tuple[Tensor, Tensor]]:
        blocks, k_ext = call.plan.grids["pooled"], extended["selected"][0]
        lengths = blocks.lengths[blocks.own_ids]
        offsets = torch.arange(call.config.select_block, device=k_ext.device)
        inside = offsets < lengths[:, None]
        rows = torch.where(inside, blocks.own_rows[:, None] + offsets, 0)
        total = (k_ext[rows] * inside[..., None, None]).sum(1)
        pooled = total / lengths[:, None, None].to(total) * self.weight
        return begin_gather(pooled, pooled[..., :0], blocks, call.channel)

    def select(self, call: Call, q_NHD: Tensor, gathered: tuple[Tensor, Tensor]) -> Selection:
        config, blocks, pooled = call.config, call.plan.grids["pooled"], gathered[0]
        base = blocks.bases[:, None, None]
        own = call.plan.positions[:, None, None] // config.select_block
        with torch.no_grad():
            q_NGD = q_NHD.unflatten(1, (config.num_kv_heads, -1)).sum(2)
            scores = torch.einsum("ngd,cgd->ngc", q_NGD.double(), pooled.double())
            index = torch.arange(blocks.total, device=q_NHD.device) - base
            seen = (index >= 0) & (index <= own)
            scores = scores.masked_fill(~seen, -torch.inf).masked_fill(index == own, torch.inf)
            missing = config.num_selected - blocks.total
            if missing > 0:
                scores = nn.functional.pad(scores, (0, missing), value=-torch.inf)
            best = scores.topk(config.num_selected)
            none = torch.iinfo(torch.int32).max
            chosen = torch.where(best.values > -torch.inf, best.indices - base, none)
            chosen = chosen.sort(-1).values
            chosen = torch.where(chosen == none, -1, chosen).int()
        return Selection(chosen, gathered={"pooled keys": pooled}, unused=(pooled,))


class LongChoice(PooledSelector):
    """Gives block numbers of a dtype that the kernels do not read."""

    def select(self, call: Call, q_NHD: Tensor, gathered: tuple[Tensor, Tensor]) -> Selection:
        chosen = super().select(call, q_NHD, gathered)
        assert chosen.blocks is not None
        return replace(chosen, blocks=chosen.blocks.long())


def pooled(case: LayerCase) -> PooledSelector:
    return PooledSelector(case.config, case.dtype)


BASE = variants(
    LayerCase(lengths=PACKED),
    branches=("selected", "window"),
    compress="mean",
    num_init_blocks=0,
    num_local_blocks=1,
    num_selected=3,
)
CASES = {
    "independent": BASE,
    "shared": variants(BASE, independent_kv=False),
    "contiguous": replace(BASE, layout="contiguous"),
    "zigzag-per-document": replace(BASE, layout="zigzag_per_document"),
    "selected-only": variants(BASE, branches=("selected",)),
    "recomputed": replace(BASE, checkpoint=True),
}


def run(case: LayerCase, group: Any = None) -> LayerResult:
    return run_layer(case, group, selector=pooled(case))


def on_rank(case: LayerCase) -> LayerResult | None:
    result = run(case, dist.group.WORLD)
    return result.cpu() if dist.get_rank() == 0 else None


@functools.cache
def on_one_rank(case: LayerCase) -> LayerResult:
    return run(replace(case, checkpoint=False))


def by_definition(case: LayerCase, selected: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of the oracle's plain code in ``dtype``, given the choices."""
    layer = case.layer(selector=pooled(case)).to(dtype)
    params = {
        name: p.detach().clone().requires_grad_()
        for name, p in layer.named_parameters()
        if name != "selector.weight"
    }
    given = dict(params)
    if case.config.independent_kv:
        # The oracle has keys for its own choice, which is not asked for.
        unread = given["k_proj.weight"].new_zeros(
            case.config.num_kv_heads * case.config.head_dim, HIDDEN
        )
        given["k_proj.weight"] = torch.cat((unread, given["k_proj.weight"]))
    x, grad = (tensor.to(dtype) for tensor in case.inputs())
    x.requires_grad_()
    result = layer_reference(
        x[0],
        given,
        ReferenceOptions.from_config(case.config),
        rotary=RotaryOptions.from_config(case.rotary),
        cu_seqlens=case.cu_seqlens,
        selected=selected[0],
    )
    result.output.backward(grad[0])
    assert x.grad is not None
    grads = {name: p.grad for name, p in params.items() if p.grad is not None}
    return {"output": result.output.detach()[None], "grad of input": x.grad, **grads}


@pytest.mark.parametrize("name", CASES)
def test_one_rank_equals_the_oracle(name: str) -> None:
    case = CASES[name]
    found = on_one_rank(case)
    assert found.selected is not None
    assert_sparse_and_remote(case, found, 1)
    expected = by_definition(case, found.selected, torch.float64)
    given = {"output": found.output, "grad of input": found.grad_input, **found.grads}
    assert not given.pop("selector.weight").any()
    for tensor, value in expected.items():
        assert torch.allclose(given[tensor], value, rtol=0, atol=1e-12 * float(value.abs().max()))
    assert given.keys() == expected.keys()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_rank(name: str, size: int, ranks_of: Callable[[int], Ranks]) -> None:
    case, expected = CASES[name], on_one_rank(CASES[name])
    found = ranks_of(size).run(on_rank, case)[0]
    if not case.checkpoint:
        assert torch.equal(found.selected, expected.selected)
        assert_sparse_and_remote(case, found, size)
    assert_results_close(found, expected, 1e-12)
    assert found.received["gather"] > 0 and found.received["gather_grad"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize(
    "size", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2))]
)
def test_triton(size: int, ranks_of: Callable[[int], Ranks]) -> None:
    pytest.importorskip("triton")
    base = variants(BASE, head_dim=16, v_head_dim=16, select_block=16, window=20)
    case = replace(base, lengths=(5, 100, 19), dtype=torch.float32, backend="triton")
    if size == 1:
        found = run(case)
    else:
        found = ranks_of(size).run(on_rank, case)[0]
    assert found.selected is not None
    assert torch.equal(found.selected, on_one_rank(replace(case, backend="pytorch")).selected)
    # On the weights and inputs of float32.
    exact = by_definition(case, found.selected, torch.float64)
    plain = by_definition(case, found.selected, plain_dtype(torch.float32))
    given = {"output": found.output, "grad of input": found.grad_input, **found.grads}
    for name, value in exact.items():
        assert_2x(given[name], plain[name], value, torch.float32, name)


def test_refusals() -> None:
    config = BASE.config
    compressor = nn.Identity()
    with pytest.raises(ValueError, match=r"^k_compressor must be None"):
        NativeSparseAttention(HIDDEN, config, k_compressor=compressor, selector=pooled(BASE))
    q = torch.randn(1, 8, 4, 8, dtype=torch.float64)
    kv = {b: torch.randn(1, 8, 2, 8, dtype=torch.float64) for b in config.branches}
    v = {b: x[..., :6] for b, x in kv.items()}
    gates = torch.rand(1, 8, 4, 2)
    plan = get_plan(
        config,
        "zigzag",
        None,
        batch=1,
        local_length=8,
        cu_seqlens=None,
        dtype=q.dtype,
        device=q.device,
    )
    options: dict[str, Any] = {"config": config, "selector": pooled(BASE)}
    assert native_sparse_attention(q, kv, v, gates, **options).shape == (1, 8, 4, 6)
    with pytest.raises(ValueError, match=r"^plan must be one for blocks \['pooled', 'selected'\]"):
        native_sparse_attention(q, kv, v, gates, plan=plan, **options)
    with pytest.raises(ValueError, match=r"^k must map \('selected', 'window'\)"):
        native_sparse_attention(q, kv | {"compressed": kv["window"]}, v, gates, **options)
    unused = "^k_compressor and v_compressor must be None with a selector"
    with pytest.raises(ValueError, match=unused):
        native_sparse_attention(q, kv, v, gates, compressor, **options)
    branches = replace(config, branches=("compressed", "selected"))
    said = r"^branches must be among \('selected', 'window'\) with selector 'pooled', got"
    with pytest.raises(ValueError, match=said):
        NativeSparseAttention(HIDDEN, branches, selector=pooled(BASE))
    with pytest.raises(ValueError, match=said):
        native_sparse_attention(q, kv, v, gates, **{**options, "config": branches})
    wrong = LongChoice(config, torch.float64)
    with pytest.raises(ValueError, match=r"^blocks of selector 'pooled' must be torch.int32"):
        native_sparse_attention(q, kv, v, gates, config=config, selector=wrong)

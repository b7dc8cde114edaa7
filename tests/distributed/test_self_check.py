"""The self-check: silent on what is right, and names the layer and the tensor of what is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa_dist import NSABlock, NSAConfig, ParallelReport, check_parallel, make_sharding
from nsa_dist.attention.call import Call
from tests.distributed.layer_case import HIDDEN, SMALL, LayerCase
from tests.distributed.ranks import Ranks
from tests.distributed.test_selectors import PooledSelector

RanksOf = Callable[[int], Ranks]


@dataclass(frozen=True)
class Case(LayerCase):
    """A model of two blocks on the case's stream.

    Args:
        broken: what is broken, and in which block; see ``BREAKS``.
        sharded_as: layout of the tokens, where it is not the layers'.
        tells_sharding: whether the check is told how tokens were split.
        rows: queries that are compared.
        own: the part that is a user's own, selector or compressors.
    """

    broken: str = ""
    sharded_as: str = ""
    tells_sharding: bool = True
    rows: int | None = None
    recompute: bool = False
    own: str = ""
    autocast: bool = False


class Mean(nn.Module):
    """A compressor of a user's own, with a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, blocks: Tensor) -> Tensor:
        return self.scale(blocks.mean(2)[..., None])[..., 0]


class Model(nn.Module):
    def __init__(self, case: Case, group: Any) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        options: dict[str, Any] = {"layout": case.layout, "group": group, "backend": case.backend}
        own: dict[str, Callable[[], dict[str, nn.Module]]] = {
            "": dict,
            "selector": lambda: {"selector": PooledSelector(case.config, torch.float64)},
            "compressors": lambda: {"k_compressor": Mean(), "v_compressor": Mean()},
        }
        self.blocks = nn.ModuleList(
            NSABlock(
                HIDDEN,
                case.config,
                mlp_hidden=32,
                dtype=torch.float64,
                **options,
                **own[case.own](),
            )
            for _ in range(2)
        )
        self.to(case.device, case.dtype)
        self.recompute = case.recompute

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, cu_seqlens=cu_seqlens, use_reentrant=False)
            else:
                x = block(x, cu_seqlens=cu_seqlens)
        return x


def moved_halo(call: Call, name: str) -> Call:
    """Received tokens stand in each other's rows."""
    halo = call.plan.halos[name]
    rows = halo.recv_rows.flip(0)
    halos = {**call.plan.halos, name: replace(halo, recv_rows=rows)}
    return replace(call, plan=replace(call.plan, halos=halos))


def moved_blocks(call: Call) -> Call:
    """A rank takes another place for the start of its selection blocks, by one token."""
    grid = call.plan.grids["selected"]
    grids = {**call.plan.grids, "selected": replace(grid, own_rows=(grid.own_rows - 1).clamp(0))}
    return replace(call, plan=replace(call.plan, grids=grids))


def swapped_blocks(call: Call) -> Call:
    """Gathered compressed tokens come in another order."""
    grid = call.plan.grids["compressed"]
    rows = grid.gathered_rows.clone()
    rows[:4] = rows[:4].flip(0)
    grids = {**call.plan.grids, "compressed": replace(grid, gathered_rows=rows)}
    return replace(call, plan=replace(call.plan, grids=grids))


def lost_gradients(own: tuple[Tensor, Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    """What other ranks return is dropped."""
    return own


BREAKS: dict[str, Callable[[Call], Call]] = {
    "halo of the window": partial(moved_halo, name="window"),
    "halo of compression": partial(moved_halo, name="compressed"),
    "selection blocks": moved_blocks,
    "gathered blocks": swapped_blocks,
}


def checked(case: Case) -> ParallelReport:
    group = dist.group.WORLD
    model = Model(case, group)
    if case.broken in BREAKS:
        attention: Any = model.blocks[1].attention
        make = attention._call
        attention._call = lambda *given: BREAKS[case.broken](make(*given))
    if case.broken == "weights" and dist.get_rank() == 1:
        with torch.no_grad():
            model.blocks[1].attention.v_compressor.down.mul_(1.5)
    sharding = make_sharding(
        case.whole_shape[1],
        cu_seqlens=case.cu_seqlens,
        layout=case.sharded_as or case.layout,
        group=group,
    )
    x, grad = (sharding.shard(x) for x in case.inputs())
    told = sharding if case.tells_sharding else None

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            out = model(x, sharding.cu_seqlens)
        out.backward(grad.to(out.dtype))

    if case.broken == "returned gradients of the fetch":
        with mock.patch("nsa_dist.comm.fetch.add_returned", lost_gradients):
            return check_parallel(model, run, told, rows=case.rows)
    return check_parallel(model, run, told, rows=case.rows)


RIGHT = {
    "contiguous": Case(layout="contiguous", length=160),
    "zigzag": Case(),
    "batch": Case(batch=2, length=72),
    "packed-per-document": Case(layout="zigzag_per_document", lengths=(61, 9, 40, 1)),
    "packed-zigzag": Case(lengths=(61, 9, 40)),
    "plan-alone": Case(lengths=(61, 9, 40), tells_sharding=False),
    "shared": Case(config=replace(SMALL, independent_kv=False)),
    "window-alone": Case(config=replace(SMALL, branches=("window",))),
    "pre-rope-linear": Case(config=replace(SMALL, compress_pre_rope=True, compress="linear")),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    "autocast": Case(dtype=torch.float32, autocast=True),
    "recomputed": Case(recompute=True),
    "own-selector": Case(
        config=replace(SMALL, branches=("selected", "window"), compress="mean"), own="selector"
    ),
    "own-compressors": Case(config=replace(SMALL, compress="custom"), own="compressors"),
    "sampled": Case(lengths=(61, 9, 140), rows=40),
    "sampled-pre-rope": Case(config=replace(SMALL, compress_pre_rope=True), rows=40),
}


LONGER = ("contiguous", "packed-zigzag", "shared", "pre-rope-linear", "sampled-pre-rope")
RUNS = [
    pytest.param(name, 2 + 2 * (at % 2), marks=[pytest.mark.slow] * (name in LONGER))
    for at, name in enumerate(RIGHT)
]


@pytest.mark.parametrize(("name", "size"), [*RUNS, ("zigzag", 2)])
def test_a_right_model_differs_by_rounding_alone(size: int, name: str, ranks_of: RanksOf) -> None:
    case = RIGHT[name]
    reports = ranks_of(size).run(checked, case)
    assert all(report == reports[0] for report in reports)
    report = reports[0]
    assert report.ok, str(report)
    report.raise_if_different()
    assert {one.layer for one in report.differences} == {
        "blocks.0.attention",
        "blocks.1.attention",
    }
    tensors = set(report.largest)
    assert tensors >= {"out", "grad of q", "grad of gates"}
    assert ("positions" in tensors) == case.tells_sharding
    if "compressed" in case.config.branches:
        assert "blocks" in tensors
        assert any(name.startswith("grad of k_compressor.") for name in tensors)
    done, total = report.queries
    assert done == total if case.rows is None else 20 <= done <= 80


BROKEN = {
    # broken, the first tensor that is told
    "halo of the window": "out",
    "halo of compression": "out",
    "selection blocks": "out",
    "gathered blocks": "blocks",
    "returned gradients of the fetch": "grad of k, selected",
    "weights": "out",
}


@pytest.mark.parametrize(
    ("broken", "size", "rows"),
    [
        *((broken, 2 + 2 * (at % 2), None) for at, broken in enumerate(BROKEN)),
        *(
            pytest.param(broken, 4 - 2 * (at % 2), None, marks=[pytest.mark.slow] * (at > 0))
            for at, broken in enumerate(BROKEN)
        ),
        ("halo of compression", 2, 60),
        ("selection blocks", 4, 60),
    ],
)
def test_what_is_broken_is_told_by_layer_and_tensor(
    size: int, broken: str, rows: int | None, ranks_of: RanksOf
) -> None:
    case = Case(length=160, broken=broken, rows=rows)
    report = ranks_of(size).run(checked, case)[0]
    assert not report.ok
    everywhere = broken == "returned gradients of the fetch"
    layers = {one.layer for one in report.failures}
    # The block before the broken one is right: gradients that it gets are taken as they are.
    assert layers == ({"blocks.0.attention"} if everywhere else set()) | {"blocks.1.attention"}
    named = [one.tensor for one in report.failures if one.layer == "blocks.1.attention"]
    assert BROKEN[broken] in named, str(report)
    with pytest.raises(ValueError, match=rf"{named[0]} of blocks\.1\.attention differs by"):
        report.raise_if_different()
    assert "WRONG" in str(report)


@pytest.mark.parametrize(("layout", "size"), [("zigzag", 2), ("zigzag_per_document", 4)])
def test_tokens_of_another_layout_are_told(size: int, layout: str, ranks_of: RanksOf) -> None:
    case = Case(layout=layout, sharded_as="contiguous", length=160)
    report = ranks_of(size).run(checked, case)[0]
    assert report.failures[0].tensor == "positions"
    assert {one.layer for one in report.failures} == {"blocks.0.attention", "blocks.1.attention"}
    assert "out" in {one.tensor for one in report.failures}


def refused(what: str) -> str:
    case, group = Case(length=160), dist.group.WORLD
    model, sharding = Model(case, group), make_sharding(160, group=group)
    chooser = Model(RIGHT["own-selector"], group)
    other = make_sharding(80, group=group)
    x = sharding.shard(case.inputs()[0])

    def twice() -> None:
        model(model(x, None), None)

    calls: dict[str, Callable[[], Any]] = {
        "no layer": lambda: check_parallel(model, lambda: None),
        "a layer twice": lambda: check_parallel(model, twice),
        "another batch": lambda: check_parallel(model, lambda: model(x, None), other),
        "no model": lambda: check_parallel(None, lambda: None),  # type: ignore[arg-type]
        "a selector's rows": lambda: check_parallel(
            chooser, lambda: chooser(x, None), sharding, rows=5
        ),
        "no rows": lambda: check_parallel(model, lambda: None, rows=0),
    }
    try:
        calls[what]()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no layer", "run must call the model's attention layers, got a run without any"),
        ("a layer twice", "run must call each attention layer once, got a second call of 'blocks."),
        ("another batch", "sharding must be of the batch that blocks.0.attention gets, 80 tokens"),
        ("no model", "model must be an nn.Module, got"),
        ("no rows", "rows must be"),
        ("a selector's rows", "rows must be None with selector 'pooled', got 5"),
    ],
)
def test_what_cannot_be_checked_is_refused_on_every_rank(
    what: str, words: str, ranks_of: RanksOf
) -> None:
    for found in ranks_of(2).run(refused, what):
        assert words in found


def test_a_forward_alone_checks_outputs(ranks_of: RanksOf) -> None:
    for report in ranks_of(2).run(forward_alone, Case(length=160)):
        assert report.ok
        assert set(report.largest) == {"positions", "blocks", "out"}


def forward_alone(case: Case) -> ParallelReport:
    model, sharding = Model(case, dist.group.WORLD), make_sharding(160, group=dist.group.WORLD)
    x = sharding.shard(case.inputs()[0])
    with torch.no_grad():
        return check_parallel(model, lambda: model(x, None), sharding)


GPU_CONFIG = NSAConfig(8, 2, 64, window=100)
GPU_CASES = {
    "triton-bfloat16": Case(
        config=GPU_CONFIG, length=4096, dtype=torch.bfloat16, device="cuda", backend="triton"
    ),
    "triton-packed-recomputed": Case(
        config=GPU_CONFIG,
        lengths=(1500, 7, 2000, 589),
        dtype=torch.bfloat16,
        device="cuda",
        backend="triton",
        recompute=True,
    ),
    "triton-sampled": Case(
        config=GPU_CONFIG,
        length=4096,
        dtype=torch.bfloat16,
        device="cuda",
        backend="triton",
        rows=300,
    ),
    "pytorch-float64": Case(device="cuda"),
}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpus_differ_by_rounding_alone_and_not_in_forward(name: str) -> None:
    ranks = Ranks(torch.cuda.device_count(), timedelta(seconds=120), "nccl")
    try:
        report = ranks.run(checked, GPU_CASES[name])[0]
    finally:
        ranks.close()
    assert report.ok, str(report)
    if name.startswith("triton"):
        assert report.largest["out"].difference == report.largest["blocks"].difference == 0

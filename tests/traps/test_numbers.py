"""Traps of integer width, of precision and of repeatability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import make_sharding
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan import build_plan
from nsa_dist.plan.layout import chunk_starts, concat_ranges, make_layout
from nsa_kernels import QuerySegments
from nsa_kernels.reference import masked_softmax, weighted_values
from tests.distributed.layer_case import LayerCase, run_built_layer, variants
from tests.ops.accuracy import assert_2x
from tests.traps.mutation import Replaced, Rewritten, catches
from tests.traps.seam import (
    SELECT,
    SMALL,
    all_blocks,
    attend_compressed,
    attend_selected,
    attend_window,
    one_document,
)

LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
FAR = 2**31 - 3


def tensors(value: Any, name: str = "plan") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dataclasses and mappings, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif is_dataclass(value):
        for f in fields(value):
            yield from tensors(getattr(value, f.name), f"{name}.{f.name}")


def narrow(rows: Any, *args: Any) -> Tensor:
    return rows(*args).int()


@catches(
    "int32 offsets",
    "the table of segments is int32",
    Rewritten(
        "nsa_kernels:QuerySegments.from_rows",
        "torch.tensor($ROWS, dtype=torch.int64)",
        "torch.tensor($ROWS).to(torch.int32)",
    ),
)
@catches(
    "int32 offsets",
    "rows of a batch start at int32 offsets",
    Rewritten(
        "nsa_dist.plan:chunk_starts",
        "torch.arange(batch) * length",
        "torch.arange(batch, dtype=torch.int32) * length",
    ),
)
@catches(
    "int32 offsets", "a plan's rows are int32", Replaced("nsa_dist.plan:HaloBuilder.rows", narrow)
)
def test_trap_int32_offsets() -> None:
    """Rows and positions past 2^31 are told apart; what holds them is int64 throughout."""
    rows = [(0, 2, FAR, FAR, FAR, -FAR), (2, 5, FAR + 7, 2 * FAR, 3 * FAR, FAR)]
    segments = QuerySegments.from_rows(rows)
    assert segments.table.tolist() == [list(row) for row in rows]
    positions = [FAR, FAR + 1, *range(FAR + 7, FAR + 12)]
    assert segments.positions.tolist() == positions
    assert segments.selected_bases.tolist() == [FAR] * 2 + [3 * FAR] * 5
    parts = [part for segment in segments.rows for part in segment.split(2)]
    assert [part.position for part in parts] == [FAR, FAR + 7, FAR + 9, FAR + 11]

    starts, lengths = torch.tensor([FAR, 5, 3 * FAR]), torch.tensor([4, 1, 2])
    expected = [*range(FAR, FAR + 4), 5, 3 * FAR, 3 * FAR + 1]
    assert concat_ranges(starts, lengths).tolist() == expected
    for name in LAYOUTS:
        found, _ = chunk_starts(make_layout(name, 2), 5, 2**30, None)
        assert int(found.diff().min()) > 0 and int(found[-1]) >= 4 * 2**30

    cu_seqlens = torch.tensor([0, 1, 58, 64], dtype=torch.int32)
    for rank in range(4):
        plan = build_plan(SMALL, make_layout("zigzag", 4), rank, 4, 1, 64, cu_seqlens)
        sharding = make_sharding(64, cu_seqlens=cu_seqlens, group=ContextGroup(None, rank, 4))
        found = dict(tensors(plan)) | {
            "source": sharding.source,
            "columns": sharding.local_columns,
            "all columns": sharding.rank_columns,
        }
        assert len(found) >= 30
        others = {name: x.dtype for name, x in found.items() if x.dtype != torch.int64}
        assert others == {"plan.visible.by_reader": torch.bool}  # A mask, which holds no rows.


@catches(
    "fp16 dq",
    "dq is added up over blocks in float16",
    Rewritten(
        "nsa_kernels.pytorch:_backward_of_head",
        "$PAIRS.by_query($GRAD).sum(dim=1).mul_($SCALE)",
        "sum($PAIRS.by_query($GRAD).half().unbind(1)).mul_($SCALE)",
    ),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_trap_fp16_dq(dtype: torch.dtype) -> None:
    """dq is summed wider than 16 bits: after a large first block, small ones still count.

    With q = 0 all keys weigh the same, so dq is the mean of (do.v - mean do.v) k: the first block
    gives 400, each of the 63 others 0.05, less than half a unit in the last place of 400.
    """
    length, blocks = 64 * SELECT, 64
    generator = torch.Generator().manual_seed(0)
    sign = torch.where(torch.arange(length) % 2 == 0, 1.0, -1.0)[:, None, None]
    size = torch.where(torch.arange(length) < SELECT, 400.0, 0.05)[:, None, None]
    jitter = 1 + 0.1 * torch.rand(length, 1, 8, generator=generator)
    k = (sign * size * jitter).to(dtype)
    v = (sign * torch.ones(length, 1, 8)).to(dtype)
    q, grad = torch.zeros(1, 2, 8, dtype=dtype), torch.full((1, 2, 8), 8.0, dtype=dtype)
    segments = one_document(1, length - 1)
    chosen = all_blocks(torch.tensor([length - 1]), 1, blocks)

    def plain(wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in (q, k, v)]
        mask = torch.ones(1, length, dtype=torch.bool)
        probs, _ = masked_softmax(leaves[0], leaves[1], mask, 8**-0.5)
        o = weighted_values(probs, leaves[2])
        return [o, *torch.autograd.grad(o, leaves, grad.to(wide))]

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, _ = attend_selected(*leaves, chosen, segments, length)
    found = [o, *torch.autograd.grad(o, leaves, grad)]
    for name, ours, rough, true in zip(
        ("o", "dq", "dk", "dv"), found, plain(dtype), plain(torch.float64), strict=True
    ):
        assert ours.dtype == dtype
        assert_2x(ours, rough, true, dtype, name)


def in_any_order(add_rows_: Any, target: Tensor, index: Tensor, source: Tensor) -> Tensor:
    order = torch.randperm(len(index))
    return add_rows_(target, index[order], source[order])


@catches(
    "float32 atomics not repeatable",
    "overlapping blocks add to a row in any order",
    Replaced("nsa_kernels.pytorch:add_rows_", in_any_order),
)
def test_trap_float32_atomics_not_repeatable() -> None:
    """Rows that many queries or blocks add to get the same bits in every run."""
    length = 96
    segments = one_document(length)
    leaves = [
        torch.randn(n, h, 8, requires_grad=True) for n, h in ((length, 4), *[(length, 2)] * 2)
    ]
    chosen = all_blocks(torch.arange(length), 2, 12)

    def gradients() -> list[Tensor]:
        outputs = (
            attend_selected(*leaves, chosen, segments, length),
            attend_compressed(*leaves, segments),
            attend_window(*leaves, segments),
        )
        return [g for o, _ in outputs for g in torch.autograd.grad((o * o.detach()).sum(), leaves)]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    # Four compression blocks overlap: three additions to a row have an order.
    case = variants(LayerCase(lengths=(70, 45), dtype=torch.float32), compress_block=8)
    layer = case.layer()
    results = []
    for _ in range(3):
        results.append(run_built_layer(layer, case, None))
        layer.zero_grad()
    for result in results[1:]:
        assert torch.equal(result.grad_input, results[0].grad_input)
        for name, grad in result.grads.items():
            assert torch.equal(grad, results[0].grads[name]), name

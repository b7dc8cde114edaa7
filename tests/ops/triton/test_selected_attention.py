"""The selection branch in Triton against the oracle, over the same cases as the PyTorch one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.triton import selected_backward
from nsa_kernels.triton.selected_attention import selected_attention
from tests.ops.op_cases import (
    BlockTable,
    Case,
    Layout,
    assert_attention,
    case_id,
    masks,
    random,
    random_choice,
)
from tests.ops.triton.conftest import DEVICE, DTYPES

# Every R, l' and padded width, with key and value widths that differ.
CASES = [
    Case("R1", (70,), heads=2, groups=2, key_width=64, value_width=64),
    Case("R2_packed", (1, 37, 0, 7, 33), key_width=16, value_width=32),
    Case("R3", (50,), heads=3, groups=1, key_width=80, value_width=64, num_selected=3),
    Case("R4", (75,), heads=8, groups=2, key_width=48, value_width=16, select_block=32),
    Case(
        "R8_pieces",
        (40, 200, 90),
        ((1, 37, 21), (1, 150, 40), (2, 0, 13), (2, 60, 1)),
        heads=8,
        groups=1,
        key_width=64,
        value_width=96,
        select_block=16,
        num_selected=5,
    ),
    Case("R12", (40,), heads=12, groups=1, key_width=96, value_width=80, num_selected=3),
    Case("R16_pairs", (90, 21), heads=32, groups=2, key_width=64, value_width=64, select_block=64),
    Case("R32", (33,), heads=32, groups=1, key_width=32, value_width=128, num_selected=4),
    # Tiles of a block summed by themselves: 40 blocks of 128 keys.
    Case(
        "many_keys", (140,), heads=32, groups=1, value_width=16, select_block=128, num_selected=40
    ),
]


def to_device(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


def attend(
    case: Case,
    segments: QuerySegments,
    table: BlockTable,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    fetched: tuple[Tensor, Tensor],
    selected: Tensor,
) -> tuple[Tensor, Tensor]:
    o, lse = selected_attention(
        *to_device(q, *own, *fetched, selected, table.block_rows, table.block_lengths),
        segments.to(DEVICE),
        select_block=case.select_block,
        scale=case.scale,
    )
    return o.cpu(), lse.cpu()


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v of the whole stream and the gradient of the local outputs."""
    tokens = sum(case.documents)
    q = random(tokens, case.heads, case.key_width, dtype=dtype)
    k = random(tokens, case.groups, case.key_width, dtype=dtype)
    v = random(tokens, case.groups, case.value_width, dtype=dtype)
    return (q, k, v), random(case.run_bounds[-1], case.heads, case.value_width, dtype=dtype)


def one(length: int) -> QuerySegments:
    return QuerySegments.from_rows([(0, length, 0, 0, 0, 0)])


def plain_table(length: int, case: Case) -> BlockTable:
    """One document that is all own."""
    rows = torch.arange(0, length, case.select_block)
    lengths = (length - rows).clamp(max=case.select_block)
    nothing = torch.empty(0, dtype=torch.int64)
    return BlockTable(nothing, nothing, rows.expand(case.groups, -1), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype) -> None:
    layout = Layout(case)
    choice = random_choice(case)
    selected = choice[case.local_rows]
    table = layout.block_table(selected)
    inputs, grad_o = make_inputs(case, dtype)
    q = inputs[0][case.local_rows]
    (k_own, k_fetched), (v_own, v_fetched) = (table.fill(x) for x in inputs[1:])
    leaves = [x.requires_grad_() for x in (q, k_own, v_own, k_fetched, v_fetched)]
    o, lse = attend(
        case, layout.segments, table, q, (k_own, v_own), (k_fetched, v_fetched), selected
    )
    dq, *grads = torch.autograd.grad(o, leaves, grad_o)
    assert all(x.dtype == dtype for x in (dq, *grads))
    tokens = inputs[1].shape[0]
    dk = table.collect(grads[0], grads[2], tokens)
    dv = table.collect(grads[1], grads[3], tokens)
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_attention(case, ours, masks(case, "selected", choice), case.bounds, inputs, grad_o)


@pytest.mark.parametrize("launches", ["many", "few"])
def test_lists_of_queries_cut_in_pieces(launches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of queries a program, so that a block has many, over one or more launches."""
    monkeypatch.setattr(selected_backward, "PIECE", 1)
    if launches == "many":
        monkeypatch.setattr(selected_backward, "WORKSPACE", 20 * 16 * (16 + 32) * 4)
    test_against_the_oracle(replace(CASES[1], documents=(61, 20)), torch.float32)

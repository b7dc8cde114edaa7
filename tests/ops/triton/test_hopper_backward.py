"""Gradients of the compressed and window branches as Gluon kernels compute them on Hopper.

The tests of every operator run over these kernels too. Here stand what only they have: cut tiles,
all R and pairs of widths, gates, NaN in rows that TMA reads beside those asked for, long sums.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.shared.cache import segments_of
from nsa_kernels.triton.shared.shapes import HOPPER, gpu_of, runs_hopper_backward
from tests.ops.accuracy import assert_2x
from tests.ops.backends import DEVICE, TRITON
from tests.ops.banded import Branch, Inputs, assert_same
from tests.ops.op_cases import Case, case_id, collect, dense_attention, masks, random
from tests.ops.triton.test_on_gpu import assert_band

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" or gpu_of(torch.empty(0, device=DEVICE)) is not HOPPER,
        reason="needs a Hopper GPU",
    ),
]

PAPER: dict[str, Any] = {"block": 32, "stride": 16, "window": 512}
CASES = [
    Case("R1", (333, 1, 700), heads=2, key_width=64, value_width=64, **PAPER),
    Case("R1_128", (1300,), heads=2, key_width=128, value_width=128, window=128),
    Case("R2", (1, 300, 0, 7, 33, 400), key_width=64, value_width=128, block=16, stride=8),
    Case(
        "R4_cut",
        (40, 500, 90),
        ((1, 37, 250), (1, 350, 150), (2, 0, 13), (2, 60, 1)),
        heads=4,
        groups=1,
        key_width=128,
        value_width=64,
        block=4,
        stride=2,
        window=33,
    ),
    Case(
        "R8",
        (450, 200),
        ((0, 130, 320), (1, 0, 200)),
        heads=8,
        groups=1,
        key_width=64,
        value_width=64,
        window=1,
    ),
    Case("R16", (900, 31, 5), heads=32, key_width=128, value_width=128, **PAPER),
    Case(
        "R16_few_keys",
        (260, 61),
        heads=16,
        groups=1,
        key_width=128,
        value_width=128,
        block=2,
        stride=1,
        window=60,
    ),
    Case("R32", (45, 361), heads=32, groups=1, key_width=128, value_width=128, window=65),
    Case("R16_wide", (900, 31, 5), heads=32, key_width=192, value_width=128, **PAPER),
    Case(
        "R4_wide_cut",
        (40, 500, 90),
        ((1, 37, 250), (1, 350, 150), (2, 0, 13), (2, 60, 1)),
        heads=4,
        groups=1,
        key_width=192,
        value_width=64,
        block=4,
        stride=2,
        window=33,
    ),
    Case(
        "R16_wide_few_keys",
        (260, 61),
        heads=16,
        groups=1,
        key_width=192,
        value_width=128,
        block=2,
        stride=1,
        window=60,
    ),
    Case("R8_wide", (450, 200), heads=8, groups=1, key_width=192, value_width=128, window=1),
    Case("R32_wide", (45, 361), heads=32, groups=1, key_width=192, value_width=128, window=65),
    Case("R1_wide", (333, 1, 200), heads=2, key_width=192, value_width=128, window=128),
]
CUT, PAPERS = CASES[3], CASES[5]
WIDE, WIDE_CUT = CASES[8:10]
each_branch = pytest.mark.parametrize("name", ["compressed", "window"])
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)


def gradients(
    branch: Branch, buffers: Inputs, do: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, ...]:
    """dq, dk, dv and delta, from o and lse of the operator."""
    from nsa_kernels.triton.banded.hopper_backward import hopper_backward

    case = branch.case
    bands = {
        "compressed": Band(case.block - 1, case.stride, 0, "compressed_base"),
        "window": Band(0, 1, case.window, "window_base"),
    }
    q, k, v = (x.detach() for x in buffers)
    assert runs_hopper_backward(q, v)
    o, lse = branch.attend(q, k, v)
    segments = segments_of(branch.segments.host, q.device)
    return hopper_backward(
        q, k, v, o, lse, do.to(q.device), segments, bands[branch.name], case.scale, gate
    )


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=case_id)
@each_branch
def test_against_the_oracle_and_twice(name: str, case: Case, dtype: torch.dtype) -> None:
    assert_band(name, case, dtype)


@every_dtype
@pytest.mark.parametrize("case", [CUT, PAPERS, WIDE, WIDE_CUT], ids=case_id)
@each_branch
def test_gate(name: str, case: Case, dtype: torch.dtype) -> None:
    """Positive, zero and negative gates; delta is the gate's gradient."""
    branch = Branch(TRITON, name, case)
    inputs, do = branch.inputs(dtype)
    buffers = branch.buffers(inputs)
    gate = random(*do.shape[:2], dtype=torch.float32)
    gate[::5] = 0
    found = gradients(branch, buffers, do, gate.to(DEVICE))
    assert_same(list(gradients(branch, buffers, do, gate.to(DEVICE))), list(found))
    dq, dk, dv, delta = (x.cpu() for x in found)
    rows = inputs[1].shape[0]
    ours = {"dq": dq, "dk": collect(dk, branch.index, rows), "dv": collect(dv, branch.index, rows)}
    arguments = (case, masks(case, name), branch.key_bounds, inputs)
    exact = dense_attention(*arguments, gate.double()[..., None] * do.double(), torch.float64)
    plain = dense_attention(*arguments, (gate[..., None] * do).to(dtype), dtype)
    for key, x in ours.items():
        bounds = case.run_bounds if key == "dq" else branch.key_bounds
        assert_2x(x, plain[key], exact[key], dtype, key, cu_seqlens=bounds, heads=True)
    exact_delta = (exact["o"] * do.double()).sum(-1)
    plain_delta = (plain["o"] * do).sum(-1)
    assert_2x(delta, plain_delta, exact_delta, dtype, "gate", cu_seqlens=case.run_bounds)


@pytest.mark.parametrize("case", [PAPERS, WIDE], ids=case_id)
@each_branch
def test_gate_of_one_changes_no_bit(name: str, case: Case) -> None:
    branch = Branch(TRITON, name, case)
    inputs, do = branch.inputs(torch.bfloat16)
    buffers = branch.buffers(inputs)
    gate = torch.ones(do.shape[1], do.shape[0], dtype=torch.bfloat16, device=DEVICE).t()
    expected = gradients(branch, buffers, do)
    assert_same(list(gradients(branch, buffers, do, gate)), list(expected))


@pytest.mark.parametrize("width", [128, 192])
@each_branch
def test_nan_of_another_document_stays_there(name: str, width: int) -> None:
    """Queries, keys, values and gradients of the second of three documents, cut within tiles."""
    case = Case("three", (203, 77, 150), heads=16, groups=1, key_width=width, value_width=128)
    branch = Branch(TRITON, name, replace(case, **PAPER))
    inputs, do = branch.inputs(torch.bfloat16)
    clean = gradients(branch, branch.buffers(inputs), do)
    keys = slice(*branch.key_bounds[1:3])
    for x, rows in zip((*inputs, do), (slice(203, 280), keys, keys, slice(203, 280)), strict=True):
        x[rows] = torch.nan
    found = gradients(branch, branch.buffers(inputs), do)
    other = torch.ones(430, dtype=torch.bool)
    other[203:280] = False
    index = branch.index
    seen = (index >= 0) & ((index < keys.start) | (index >= keys.stop))
    for x, y, rows in zip(found, clean, (other, seen, seen, other), strict=True):
        assert_same([x.cpu()[rows]], [y.cpu()[rows]])
        assert y.cpu()[rows].isfinite().all()


@every_dtype
@pytest.mark.parametrize("width", [128, 192])
def test_more_keys_than_other_kernels_add_in_a_row(width: int, dtype: torch.dtype) -> None:
    """dq over 65,536 keys, and gradients that cancel: what delta is off by counts in full."""
    keys, rows, stride = 65536, 96, 16
    shapes = ((rows, 2, width), (keys, 1, width), (keys, 1, 128))
    q, k, v = (random(*shape, dtype=dtype) for shape in shapes)
    v[keys // 2 :] += 4
    do = random(rows, 2, 128, dtype=dtype) + 1
    position = keys * stride + 31 - rows  # The last query sees the last key.
    segments = QuerySegments.from_rows([(0, rows, position, 0, 0, 0)], DEVICE)

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)]
        if ours:
            x, y, z = leaves
            o = TRITON.ops.compressed_attention(
                x, y, z, segments, block=32, stride=stride, scale=0.09
            )[0]
        else:
            seen = torch.arange(keys, device=DEVICE)[None] * stride + 31
            seen = seen <= position + torch.arange(rows, device=DEVICE)[:, None]
            s = torch.einsum("nhd,jd->hnj", leaves[0], leaves[1][:, 0]) * 0.09
            p = s.float().masked_fill(~seen, -torch.inf).softmax(-1).to(dtype)
            if dtype == torch.float64:
                p = s.masked_fill(~seen, -torch.inf).softmax(-1)
            o = torch.einsum("hnj,jd->nhd", p, leaves[2][:, 0])
        return list(torch.autograd.grad(o, leaves, do.to(DEVICE, dtype)))

    ours, plain, exact = run(dtype, True), run(dtype, False), run(torch.float64, False)
    for name, x, y, z in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_2x(x, y, z, dtype, name, heads=True)


@every_dtype
def test_a_key_that_a_hundred_thousand_rows_see(dtype: torch.dtype) -> None:
    case = Case("seen", (8192,), heads=16, groups=1, key_width=128, value_width=128, block=64)
    assert_band("compressed", replace(case, stride=32), dtype)


@pytest.mark.parametrize("case", [CUT, WIDE_CUT], ids=case_id)
@each_branch
def test_inputs_that_tma_cannot_read(name: str, case: Case) -> None:
    """Odd strides and addresses are copied: the same bits."""
    branch = Branch(TRITON, name, case)
    inputs, do = branch.inputs(torch.bfloat16)
    buffers = branch.buffers(inputs)

    def odd(x: Tensor) -> Tensor:
        flat = torch.full((x.shape[0], x.shape[1], x.shape[2] + 1), torch.nan, dtype=x.dtype)
        return flat.to(x.device)[..., 1:].copy_(x)

    expected = gradients(branch, buffers, do)
    views: Inputs = tuple(odd(x.detach()) for x in buffers)  # type: ignore[assignment]
    assert_same(list(gradients(branch, views, odd(do))), list(expected))

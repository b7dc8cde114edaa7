"""The kernels that attend to a band of keys, of both branches: splits, pieces, strides, offsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.triton.banded import backward, band, key_tiles
from tests.ops.backends import DEVICE, DTYPES, INTERPRETED, TRITON, natively_all, wider_first
from tests.ops.banded import KERNEL_CASES, Branch, assert_same, check_against_the_oracle
from tests.ops.op_cases import Case, case_id
from tests.ops.triton.guard import far_apart
from tests.traps.mutation import Rewritten, catches

BITS = Case("bits", (150,), heads=6, groups=2, value_width=16, block=4, stride=2)
SPLITS = [
    ((0, 0, 1), (0, 1, 149)),
    ((0, 0, 37), (0, 37, 64), (0, 101, 49)),
    tuple((0, start, min(23, 150 - start)) for start in range(0, 150, 23)),
]
LONG = Case("long", (150, 100), heads=16, groups=1, value_width=16)

every_dtype = pytest.mark.parametrize("dtype", wider_first(DTYPES), ids=case_id)
each_branch = pytest.mark.parametrize("name", ["compressed", "window"])


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of more than two tiles are cut up, and run in several launches, in small inputs too."""
    for module in (band, key_tiles):
        monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(backward, "WORKSPACE", 1 << 16)


@every_dtype
@pytest.mark.parametrize(
    "name, case",
    [
        ("compressed", replace(LONG, block=4, stride=1)),
        ("window", replace(LONG, window=20)),
        ("window", replace(LONG, window=100)),
    ],
    ids=["compressed", "window-20", "window-100"],
)
def test_more_tiles_than_are_added_in_a_row(
    name: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    check_against_the_oracle(TRITON, name, case, dtype)


@every_dtype
@pytest.mark.usefixtures("_same_bits_in_any_row")
@pytest.mark.parametrize("pieces", [False, True], ids=["short", "pieces"])
@pytest.mark.parametrize(
    "name, case",
    [
        ("compressed", replace(BITS, stride=1)),
        ("compressed", replace(BITS, stride=2)),
        ("window", replace(BITS, window=41)),
        ("window", replace(BITS, window=150)),
    ],
    ids=["compressed-1", "compressed-2", "window-41", "window-150"],
)
def test_bits_do_not_depend_on_the_split(
    name: str, case: Case, pieces: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits for a query, in whatever runs and buffers its document is cut into."""
    if pieces:
        small_pieces(monkeypatch)
    whole = Branch(TRITON, name, case)
    inputs, _ = whole.inputs(dtype)
    expected = whole.attend(*whole.buffers(inputs))
    for runs in SPLITS:
        part = Branch(TRITON, name, replace(case, runs=runs))
        assert_same(list(part.attend(*part.buffers(inputs))), list(expected))
    # And whatever runs the call has beside it.
    last = Branch(TRITON, name, replace(case, runs=SPLITS[1][2:]))
    found = last.attend(*last.buffers(inputs))
    assert_same(list(found), [x[101:] for x in expected])


@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
@each_branch
def test_gradients_repeat(name: str, dtype: torch.dtype) -> None:
    branch = Branch(TRITON, name, KERNEL_CASES[2])
    inputs, grad_o = branch.inputs(dtype)
    buffers = branch.buffers(inputs)
    assert_same(branch.results(buffers, grad_o), branch.results(buffers, grad_o))


@every_dtype
@each_branch
def test_views_of_any_strides(name: str, dtype: torch.dtype) -> None:
    """Heads of a fused projection, transposed storage, rows that are not contiguous."""
    branch = Branch(TRITON, name, Case("one", (60,), heads=4, key_width=32, value_width=16))
    inputs, grad_o = branch.inputs(dtype)
    buffers = branch.buffers(inputs)
    expected = branch.results(buffers, grad_o)

    def fused(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2]), torch.nan, dtype=dtype)
        return wide.to(DEVICE)[:, 2:-1].copy_(x)

    layouts = [
        fused,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    for change in layouts:
        views = tuple(change(x.detach()).requires_grad_() for x in buffers)
        assert not any(x.is_contiguous() for x in views)
        assert_same(branch.results(views, change(grad_o.to(DEVICE))), expected)  # type: ignore[arg-type]


@each_branch
def test_no_query_or_key(name: str) -> None:
    """No query, no key, neither: nothing is launched, and gradients are zeros."""
    case = Case("none", (5,), block=8, value_width=48)
    for queries in (0, 5):
        for keys in (0, 3):
            segments = QuerySegments.from_rows([(0, queries, 0, 0, 0, 0)] if queries else [])
            if name == "window" and queries and not keys:
                continue  # A query sees itself.
            q = torch.zeros(queries, case.heads, 16, device=DEVICE, requires_grad=True)
            k = torch.full((keys + 4, case.groups, 16), torch.nan, device=DEVICE)
            v = torch.full((keys + 4, case.groups, 48), torch.nan, device=DEVICE)
            if not keys:
                k, v = k[:0], v[:0]
            if name == "window" and queries:
                k, v = torch.zeros_like(k), torch.zeros_like(v)
            leaves = [q, k.requires_grad_(), v.requires_grad_()]
            o, lse = Branch(TRITON, name, case).attend(*leaves, segments.to(DEVICE))
            assert o.shape == (queries, case.heads, 48)
            if name == "compressed":
                assert not o.any()
                assert torch.equal(lse, torch.full_like(lse, -torch.inf))
            for x, grad in zip(leaves, torch.autograd.grad(o.sum(), leaves), strict=True):
                assert grad.shape == x.shape
                assert name == "window" or not grad.any()


@each_branch
def test_grad_mode(name: str) -> None:
    """The same bits without a graph; lse has none; two forwards before their backwards."""
    branch = Branch(TRITON, name, KERNEL_CASES[1])
    inputs, grad_o = branch.inputs(torch.float32)
    buffers = branch.buffers(inputs)
    expected = branch.results(buffers, grad_o)
    with torch.no_grad():
        assert_same(list(branch.attend(*buffers)), expected[:2])
    (first, lse), (second, _) = branch.attend(*buffers), branch.attend(*buffers)
    assert first.requires_grad and not lse.requires_grad
    grads = torch.autograd.grad(second, buffers, 2 * grad_o.to(DEVICE))
    assert_same([x / 2 for x in grads], expected[2:])
    assert_same(list(torch.autograd.grad(first, buffers, grad_o.to(DEVICE))), expected[2:])


@catches(
    "int32 offsets",
    "rows of keys are int32 in the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton:key_rows", "$BASE + $J.to(tl.int64)", "($BASE + $J).to(tl.int32)"
    ),
    case="compressed-rows",
)
@catches(
    "int32 offsets",
    "KV heads are int32 in the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "k.p + $HEAD.to(tl.int64) * $STRIDE",
        "k.p + $HEAD * $STRIDE",
    ),
    case="window-heads",
)
@pytest.mark.skipif(not INTERPRETED, reason="what overflows shows in the interpreter")
@pytest.mark.parametrize("strides", [(1 << 28, 16, 1), (16, 1 << 30, 1)], ids=["rows", "heads"])
@pytest.mark.parametrize(
    "name, case",
    [
        ("compressed", Case("one", (20,), heads=8, groups=4, value_width=16, block=4, stride=2)),
        ("window", Case("one", (20,), heads=8, groups=4, value_width=16, window=9)),
    ],
    ids=["compressed", "window"],
)
def test_offsets_past_two_to_the_31(name: str, case: Case, strides: tuple[int, int, int]) -> None:
    branch = Branch(TRITON, name, case)
    inputs, grad_o = branch.inputs(torch.float32)
    buffers = branch.buffers(inputs)
    expected = branch.results(buffers, grad_o)
    apart = tuple(far_apart(x.detach(), *strides).requires_grad_() for x in buffers)
    assert_same(branch.results(apart, far_apart(grad_o, *strides)), expected)  # type: ignore[arg-type]

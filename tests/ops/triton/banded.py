"""Cases and checks of the two branches that attend to a band of keys: compressed and window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.triton import compressed_attention, window_attention
from nsa_kernels.triton.banded import backward, forward, key_tiles
from tests.ops.op_cases import (
    Case,
    Layout,
    assert_attention,
    collect,
    fill,
    masks,
    random,
    same_bits,
)
from tests.ops.triton.conftest import DEVICE

# R = 1, 2, 3, 4, 8, 12, 16, 32; widths 16 to 96, equal or not, powers of two or not.
CASES = [
    Case("one_document", (150,), key_width=16, value_width=16),
    Case("packed", (1, 70, 0, 7, 33, 60), heads=3, groups=1, key_width=48, value_width=80),
    Case(
        "pieces",
        (40, 150, 90),
        ((1, 37, 50), (1, 120, 30), (2, 0, 13), (2, 60, 1)),
        heads=8,
        key_width=96,
        value_width=32,
        block=4,
        stride=2,
        window=33,
    ),
    Case("one_key_each", (43, 29), heads=2, value_width=64, block=4, window=1),
    Case("eight", (90,), heads=8, groups=1, key_width=64, value_width=64, block=16, window=100),
    Case("twelve", (50, 61), heads=12, groups=1, key_width=32, value_width=16, window=64, stride=8),
    Case("sixteen", (70,), heads=32, key_width=80, value_width=48, stride=2, window=17),
    Case("thirty_two", (45, 61), heads=32, groups=1, value_width=96, block=16, stride=2, window=65),
]
SPLITS = [
    ((0, 0, 1), (0, 1, 149)),
    ((0, 0, 37), (0, 37, 64), (0, 101, 49)),
    tuple((0, start, min(23, 150 - start)) for start in range(0, 150, 23)),
]

Inputs = tuple[Tensor, Tensor, Tensor]


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of more than two tiles are cut up, and run in several launches, in small inputs too."""
    for module in (forward, backward, key_tiles):
        monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(backward, "WORKSPACE", 1 << 16)


class Branch:
    """A branch over a case: its inputs as the oracle takes them, and its buffers."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case, self.layout = name, case, Layout(case)
        self.segments = self.layout.segments.to(DEVICE)
        compressed = name == "compressed"
        self.index = self.layout.compressed_index if compressed else self.layout.window_index
        self.key_bounds = case.compressed_bounds if compressed else case.bounds

    def inputs(self, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
        """q of the stream, k and v of all its documents, the gradient of the local outputs."""
        case, count = self.case, self.key_bounds[-1]
        q = random(sum(case.documents), case.heads, case.key_width, dtype=dtype)
        k = random(count, case.groups, case.key_width, dtype=dtype)
        v = random(count, case.groups, case.value_width, dtype=dtype)
        return (q, k, v), random(case.run_bounds[-1], case.heads, case.value_width, dtype=dtype)

    def buffers(self, inputs: Inputs) -> Inputs:
        """Local q, and k and v where the segments say, with NaN in rows that nobody sees."""
        q, k, v = inputs
        local = q[self.case.local_rows], fill(k, self.index), fill(v, self.index)
        return tuple(x.to(DEVICE).requires_grad_() for x in local)  # type: ignore[return-value]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments | None = None
    ) -> tuple[Tensor, Tensor]:
        segments, case = segments or self.segments, self.case
        if self.name == "window":
            return window_attention(q, k, v, segments, window=case.window, scale=case.scale)
        return compressed_attention(
            q, k, v, segments, block=case.block, stride=case.stride, scale=case.scale
        )

    def results(self, buffers: Inputs, grad_o: Tensor) -> list[Tensor]:
        """o, lse and the gradients of q, k, v."""
        o, lse = self.attend(*buffers)
        return [o, lse, *torch.autograd.grad(o, buffers, grad_o.to(DEVICE))]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert [same_bits(x, y) for x, y in zip(a, b, strict=True)] == [True] * len(a)


def check_against_the_oracle(name: str, case: Case, dtype: torch.dtype) -> None:
    branch = Branch(name, case)
    inputs, grad_o = branch.inputs(dtype)
    o, lse, dq, dk, dv = (x.cpu() for x in branch.results(branch.buffers(inputs), grad_o))
    assert (dq.dtype, dk.dtype, dv.dtype) == (dtype, dtype, dtype)
    dk, dv = (collect(x, branch.index, inputs[1].shape[0]) for x in (dk, dv))
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_attention(case, ours, masks(case, name), branch.key_bounds, inputs, grad_o)


def check_bits_of_a_split(name: str, case: Case, dtype: torch.dtype) -> None:
    """The same bits for a query, in whatever runs and buffers its document is cut into."""
    whole = Branch(name, case)
    inputs, _ = whole.inputs(dtype)
    expected = whole.attend(*whole.buffers(inputs))
    for runs in SPLITS:
        part = Branch(name, replace(case, runs=runs))
        assert_same(list(part.attend(*part.buffers(inputs))), list(expected))
    # And whatever runs the call has beside it.
    last = Branch(name, replace(case, runs=SPLITS[1][2:]))
    found = last.attend(*last.buffers(inputs))
    assert_same(list(found), [x[101:] for x in expected])


def check_strides(name: str, dtype: torch.dtype) -> None:
    """Heads of a fused projection, transposed storage, rows that are not contiguous."""
    branch = Branch(name, Case("one", (60,), heads=4, key_width=32, value_width=16))
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


def check_empty(name: str) -> None:
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
            o, lse = Branch(name, case).attend(*leaves, segments.to(DEVICE))
            assert o.shape == (queries, case.heads, 48)
            if name == "compressed":
                assert not o.any()
                assert torch.equal(lse, torch.full_like(lse, -torch.inf))
            for x, grad in zip(leaves, torch.autograd.grad(o.sum(), leaves), strict=True):
                assert grad.shape == x.shape
                assert name == "window" or not grad.any()


def check_grad_mode(name: str) -> None:
    """The same bits without a graph; lse has none; two forwards before their backwards."""
    branch = Branch(name, CASES[1])
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

"""Cases and checks of the two branches that attend to a band of keys: compressed and window."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from tests.ops.backends import BackendOnDevice
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

# For kernels: R = 1, 2, 3, 4, 8, 12, 16, 32; widths 16 to 96, equal or not, powers of two or not.
KERNEL_CASES = [
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
Inputs = tuple[Tensor, Tensor, Tensor]


class Branch:
    """A branch over a case: its inputs as the oracle takes them, and its buffers."""

    def __init__(self, backend: BackendOnDevice, name: str, case: Case) -> None:
        self.backend, self.name, self.case, self.layout = backend, name, case, Layout(case)
        self.segments = self.layout.segments.to(backend.device)
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
        return tuple(x.to(self.backend.device).requires_grad_() for x in local)  # type: ignore[return-value]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: QuerySegments | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        segments, case, ops = segments or self.segments, self.case, self.backend.ops
        options = {"scale": case.scale, "gate": gate}
        if self.name == "window":
            return ops.window_attention(q, k, v, segments, window=case.window, **options)
        return ops.compressed_attention(
            q, k, v, segments, block=case.block, stride=case.stride, **options
        )

    def results(self, buffers: Inputs, grad_o: Tensor) -> list[Tensor]:
        """o, lse and the gradients of q, k, v."""
        o, lse = self.attend(*buffers)
        return [o, lse, *torch.autograd.grad(o, buffers, grad_o.to(self.backend.device))]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert [same_bits(x, y) for x, y in zip(a, b, strict=True)] == [True] * len(a)


def check_against_the_oracle(
    backend: BackendOnDevice, name: str, case: Case, dtype: torch.dtype
) -> None:
    branch = Branch(backend, name, case)
    inputs, grad_o = branch.inputs(dtype)
    o, lse, dq, dk, dv = (x.cpu() for x in branch.results(branch.buffers(inputs), grad_o))
    assert (dq.dtype, dk.dtype, dv.dtype) == (dtype, dtype, dtype)
    dk, dv = (collect(x, branch.index, inputs[1].shape[0]) for x in (dk, dv))
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_attention(case, ours, masks(case, name), branch.key_bounds, inputs, grad_o)

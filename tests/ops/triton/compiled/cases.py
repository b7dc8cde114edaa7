"""Calls of the public functions of nsa_kernels.triton that reach every kernel in every shape.

A case is one call, forward and backward, with inputs that nobody computes with: memory as it comes,
in the strides of real use. `full_list` and `short_list` say which cases are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_kernels import QuerySegments, triton
from nsa_kernels.compressors import COMPRESSORS

WIDTHS = (64, 80, 96, 128, 192, 256)
RATIOS = (1, 2, 3, 4, 8, 12, 16, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS = 4
SCALE = 0.1
BRANCHES = ("compressed", "selected", "window")
# A position behind which sums over keys take several pieces, and a row's scores several programs.
FAR = 1 << 19


@dataclass(frozen=True)
class Case:
    """One call. options: what else its shapes depend on, see the function called `operator`."""

    operator: str
    dtype: str
    key_width: int
    value_width: int
    ratio: int = 16
    options: tuple[tuple[str, int | str], ...] = ()

    @property
    def label(self) -> str:
        options = [f"{name}={value}" for name, value in self.options]
        return " ".join([self.operator, *options])

    def run(self) -> None:
        OPERATORS[self.operator](self, **dict(self.options))

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[self.dtype], requires_grad=True)

    def inputs(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.empty(queries, GROUPS * self.ratio, self.key_width),
            self.empty(keys, GROUPS, self.key_width),
            self.empty(keys, GROUPS, self.value_width),
        )


def _segments(length: int, position: int = 0) -> QuerySegments:
    return QuerySegments.from_rows([(0, length, position, 0, 0, 0)])


def _backward(o: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(o, inputs, torch.empty_like(o))


def _many_rows(case: Case, long: int) -> int:
    """With `long` more tiles of queries than one program of a key's gradient walks over."""
    return 1100 * 128 // case.ratio if long else 100


def _gate(case: Case, rows: int) -> Tensor:
    """That of a branch, a column of all branches' gates."""
    return torch.empty(rows, GROUPS * case.ratio, 3, requires_grad=True)[..., 1]


def compressed(case: Case, long: int = 0, gate: int = 0) -> None:
    """gate: whether the branch takes its gate, as it does in a layer."""
    rows = _many_rows(case, long)
    q, k, v = case.inputs(rows, FAR // 16 if long else 64)
    segments = _segments(rows, FAR if long else 0)
    found = triton.compressed_attention(
        q, k, v, segments, block=32, stride=16, scale=SCALE,
        gate=_gate(case, rows) if gate else None,
    )  # fmt: skip
    _backward(found[2 if gate else 0], q, k, v)


def window(case: Case, window: int = 512, gate: int = 0) -> None:
    rows = _many_rows(case, window > 512)
    q, k, v = case.inputs(rows, 64)
    found = triton.window_attention(
        q, k, v, _segments(rows), window=window, scale=SCALE,
        gate=_gate(case, rows) if gate else None,
    )  # fmt: skip
    _backward(found[2 if gate else 0], q, k, v)


def select(
    case: Case, block: int = 32, stride: int = 16, select_block: int = 64, n: int = 16, far: int = 0
) -> None:
    """far: how many selection blocks there are to choose from."""
    rows = 100
    q, k, _ = case.inputs(rows, 64)
    triton.select_blocks(
        q,
        k,
        torch.empty(rows, GROUPS * case.ratio),
        _segments(rows, max(0, far * select_block - rows)),
        block=block,
        stride=stride,
        select_block=select_block,
        num_selected=n,
        num_init_blocks=1,
        num_local_blocks=2 if n > 2 else 1,
        scale=SCALE,
    )


def selected(case: Case, select_block: int = 64, n: int = 16, gate: int = 0) -> None:
    """gate: whether the branch is given its gate, which changes backward."""
    rows = 100
    q, *own = case.inputs(rows, rows)
    _, *fetched = case.inputs(0, 3 * select_block)
    blocks = -(-rows // select_block) + 3
    gates = torch.empty(rows, q.shape[1], requires_grad=True) if gate else None
    results = triton.selected_attention(
        q,
        *own,
        *fetched,
        torch.zeros(rows, GROUPS, n, dtype=torch.int32),
        torch.zeros(GROUPS, blocks, dtype=torch.int64),
        torch.full((blocks,), select_block),
        _segments(rows),
        select_block=select_block,
        scale=SCALE,
        gate=gates,
    )
    _backward(results[2] if gate else results[0], q, *own, *fetched)


def _blocks(case: Case, block: int, stride: int) -> tuple[Tensor, Tensor]:
    count = 30
    x = case.empty((count - 1) * stride + block, GROUPS, case.key_width)
    return x, torch.arange(count) * stride


def compress(case: Case, kind: str, block: int = 32, per_head: int = 0) -> None:
    x, block_rows = _blocks(case, block, block // 2)
    width = case.key_width
    sets = (GROUPS,) if per_head else ()
    table = COMPRESSORS[kind](block, width, 2 * width)
    params = {name: case.empty(*sets, *parameter.shape) for name, parameter in table.items()}
    _backward(triton.compress(x, block_rows, block, kind, params), x, *params.values())


def gather(case: Case, block: int = 32) -> None:
    x, block_rows = _blocks(case, block, block // 2)
    _backward(triton.gather_blocks(x, block_rows, block), x)


def combine(case: Case, branches: int = 3) -> None:
    heads = GROUPS * case.ratio
    outputs = [case.empty(100, heads, case.value_width) for _ in range(branches)]
    gates = case.empty(100, heads, branches)
    _backward(triton.combine(outputs, gates), gates, *outputs)
    if branches > 1:
        triton.add_gradients([x.detach() for x in outputs], gates.detach().unbind(-1))


def few(
    case: Case,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    n: int = 16,
    window: int = 512,
    page: int = 0,
) -> None:
    """A step of decoding, whose query sees several parts of the compressed keys."""
    q, k, v = case.inputs(2, 64)
    with torch.no_grad():
        triton.attend_few(
            q, dict.fromkeys(BRANCHES, k), dict.fromkeys(BRANCHES, v),
            torch.empty(2, GROUPS * case.ratio, 3), _segments(2, 2000 * stride),
            torch.zeros(2000, dtype=torch.int64),
            compressed_rows=torch.zeros(2000, dtype=torch.int64) if page else None,
            compressed_page=page, branches=BRANCHES, block=block,
            stride=stride, select_block=select_block, num_selected=n, num_init_blocks=1,
            num_local_blocks=2 if n > 2 else 1, window=window, scale=SCALE,
        )  # fmt: skip


OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (compressed, window, select, selected, few, compress, gather, combine)
}

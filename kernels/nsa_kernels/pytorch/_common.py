"""What the functions of this backend share: precision, row sums in a fixed order, head layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of the largest tensor of a tile. A few of them fit a cache, and a freed one of this size
# goes back to the allocator instead of the system, which would page it in again for every tile.
TILE_ELEMENTS = 1 << 20
# More summands than this are added as a tree: error grows with the length of a chain of additions.
# The rows that a matrix product sums over are summands too, in whatever order the BLAS likes, which
# changes with its instruction set, the shapes and the number of threads.
SUMMANDS_IN_A_ROW = 64


def tile_rows(row_elements: int, tiles: int = 1) -> int:
    """How many rows of `row_elements` elements fill `tiles` tiles; at least 1."""
    return max(1, tiles * TILE_ELEMENTS // max(1, row_elements))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `function` without autocast and with IEEE float32 matrix products (no TF32, no bf16)."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for device_type in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            stack.enter_context(_ieee_matmul())
            return function(*args, **kwargs)

    return run


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    options = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    reduced = [(x, x.fp32_precision) for x in options if x.fp32_precision not in ("none", "ieee")]
    try:
        for option, _ in reduced:
            option.fp32_precision = "ieee"
        yield
    finally:
        for option, found in reduced:
            option.fp32_precision = found


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, heads, D] -> contiguous [heads, rows, D] in `dtype`."""
    return x.transpose(0, 1).to(dtype).contiguous()


def group_queries(x_mHD: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """-> [G, Q, D] in `dtype`, Q = R*m: the queries that share a KV head in one matrix."""
    grouped_GRmD = x_mHD.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
    return grouped_GRmD.to(dtype).reshape(num_groups, -1, x_mHD.shape[-1])


def ungroup_queries(x: Tensor, num_queries: int) -> Tensor:
    """[G, Q, ...] -> [m, G, R, ...], a view."""
    return x.unflatten(1, (-1, num_queries)).movedim(2, 0)


class FiniteRows(NamedTuple):
    """Keys and values to multiply with, and which rows are not what was given.

    A masked logit is replaced, whatever it was, but a masked value is multiplied by 0, and a masked
    key's gradient too, which leaves NaN where it was NaN or infinite. So these are 0 here, and
    `bad` [..., rows] (None: no such row) makes the logit NaN for the queries that do see the row.
    """

    keys: Tensor
    values: Tensor
    bad: Tensor | None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> FiniteRows:
        """keys [..., rows, Dk], values [..., rows, Dv]."""
        # One pass, and finite only where all of them are.
        if (keys.sum() + values.sum()).isfinite():
            return cls(keys, values, None)
        bad = ~(keys.isfinite().all(dim=-1) & values.isfinite().all(dim=-1))
        if not bad.any():
            return cls(keys, values, None)
        where = bad.unsqueeze(-1)
        return cls(keys.masked_fill(where, 0.0), values.masked_fill(where, 0.0), bad)


class Rows:
    """The rows of a result, a tile after the other; those in none hold one value.

    Joined in the end and not written in place: checkpointing that keeps the results of some
    operators and not of others (torch's selective one) takes them as they were computed.
    """

    def __init__(self, empty: Tensor, value: float) -> None:
        """empty [0, ...] has the dtype of the result."""
        self._parts = [empty]
        self._end = 0
        self._value = value

    def add(self, start: int, rows: Tensor) -> None:
        """rows [m, ...] from `start` on, which no earlier one passes."""
        self._fill(start)
        self._parts.append(rows.to(self._parts[0].dtype))
        self._end = start + rows.shape[0]

    def joined(self, num_rows: int) -> Tensor:
        """[num_rows, ...]."""
        self._fill(num_rows)
        return torch.cat(self._parts)

    def _fill(self, start: int) -> None:
        assert start >= self._end, (start, self._end)
        if start > self._end:
            empty = self._parts[0]
            self._parts.append(empty.new_full((start - self._end, *empty.shape[1:]), self._value))


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b of batches [..., m, D] and [..., D, n]."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def softmax_backward_(grad_probs: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the logits of a softmax over the last dimension, in the place of grad_probs.

    With delta [.., 1], the sum of grad_probs under probs.
    """
    delta = (grad_probs * probs).sum(dim=-1, keepdim=True)
    # The difference first: where one key has all the weight it is 0, and so is the gradient.
    return grad_probs.sub_(delta).mul_(probs), delta


def add_rows_(target: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """target[index[i]] += source[i] for all i in the same order in every run."""
    if target.is_cuda:  # index_add_ adds atomically there, index_put_ sorts
        return target.index_put_((index,), source, accumulate=True)
    return target.index_add_(0, index, source)


class PairSum:
    """Adds tensors in pairs, then their sums in pairs. What it is given, it changes."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Tensor]] = []  # (level, sum of 2**level tensors)

    def add(self, x: Tensor) -> None:
        level = 0
        while self._sums and self._sums[-1][0] == level:
            x = self._sums.pop()[1].add_(x)
            level += 1
        self._sums.append((level, x))

    def result(self) -> Tensor:
        """The sum of at least one tensor; nothing may be added after."""
        _, total = self._sums.pop()
        while self._sums:
            total = self._sums.pop()[1].add_(total)
        return total


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a.mT @ b, sums over the rows of a [P, rows, m] and b [P, rows, n]; as a tree, if many."""
    (num_parts, num_rows, m), n, row = a.shape, b.shape[2], SUMMANDS_IN_A_ROW
    if num_rows <= row:
        return torch.bmm(a.mT, b)
    whole = num_rows - num_rows % row
    size = row * tile_rows(num_parts * m * n, 4)
    total = PairSum()
    for start in range(0, whole, size):
        rows = slice(start, min(start + size, whole))
        left, right = a[:, rows].reshape(-1, row, m), b[:, rows].reshape(-1, row, n)
        products = torch.bmm(left.mT, right).view(num_parts, -1, m, n)
        total.add(products.sum(dim=1))  # torch adds as a tree
    if whole < num_rows:
        total.add(torch.bmm(a[:, whole:].mT, b[:, whole:]))
    return total.result()


class TreeSum:
    """Sums tiles into tensors of one shape, at most SUMMANDS_IN_A_ROW in a row, then in pairs."""

    def __init__(self, like: Tensor, in_a_row: float = SUMMANDS_IN_A_ROW) -> None:
        self._sum = torch.zeros_like(like)
        self._count = 0
        self._in_a_row = in_a_row
        self._pieces = PairSum()

    def next(self) -> Tensor:
        """The tensor to add the next tile to, once."""
        if self._count == self._in_a_row:
            self._pieces.add(self._sum)
            self._sum, self._count = torch.zeros_like(self._sum), 0
        self._count += 1
        return self._sum

    def result(self) -> Tensor:
        """The sum; nothing may be added after."""
        self._pieces.add(self._sum)
        return self._pieces.result()

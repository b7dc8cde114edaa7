"""Sums of parts as one binary tree, in memory of the rows that are not zero.

``tree_sum`` says the order: of pairs of parts, then of pairs of these. ``PartSums`` keeps it for
parts of one rank that come in any order, ``Returned`` is a summand that came from another rank.
What sends them between ranks is in ``nsa_dist.comm.exact``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from nsa_dist.comm.collectives import accumulation_dtype
from nsa_dist.plan.parts import Parts


class Summand(Protocol):
    """What ``tree_sum`` adds."""

    def add_(self, other: Any, /) -> Any:
        """The sum with another one of its kind. Both are given up."""


SummandT = TypeVar("SummandT", bound=Summand)


def tree_sum(summand: Callable[[int], SummandT | None], first: int, end: int) -> SummandT | None:
    """The sum over [first, end), a power of two, of pairs, then of pairs of these.

    Args:
        summand: makes one, which is written to; None for zero.
    """
    if end - first == 1:
        return summand(first)
    middle = (first + end) // 2
    left, right = tree_sum(summand, first, middle), tree_sum(summand, middle, end)
    if left is None or right is None:
        return right if left is None else left
    added: SummandT = left.add_(right)
    return added


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows of a sum, which is zero elsewhere.

    Attributes:
        first: the first of them.
        columns: theirs, one tensor beside another: a part's gradients as they came, or the single
            tensor of a sum in the accumulation dtype.
        is_sum: whether it is that, which may be written to.
    """

    first: int
    columns: tuple[Tensor, ...]
    is_sum: bool = False

    @property
    def end(self) -> int:
        return self.first + len(self.columns[0])

    def new_sum(self, count: int) -> Tensor:
        """Memory for ``count`` such rows of a sum."""
        x = self.columns[0]
        shape = [count, *x.shape[1:]]
        if len(self.columns) > 1:
            shape[-1] = sum(x.shape[-1] for x in self.columns)
        return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))

    def copy_to(self, total: Tensor) -> None:
        """Write these rows to ``total``, which has their shape."""
        for to, x in self._by_column(total):
            to.copy_(x)

    def add_to(self, total: Tensor) -> None:
        """Add these rows to ``total``, which has their shape."""
        for to, x in self._by_column(total):
            to.add_(x)

    def _by_column(self, total: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self.columns) == 1:
            yield total, self.columns[0]
            return
        widths = [x.shape[-1] for x in self.columns]
        yield from zip(total.split(widths, dim=-1), self.columns, strict=True)

    def between(self, first: int, end: int) -> Rows:
        """Rows [first, end) of these."""
        run = slice(first - self.first, end - self.first)
        return Rows(first, tuple(x[run] for x in self.columns), self.is_sum)

    def among(self, count: int) -> Tensor:
        """The whole sum, of ``count`` rows."""
        if self.is_sum and (self.first, self.end) == (0, count):
            return self.columns[0]
        total = self.new_sum(count)
        total[: self.first].zero_()
        self.copy_to(total[self.first : self.end])
        total[self.end :].zero_()
        return total


def added(a: Rows | None, b: Rows | None) -> Rows | None:
    """a + b, in any order: of two summands it does not matter. Neither is used afterwards."""
    if a is None or b is None:
        return b if a is None else a
    if (b.first, -b.end) < (a.first, -a.end):
        a, b = b, a
    end = max(a.end, b.end)
    if a.is_sum and a.end == end:
        total = a.columns[0]
    else:
        total = a.new_sum(end - a.first)
        a.copy_to(total[: a.end - a.first])
    total[a.end - a.first : max(a.end, b.first) - a.first].zero_()
    both = min(a.end, b.end)
    if b.first < both:
        b.between(b.first, both).add_to(total[b.first - a.first : both - a.first])
    alone = max(a.end, b.first)
    if alone < b.end:
        b.between(alone, b.end).copy_to(total[alone - a.first :])
    return Rows(a.first, (total,), True)


class PartSums:
    """Adds what a rank's parts give, in any order of arrival, to one sum for each of its chunks."""

    def __init__(self, parts: Parts) -> None:
        self._levels = parts.per_chunk.bit_length() - 1
        self._chunks = len(parts.chunks)
        self._waiting: dict[tuple[int, int], Rows | None] = {}

    def put(self, part: int, *columns: Tensor, first: int = 0) -> None:
        """Add the gradient of the rank's part number ``part``.

        Args:
            columns: of rows [first, ...), beside each other in their last dimension.
        """
        level, x = 0, Rows(first, columns) if len(columns[0]) else None
        while level < self._levels and (level, part ^ 1) in self._waiting:
            x = added(x, self._waiting.pop((level, part ^ 1)))
            level, part = level + 1, part // 2
        assert (level, part) not in self._waiting, (level, part)
        self._waiting[level, part] = x

    def take(self, shape: Sequence[int], like: Tensor) -> list[Tensor]:
        """The sums, each of ``shape``. It is empty afterwards."""
        dtype = accumulation_dtype(like.dtype)
        sums = [self._waiting.pop((self._levels, chunk), None) for chunk in range(self._chunks)]
        assert not self._waiting, list(self._waiting)
        return [
            like.new_zeros(shape, dtype=dtype) if x is None else x.among(shape[0]) for x in sums
        ]


@dataclass(eq=False)
class Returned:
    """A summand of a rank's rows: all of them, or those of some that another rank returned.

    Attributes:
        rows: int64, in ascending order of senders, each once; None for all.
        values: theirs, in the accumulation dtype.
        count: how many rows the sum has.
    """

    values: Tensor
    rows: Tensor | None
    count: int

    def whole(self) -> Tensor:
        """All rows. It is given up."""
        if self.rows is None:
            return self.values
        total = self.values.new_zeros(self.count, *self.values.shape[1:])
        return total.index_copy_(0, self.rows, self.values)

    def add_(self, other: Returned) -> Returned:
        """The sum. The order of two summands does not change it."""
        if self.rows is other.rows:  # Of one rank, or both of all rows.
            return Returned(self.values.add_(other.values), self.rows, self.count)
        a, b = (other, self) if other.rows is None else (self, other)
        total = a.whole()
        assert b.rows is not None
        # A rank returns a row once, so the order of additions is fixed.
        return Returned(total.index_add_(0, b.rows, b.values), None, self.count)

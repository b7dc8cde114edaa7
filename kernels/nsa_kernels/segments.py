"""Where the local query rows stand: the one description of positions that every kernel reads.

A rank holds pieces of documents. A segment is a run of local query rows at consecutive positions of
one document, with the offsets that turn positions of that document into rows of the buffers the
queries attend to. Kernels learn nothing else about the split: no rank, no document lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """A run of local query rows.

    start: first local row; length: rows; position: of the first row, counted from the start of its
    document. The key at position p stands at row window_base + p of the window buffers
    (window_base may be negative; only the rows p in [max(0, position - w + 1), position + length)
    are there). Compression block i is row compressed_base + i of the gathered compressed keys;
    selection block j has block id selected_base + j.
    """

    start: int
    length: int
    position: int
    compressed_base: int
    selected_base: int
    window_base: int

    def split(self, size: int) -> Iterator[Segment]:
        """The same rows in runs of at most `size`."""
        for offset in range(0, self.length, size):
            yield self._replace(
                start=self.start + offset,
                length=min(size, self.length - offset),
                position=self.position + offset,
            )


@dataclass(frozen=True, eq=False)
class QuerySegments:
    """The segments of N local rows, each row in exactly one, in ascending order of rows.

    host: int64 [M, 6] on the CPU, a segment a row in the order of Segment's fields; table: the
    same on the compute device; num_queries: N. Made by `from_rows` or `from_table`.
    """

    host: Tensor = field(repr=False)
    table: Tensor = field(repr=False)
    num_queries: int

    @classmethod
    def from_rows(
        cls, rows: Iterable[Sequence[int]], device: torch.device | str = "cpu"
    ) -> QuerySegments:
        """From (start, length, position, compressed_base, selected_base, window_base) each.

        Raises ValueError when the segments leave a row out, overlap or are out of order.
        """
        segments = list(rows)
        table = torch.tensor(segments, dtype=torch.int64)
        return cls.from_table(table.view(len(segments), len(Segment._fields))).to(device)

    @classmethod
    def from_table(cls, table: Tensor) -> QuerySegments:
        """From such rows as an int64 tensor [M, 6]; raises what `from_rows` raises."""
        host = table.cpu()
        start, length, position = host[:, 0], host[:, 1], host[:, 2]
        end = length.cumsum(0)
        wrong = (start != end - length) | (length < 0) | (position < 0)
        if wrong.any():
            number = int(wrong.nonzero()[0])
            rows = int(end[number] - length[number])
            raise ValueError(
                f"segments[{number}] must start at row {rows} with a length and a position of at "
                f"least 0, got start {int(start[number])}, length {int(length[number])}, "
                f"position {int(position[number])}"
            )
        return cls(host, host, int(end[-1]) if len(host) else 0)

    @cached_property
    def rows(self) -> tuple[Segment, ...]:
        """The segments one by one."""
        return tuple(Segment(*row) for row in self.host.tolist())

    def to(self, device: torch.device | str) -> QuerySegments:
        """The same segments with the table on `device`; itself when it is there already."""
        table = self.table.to(device)
        return self if table is self.table else QuerySegments(self.host, table, self.num_queries)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [N], the position of each local row in its document."""
        rows = torch.arange(self.num_queries, device=self.table.device)
        return rows + self._per_query(self.table[:, 2] - self.table[:, 0])

    @cached_property
    def selected_bases(self) -> Tensor:
        """int64 [N], the id of selection block 0 of each local row's document."""
        return self._per_query(self.table[:, 4])

    @property
    def newest(self) -> int:
        """The highest position of a row, at least one of which there must be."""
        return int((self.host[:, 1] + self.host[:, 2]).max()) - 1

    def _per_query(self, column: Tensor) -> Tensor:
        return column.repeat_interleave(self.table[:, 1], output_size=self.num_queries)


@dataclass(frozen=True, eq=False)
class QueriesOnDevice(QuerySegments):
    """One query of each of N documents, at positions that the device alone knows.

    For `attend_few` alone, which makes tables and buffers as large as `newest` asks for: shapes,
    grids and addresses are then the same for every position, so that a CUDA graph of a call stays
    right when other tensors, computed in the graph, move the queries.

    host: the segments with the position `newest`, not with their own. newest: no query's position
    is higher. kept: what launchers made of these queries, for all layers of a step.
    """

    bound: int = 0
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def newest(self) -> int:
        """See the class."""
        return self.bound

    def to(self, device: torch.device | str) -> QueriesOnDevice:
        """The same queries with the table on `device`; itself when it is there already."""
        table = self.table.to(device)
        return self if table is self.table else replace(self, table=table, kept={})

    @cached_property
    def positions(self) -> Tensor:
        """int64 [N], the position of each query in its document."""
        return self.table[:, 2].contiguous()

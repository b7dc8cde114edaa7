"""Halos: the tokens around its own that a rank needs, their senders, and their buffer rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_dist.plan.grid import Grid
from nsa_dist.plan.layout import concat_ranges
from nsa_dist.plan.stream import Stream
from nsa_dist.plan.tables import Halo

Reach = tuple[Tensor, Tensor]
"""Tokens that each run needs, including its own, as document positions [low, high)."""


def window_reach(stream: Stream, window: int) -> Reach:
    """Tokens that queries see in a window of ``window`` tokens, including their own."""
    first, end, _ = stream.run_positions()
    return (first - window + 1).clamp(min=0), end


def grid_reach(stream: Stream, grid: Grid) -> Reach:
    """Tokens that complete the blocks that start on a rank."""
    first, end, length = stream.run_positions()
    return first, grid.reach(first, end, length)


def _overlaps(
    starts: Tensor, ends: Tensor, wanted_start: Tensor, wanted_end: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs (wanted interval, given interval) that share tokens; both inputs sorted, disjoint."""
    low = torch.searchsorted(ends, wanted_start, right=True)
    count = (torch.searchsorted(starts, wanted_end) - low).clamp(min=0)
    wanted = torch.repeat_interleave(torch.arange(len(count)), count)
    return wanted, concat_ranges(low, count)


class HaloBuilder:
    """The extended buffer of one set of keys: its stream intervals on all ranks, its rows here."""

    def __init__(self, stream: Stream, reaches: Sequence[Reach], rank: int) -> None:
        base = stream.doc_start[stream.run_doc]
        low = torch.stack([lo for lo, _ in reaches]).amin(0) + base
        high = torch.stack([hi for _, hi in reaches]).amax(0) + base
        # Runs that need common tokens share one interval, so that each token has a single row and
        # a single gradient. Offsets by rank keep the running maximum within a rank.
        apart = (stream.total + 1) * stream.run_rank
        reached = (high + apart).cummax(0).values
        opens = torch.ones(len(low), dtype=torch.bool)
        opens[1:] = (low + apart)[1:] > reached[:-1]
        closes = torch.ones(len(low), dtype=torch.bool)
        closes[:-1] = opens[1:]
        self.rank_of = stream.run_rank[opens]
        self.start = low[opens]
        self.end = (reached - apart)[closes]
        mine = self.rank_of == rank
        self.own_start, self.own_end = self.start[mine], self.end[mine]
        lengths = self.own_end - self.own_start
        self.own_offset = lengths.cumsum(0) - lengths
        self.num_rows = int(lengths.sum())
        self.stream, self.rank = stream, rank

    def rows(self, coordinates: Tensor) -> Tensor:
        """Rows of this rank's buffer that hold the given tokens of the stream."""
        at = torch.searchsorted(self.own_start, coordinates, right=True) - 1
        return self.own_offset[at] + coordinates - self.own_start[at]

    def build(self, size: int) -> Halo:
        stream, rank = self.stream, self.rank
        mine = stream.run_rank == rank
        run_start, run_end = stream.run_start[mine], stream.run_end[mine]
        own_rows = concat_ranges(self.rows(run_start), run_end - run_start)
        is_local = int((self.end - self.start).sum()) == stream.total
        empty = torch.zeros(0, dtype=torch.int64)
        if is_local:
            in_order = bool((own_rows == torch.arange(len(own_rows))).all())
            none = (0,) * size
            return Halo(self.num_rows, own_rows, empty, none, empty, none, True, in_order)

        wanted, piece = _overlaps(
            stream.piece_start, stream.piece_end, self.own_start, self.own_end
        )
        remote = stream.piece_owner[piece] != rank
        wanted, piece = wanted[remote], piece[remote]
        order = stream.piece_owner[piece].argsort(stable=True)
        wanted, piece = wanted[order], piece[order]
        start = torch.maximum(stream.piece_start[piece], self.own_start[wanted])
        count = torch.minimum(stream.piece_end[piece], self.own_end[wanted]) - start
        recv_rows = concat_ranges(self.rows(start), count)
        recv_counts = _totals(stream.piece_owner[piece], count, size)

        others = self.rank_of != rank
        asker, low, high = self.rank_of[others], self.start[others], self.end[others]
        wanted, run = _overlaps(run_start, run_end, low, high)
        start = torch.maximum(run_start[run], low[wanted])
        count = torch.minimum(run_end[run], high[wanted]) - start
        first_row = stream.run_row[mine][run] + start - run_start[run]
        send_rows = concat_ranges(first_row, count)
        send_counts = _totals(asker[wanted], count, size)
        return Halo(
            self.num_rows, own_rows, send_rows, send_counts, recv_rows, recv_counts, False, False
        )


def _totals(rank: Tensor, count: Tensor, size: int) -> tuple[int, ...]:
    total = torch.zeros(size, dtype=torch.int64).index_add_(0, rank, count)
    return tuple(total.tolist())

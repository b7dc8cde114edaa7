"""The tables of tiles against a plain description of them."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import pytest
import torch

from nsa_kernels import QuerySegments, Segment
from nsa_kernels.triton.banded import key_tiles
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.compression.blocks_of_rows import BlocksOfRows
from nsa_kernels.triton.selection.chunks import chunks
from nsa_kernels.triton.shared import cache
from nsa_kernels.triton.shared.tables import query_tiles
from tests.ops.backends import DEVICE

Rows = list[tuple[int, ...]]
BANDS = [
    Band(offset=0, stride=1, window=5, column="window_base"),
    Band(offset=0, stride=1, window=33, column="window_base"),
    Band(offset=7, stride=4, window=0, column="compressed_base"),
    Band(offset=3, stride=2, window=0, column="compressed_base"),
]


def plain_query_tiles(segments: QuerySegments, size: int, column: str) -> Rows:
    return [
        (part.start, part.length, part.position, getattr(segment, column))
        for segment in segments.rows
        for part in segment.split(size)
    ]


def sees(band: Band, t: int, key: int) -> bool:
    last = key * band.stride + band.offset
    return last <= t and (not band.window or key > t - band.window)


def plain_key_tiles(queries: Rows, band: Band, size: int, most: int) -> tuple[Rows, list[int]]:
    """Programs, and where those of each key tile begin, for tiles of ascending positions."""
    programs: Rows = []
    parts = [0]
    at = 0
    while at < len(queries):
        base, until = queries[at][3], at
        while until < len(queries) and queries[until][3] == base:
            until += 1
        seen = {
            (number, key)
            for number in range(at, until)
            for t in range(queries[number][2], queries[number][2] + queries[number][1])
            for key in range(t + 1)
            if sees(band, t, key)
        }
        keys = {key for _, key in seen}
        for first in sorted({key // size for key in keys}):
            inside = range(first * size, first * size + size)
            readers = sorted({number for number, key in seen if key in inside})
            low, high = max(inside[0], min(keys)), min(inside[-1], max(keys)) + 1
            count = readers[-1] + 1 - readers[0]
            shares = -(-count // most)
            bounds = [readers[0] + count * share // shares for share in range(shares + 1)]
            for begin, end in itertools.pairwise(bounds):
                programs.append((base, low, high, begin, end, len(parts) - 1))
            parts.append(len(programs))
        at = until
    return programs, parts


def drawn(seed: int, documents: int) -> QuerySegments:
    """Some documents whole, some in two pieces, some empty, some that share a base."""
    chance = random.Random(seed)
    rows: Rows = []
    start = 0
    for number in range(documents):
        base = chance.choice([0, 10 * number])
        position = chance.choice([0, 0, 5, 64])
        for _ in range(chance.choice([1, 1, 2])):
            length = chance.choice([0, 1, 3, 7, 40])
            rows.append((start, length, position, base, number, start - position))
            start, position = start + length, position + length + chance.choice([0, 9])
    return QuerySegments.from_rows(rows, DEVICE)


@pytest.mark.parametrize("size", [1, 8])
def test_query_tiles(size: int) -> None:
    for seed in range(20):
        segments = drawn(seed, seed % 7)
        for column in ("window_base", "compressed_base", "selected_base"):
            found = query_tiles(segments, size, column)
            expected = plain_query_tiles(segments, size, column)
            assert found.table.tolist() == found.host.tolist() == [list(row) for row in expected]
            assert found.last == max((p + n - 1 for _, n, p, _ in expected), default=-1)
            assert query_tiles(segments, size, column) is found


@pytest.mark.parametrize("most", [1, 3, 1000])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_key_tiles(band: Band, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_tiles, "PIECE", most)
    for seed in range(20):
        segments = drawn(seed, seed % 5)
        queries = plain_query_tiles(segments, 8, band.column)
        if _descends(queries):
            continue
        found = key_tiles.key_tiles(segments, band, 8, 16)
        programs, parts = plain_key_tiles(queries, band, 16, most)
        assert found.table.tolist() == [list(row) for row in programs]
        assert found.parts.tolist() == parts
        keys = {(base, j) for base, first, end, *_ in programs for j in range(first, end)}
        assert found.num_keys == len(keys)


def _descends(queries: Rows) -> bool:
    return any(b[3] == a[3] and b[2] < a[2] for a, b in itertools.pairwise(queries))


def test_key_tiles_of_positions_that_descend() -> None:
    """All tiles of the run are taken to see all of its keys: more than they do, and never fewer."""
    segments = QuerySegments.from_rows([(0, 20, 40, 0, 0, 0), (20, 20, 0, 0, 0, 0)], DEVICE)
    band = Band(offset=7, stride=4, window=0, column="compressed_base")
    found = key_tiles.key_tiles(segments, band, 8, 4)
    # Keys 0..13 end at or before position 59; the first tile with a key ends at position 7.
    assert [row[1:5] for row in found.table.tolist()] == [
        [first, min(first + 4, 14), 0, 6] for first in range(0, 14, 4)
    ]


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_chunks(size: int) -> None:
    for seed in range(20):
        segments = drawn(seed, seed % 7)
        positions = segments.positions.tolist()
        firsts = [row[0] for row in plain_query_tiles(segments, 8, "window_base")]
        found = chunks(segments, size, 8, "window_base")
        assert [chunk.begin for chunk in found] == list(range(0, len(positions), size))
        for chunk in found:
            assert chunk.end == min(chunk.begin + size, len(positions))
            assert chunk.last == max(positions[chunk.begin : chunk.end])
            assert firsts[chunk.first_tile] <= chunk.begin
            assert [chunk.begin < first < chunk.end for first in firsts] == [
                chunk.first_tile < number < chunk.end_tile for number in range(len(firsts))
            ]


def test_tables_are_found_by_tensor_and_by_values() -> None:
    segments = drawn(3, 4)
    table = query_tiles(segments, 8, "window_base")
    copy = cache.segments_of(segments.host.clone(), segments.table.device)
    assert copy.num_queries == segments.num_queries
    assert torch.equal(copy.table, segments.table)
    assert query_tiles(copy, 8, "window_base") is table
    for number in range(
        cache.RECENT_PACKINGS
    ):  # Others push the values out; the tensor keeps its own.
        query_tiles(QuerySegments.from_rows([(0, number + 1, 0, 0, 0, 0)]), 8, "window_base")
    assert query_tiles(segments, 8, "window_base") is table
    forgotten = cache.segments_of(segments.host.clone(), segments.table.device)
    assert query_tiles(forgotten, 8, "window_base") is not table
    segments.host[:, Segment._fields.index("window_base")] += 1
    changed = query_tiles(segments, 8, "window_base")
    assert not torch.equal(changed.host, table.host)


def test_what_a_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made while one is captured is not found again: it has no values before a replay."""
    monkeypatch.setattr(cache, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    value = torch.zeros(3)
    gone, gpu = weakref.ref(value), torch.device("cuda", 0)
    kept = {"table": cache.Cached((value, 5))}
    for _ in range(2):
        assert cache.cached_in(kept, "table", gpu, lambda: None)[0] is value
    del kept, value
    gc.collect()
    assert gone() is not None and len(cache._captured) == 1
    kept = {}
    assert cache.cached_in(kept, "table", gpu, lambda: 7) == 7
    assert not kept and len(cache._captured) == 1
    with pytest.raises(ValueError, match="must have run with these segments before a CUDA graph"):
        cache.to_device(torch.zeros(3), gpu)


def test_blocks_of_rows_follow_a_tensor_that_changes() -> None:
    rows = torch.tensor([0, 8, 4], device=DEVICE)
    before = BlocksOfRows.of(rows, 8, 20)
    assert BlocksOfRows.of(rows, 8, 20) is before
    gone = weakref.ref(before.starts)
    del before
    rows += 1
    after = BlocksOfRows.of(rows, 8, 20)
    assert after.starts.tolist() == [1, 5, 9]
    assert gone() is None  # Those of former values are not kept.

"""The tables of the gradients on Hopper name every pair of a query and a key once.

Gluon cannot be interpreted, but what its programs walk over is made on the host.
"""

from __future__ import annotations

import pytest

from nsa_kernels import QuerySegments
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.banded.hopper_tables import KEYS, key_work, query_work
from tests.ops.op_cases import Case, Layout, case_id

CASES = [
    Case("one", (800,), block=4, stride=2, window=200),
    Case("packed", (1, 700, 0, 7, 330, 60), block=8, stride=8, window=1),
    Case(
        "cut",
        (40, 950, 900),
        ((1, 37, 250), (1, 600, 150), (2, 0, 13), (2, 60, 1), (2, 61, 839)),
        block=2,
        stride=1,
        window=129,
    ),
    # Later tokens first, and a document that is looked at twice.
    Case("descending", (900,), ((0, 500, 300), (0, 0, 300)), block=4, stride=1, window=64),
    Case("blind", (5, 3), block=32, stride=16, window=700),
]


def band_of(name: str, case: Case) -> Band:
    if name == "window":
        return Band(0, 1, case.window, "window_base")
    return Band(case.block - 1, case.stride, 0, "compressed_base")


def seen_keys(band: Band, position: int) -> range:
    first = max(0, position - band.window + 1) if band.window else 0
    return range(first, max(0, position - band.offset + band.stride) // band.stride)


@pytest.mark.parametrize("tokens", [2, 16, 64])
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", ["compressed", "window"])
def test_keys(name: str, case: Case, tokens: int) -> None:
    segments, band = Layout(case).segments, band_of(name, case)
    expected = {}  # (row of a query, row of a key): whether it was named
    for segment in segments.rows:
        base = segment._asdict()[band.column]
        for i in range(segment.length):
            for key in seen_keys(band, segment.position + i):
                expected[segment.start + i, base + key] = False
    work = key_work(segments, band, tokens, groups=2, programs=3, most=5)
    assert sum(work.launches) == len(work.table) == len(work.sums)
    assert not work.launches or max(work.launches) <= 5
    owner = [0] * len(work.sums)
    for tile in range(len(work.parts) - 1):
        owner[work.parts[tile] : work.parts[tile + 1]] = [tile] * int(
            work.parts[tile + 1] - work.parts[tile]
        )
    first = 0
    for launch in work.launches:
        programs = work.table[first : first + launch].tolist()
        assert sorted(program[9] for program in programs) == list(range(launch))
        for key_row, key, _, row, position, end, count, clear, late, place in programs:
            base, low, high, _, _, key_tile = work.sums[first + place].tolist()
            assert key_tile == owner[first + place]
            assert (base + key, low // KEYS, (high - 1) // KEYS) == (
                key_row,
                key // KEYS,
                key // KEYS,
            )
            assert 0 <= clear <= late <= count
            for t in range(position, min(position + count * tokens, end)):
                keys = seen_keys(band, t)
                tile = (t - position) // tokens
                if clear <= tile < late:
                    assert low in keys and high - 1 in keys and len(keys) > 1
                    assert position + (tile + 1) * tokens <= end
                for j in range(max(keys.start, low), min(keys.stop, high)):
                    pair = (row + t - position, base + j)
                    assert expected[pair] is False, pair
                    expected[pair] = True
        first += launch
    assert all(expected.values())
    assert work.num_keys >= len({key for _, key in expected})


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", ["compressed", "window"])
def test_queries(name: str, case: Case) -> None:
    tokens = 16
    segments, band = Layout(case).segments, band_of(name, case)
    work = query_work(segments, band, tokens)
    assert work.num_programs == len(work.table)
    rows, tiles = [], set()
    for row, count, position, base, first_key, end_key, tile, _ in work.table.tolist():
        segment = next(x for x in segments.rows if x.start <= row < x.start + x.length)
        assert position - row == segment.position - segment.start
        assert base == segment._asdict()[band.column]
        assert 0 < count <= 2 * tokens and row + count <= segment.start + segment.length
        rows += range(row, row + count)
        tiles |= {tile, tile + 1} if count > tokens else {tile}
        for t in (position, position + count - 1):
            keys = seen_keys(band, t)
            assert not keys or (first_key <= keys.start and keys.stop <= end_key)
    assert sorted(rows) == list(range(segments.num_queries))
    assert tiles == set(range(work.tiles))


def test_runs_are_as_long_as_there_is_work() -> None:
    """Few query tiles are shared out among programs, many are added up in a row."""
    band = Band(31, 16, 0, "compressed_base")
    longest = []
    for length in (2048, 65536):
        segments = QuerySegments.from_rows([(0, length, 0, 0, 0, 0)])
        work = key_work(segments, band, 4, groups=4, programs=132, most=1 << 20)
        longest.append(int(work.table[:, 6].max()))
    assert longest == [32, 256]

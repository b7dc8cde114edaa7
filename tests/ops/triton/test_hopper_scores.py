"""Scores of selection blocks on Hopper: which shapes, how work is shared out, and whose bits."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.triton.selection import operator
from nsa_kernels.triton.selection.chunks import chunks
from nsa_kernels.triton.selection.pieces import KEYS, START, Share, pieces
from nsa_kernels.triton.shared import shapes
from nsa_kernels.triton.shared.shapes import hopper_score_tile
from nsa_kernels.triton.shared.tables import query_tiles
from tests.ops.backends import DEVICE, TRITON
from tests.ops.choices import assert_highest, choose, make_inputs
from tests.ops.op_cases import Case, Layout, case_id, fill
from tests.ops.triton.test_hopper_forward import on_hopper

LENGTHS = {"block": 32, "stride": 16, "select_block": 64, "num_selected": 6}
CASES = [
    Case("packed", (3000, 1, 40, 777), heads=32, groups=2, key_width=128, **LENGTHS),
    Case(
        "cut", (2000, 900), ((0, 500, 700), (0, 3, 41), (1, 60, 1), (1, 61, 839)), heads=16,
        groups=1, key_width=128, **LENGTHS,
    ),
    Case("width_64", (1500, 333), heads=32, groups=2, key_width=64, **LENGTHS),
    Case("width_192", (1500, 333), heads=32, groups=2, key_width=192, **LENGTHS),
    Case("short_blocks", (700, 90), heads=16, groups=1, key_width=128, block=4, stride=2,
         select_block=8, num_selected=5),
]  # fmt: skip


def takes(
    capability: tuple[int, int] = (9, 0),
    dtype: torch.dtype = torch.bfloat16,
    width: int = 128,
    ratio: int = 16,
    lengths: tuple[int, int, int] = (32, 16, 64),
) -> bool:
    q = torch.empty(7, 4 * ratio, width, dtype=dtype)
    k = torch.empty(9, 4, width, dtype=dtype)
    with (
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch.object(shapes, "capability", return_value=capability),
    ):
        return hopper_score_tile(q, k, *lengths) is not None


def test_which_shapes_it_takes() -> None:
    """By GPU, dtype, width, ratio and the lengths of blocks; those of inputs are no part of it."""
    assert [width for width in (16, 64, 80, 96, 128, 192, 256) if takes(width=width)] == [
        64,
        128,
        192,
    ]
    assert [ratio for ratio in range(1, 33) if takes(ratio=ratio)] == [16]
    lengths = ((32, 16, 64), (4, 2, 8), (16, 16, 64), (64, 16, 64), (32, 16, 128))
    assert [takes(lengths=x) for x in lengths] == [True, True, False, False, False]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert [takes(dtype=dtype) for dtype in dtypes] == [True, True, False]
    gpus = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    assert [takes(capability) for capability in gpus] == [False, False, True, False, False]


@pytest.mark.parametrize("programs", [1, 7, 132])
@pytest.mark.parametrize("rows", [100, 1 << 20])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_pieces_name_every_tile_once(case: Case, rows: int, programs: int) -> None:
    """And no program has much more to do than another: a tile of keys, and a start, more."""
    tokens, groups = 24, case.groups
    segments = Layout(case).segments
    tiles = query_tiles(segments, tokens, "compressed_base")
    for chunk in chunks(segments, rows, tokens, "compressed_base"):
        most = (chunk.last // case.select_block + 1) * case.select_block // case.stride
        share = Share(case.block - 1, case.stride, most, groups, programs)
        made = pieces(segments, tiles, chunk, share)
        found = []
        for row, length, position, base, g, begin, end, _ in made.table.tolist():
            assert begin < end
            found += [(row, length, position, base, g, j) for j in range(begin, end)]
        expected = []
        for row, length, position, base in tiles.host[chunk.first_tile : chunk.end_tile].tolist():
            seen = max(0, position + length - case.block + case.stride) // case.stride
            for g in range(groups):
                keys = range(math.ceil(min(seen, most) / KEYS))
                expected += [(row, length, position, base, g, j) for j in keys]
        assert found == expected
        starts = made.starts.tolist()
        assert len(starts) == programs + 1 and (starts[0], starts[-1]) == (0, len(made.table))
        costs = []
        for low, high in pairwise(starts):
            own = made.table[low:high, 5:7].tolist()
            costs.append(sum(end - begin + START * (begin == 0) for begin, end in own))
        assert max(costs) <= sum(costs) / programs + 1 + START


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_choices_are_those_of_the_plain_kernel(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks that cut tiles, too; and they are the highest."""
    layout = Layout(case)
    q, k = make_inputs(case, dtype)
    keys, own = fill(k, layout.compressed_index), q[case.local_rows]
    found = choose(TRITON, case, layout.segments, own, keys)
    with monkeypatch.context() as patch:
        patch.setattr(operator, "WORKSPACE_BYTES", 1 << 18)
        assert torch.equal(choose(TRITON, case, layout.segments, own, keys), found)
        patch.setattr(operator, "hopper_score_tile", lambda *_: None)
        plain = choose(TRITON, case, layout.segments, own, keys)
    assert_highest(case, found, q, k)
    assert torch.equal(found, plain)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", [128, 192])
def test_nothing_of_others_reaches_a_document(width: int) -> None:
    """NaN in the queries and keys of the documents beside it, which stand in its tiles."""
    case = replace(CASES[0], documents=(45, 701, 3, 300), key_width=width)
    layout = Layout(case)
    q, k = make_inputs(case, torch.bfloat16)
    keys = fill(k, layout.compressed_index)
    lse = torch.full((len(q), case.heads), 3.0)
    options = {"block": 32, "stride": 16, "select_block": 64, "num_selected": 6}
    forced = {"num_init_blocks": 1, "num_local_blocks": 2, "scale": case.scale}

    def chosen(q: Tensor, keys: Tensor) -> Tensor:
        return TRITON.ops.select_blocks(
            *(x.to(DEVICE) for x in (q, keys, lse)), layout.segments.to(DEVICE), **options, **forced
        ).cpu()

    expected = chosen(q, keys)
    for document in range(4):
        rows = slice(*case.bounds[document : document + 2])
        low, high = case.compressed_bounds[document : document + 2]
        a, b = q.clone(), keys.clone()
        a[: rows.start] = a[rows.stop :] = torch.nan
        b[(layout.compressed_index < low) | (layout.compressed_index >= high)] = torch.nan
        assert torch.equal(chosen(a, b)[rows], expected[rows])


def test_one_document_of_a_million_tokens() -> None:
    """Tables of many tiles are no loop in Python."""
    segments = QuerySegments.from_rows([(0, 1 << 20, 0, 0, 0, 0)])
    tiles = query_tiles(segments, 24, "compressed_base")
    chunk = chunks(segments, 1 << 13, 24, "compressed_base")[-1]
    made = pieces(segments, tiles, chunk, Share(31, 16, 1 << 16, 4, 132))
    assert made.table[-1, 6] * KEYS == 1 << 16

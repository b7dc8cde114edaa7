"""The kernels that choose blocks: every width and group, tile shapes, strides, long documents."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nsa_kernels.reference import (
    masked_softmax,
    num_compressed,
    select_blocks,
)
from nsa_kernels.triton.selection import operator
from nsa_kernels.triton.selection.scores import SHORT_LOG2E
from nsa_kernels.triton.shared.shapes import ScoreTile
from tests.ops.backends import DEVICE, DTYPES, TRITON
from tests.ops.choices import (
    assert_highest,
    assert_some_are_the_highest,
    choose,
    exact_inputs,
    make_inputs,
    one,
    scores,
    small,
)
from tests.ops.op_cases import Case, Layout, case_id, fill, random
from tests.traps.mutation import Rewritten, catches

OPTIONS = [
    *[small(f"heads_{r}", heads=2 * r, groups=2) for r in (1, 3, 8)],
    *[small(f"heads_{r}", heads=r) for r in (12, 16, 32)],
    *[small(f"width_{d}", key_width=d) for d in (64, 80, 96, 128, 192, 256)],
    *[small(f"chosen_{n}", num_selected=n) for n in (3, 5, 16, 64)],
    small("no_overlap", block=8, stride=8, select_block=8),
    small("no_overlap_of_4", block=4, stride=4, select_block=16),
    small("overlap_4", block=8, stride=2, select_block=8),
    small("overlap_8_of_8", block=16, stride=2, select_block=16),
    small("overlap_2_of_16", block=4, stride=2, select_block=32),
    small("overlap_32_of_64", block=64, stride=2, select_block=128),
]


@catches(
    "index order changing bits",
    "indices come in descending order",
    Rewritten(
        "nsa_kernels.triton:top_keys",
        "tl.where($N == $I, $FIRST[:, None], $COLUMN)",
        "tl.where($N == $COUNT[:, None] - 1 - $I, $FIRST[:, None], $COLUMN)",
        given=("return $COLUMN, $COUNT",),
    ),
    case="chosen_5",
)
@pytest.mark.parametrize("case", OPTIONS, ids=case_id)
def test_options(case: Case) -> None:
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    selected = choose(
        TRITON, case, layout.segments, q[case.local_rows], fill(k, layout.compressed_index)
    )
    assert_highest(case, selected, q, k)


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_tile_shapes(columns: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of tokens a tile, whichever this device would take."""
    shape = ScoreTile(columns=columns, keys=64, warps=4, stages=2)
    monkeypatch.setattr(operator, "score_tile", lambda *_: shape)
    case = small("shape", heads=heads)
    layout = Layout(case)
    q, k = make_inputs(case, torch.float16)
    selected = choose(
        TRITON, case, layout.segments, q[case.local_rows], fill(k, layout.compressed_index)
    )
    assert_highest(case, selected, q, k)


@pytest.mark.parametrize("per_block", [2, 4, 8, 16])
def test_halves_of_blocks(per_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a block in two parts of 16 rows: the scores are those of keys in their order."""
    shape = ScoreTile(columns=128, keys=64, warps=4, stages=2, halves=2)
    monkeypatch.setattr(operator, "score_tile", lambda *_: shape)
    case = small("halves", heads=8, stride=4, block=8, select_block=4 * per_block)
    case = replace(case, documents=(24 * per_block, 33), runs=())
    layout = Layout(case)
    q, k = make_inputs(case, torch.float16)
    keys = fill(k, layout.compressed_index)
    assert_highest(case, choose(TRITON, case, layout.segments, q, keys), q, k)


def test_scores_that_are_exact_in_16_bits() -> None:
    """A probability of 1 is 1, also where log2(e) is part of the scale: ties fall as defined.

    The interpreter rounds a product before it adds; so log2(e) itself is looked at, too.
    """
    shortened = SHORT_LOG2E.value * 2**15
    assert shortened == round(math.log2(math.e) * 2**15)
    case = Case("exact", (99, 64), heads=16, groups=1, num_selected=5)
    layout = Layout(case)
    q, k = exact_inputs(case, torch.float16)
    documents = range(len(case.documents))
    expected = torch.cat(
        [select_blocks(scores(case, i, q, k, torch.float64), case.options) for i in documents]
    )
    keys = fill(k, layout.compressed_index)
    assert torch.equal(choose(TRITON, case, layout.segments, q, keys), expected)


@pytest.mark.parametrize(("init", "local"), [(0, 1), (0, 4), (3, 1), (2, 2)])
def test_forced_blocks(init: int, local: int) -> None:
    case = small("forced")
    q, k = make_inputs(case, torch.float32)
    keys = fill(k, Layout(case).compressed_index)
    selected = choose(TRITON, case, Layout(case).segments, q[case.local_rows], keys, init, local)
    assert_highest(case, selected, q, k, init, local)


def test_strided_inputs() -> None:
    case = small("strides", heads=8, groups=2)
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    q, k = q[case.local_rows], fill(k, layout.compressed_index)
    expected = choose(TRITON, case, layout.segments, q, k)
    fused = torch.cat([k.new_full((q.shape[0], 3, 16), math.nan), q], dim=1)[:, 3:]
    turned = k.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not fused.is_contiguous()
    assert turned.stride(-1) != 1
    for a, b in ((fused, k), (q, turned), (fused, k.transpose(0, 1).contiguous().transpose(0, 1))):
        assert torch.equal(choose(TRITON, case, layout.segments, a, b), expected)


@pytest.mark.parametrize(
    ("length", "select_block"),
    [
        (140, 4),
        *(pytest.param(s, b, marks=pytest.mark.gpu) for s, b in ((65536, 64), (131072, 16))),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_long_document(length: int, select_block: int, dtype: torch.dtype) -> None:
    """Some queries of a document of which a chunk holds but a part, lines of several parts too."""
    case = Case("long", (length,), heads=16, groups=1, key_width=64, num_selected=16)
    case = replace(case, block=select_block, stride=select_block // 2, select_block=select_block)
    segments = one(length).to(DEVICE)
    count = num_compressed(length, case.block, case.stride)
    q = random(length, 16, 64, dtype=dtype).to(DEVICE)
    k = random(count, 1, 64, dtype=dtype).to(DEVICE)
    rows = torch.randperm(length, device=DEVICE)[:50]
    mask = torch.arange(count, device=DEVICE) * case.stride + case.block - 1 <= rows[:, None]
    lse = torch.full((length, 16), math.nan, device=DEVICE)
    lse[rows] = masked_softmax(q[rows].double(), k.double(), mask, case.scale)[1].float()
    options = {"num_selected": 16, "num_init_blocks": 1, "num_local_blocks": 2}
    blocks = {"block": case.block, "stride": case.stride, "select_block": select_block}
    selected = operator.select_blocks(q, k, lse, segments, **blocks, **options, scale=case.scale)
    assert_some_are_the_highest(case, selected, rows, q, k)

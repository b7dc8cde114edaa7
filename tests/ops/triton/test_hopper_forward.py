"""The forward of the compressed and window branches on Hopper: which shapes it takes, and its bits.

Its accuracy, and its bits at other splits, are those of every kernel: see test_on_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.reference import masked_softmax, weighted_values
from nsa_kernels.triton import compressed_attention
from nsa_kernels.triton.banded.hopper_forward import PIECE
from nsa_kernels.triton.shared import shapes
from nsa_kernels.triton.shared.shapes import hopper_forward_tile
from tests.ops.accuracy import assert_2x
from tests.ops.backends import DEVICE, TRITON
from tests.ops.banded import Branch, assert_same
from tests.ops.op_cases import Case, case_id, random

HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
each_branch = pytest.mark.parametrize("name", ["compressed", "window"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)

LENGTHS = {"block": 32, "stride": 16, "window": 100}
CASES = [
    Case("R16_128", (700,), heads=16, groups=1, key_width=128, value_width=128, **LENGTHS),
    Case("R4_64", (700,), heads=8, key_width=64, value_width=64, **LENGTHS),
    Case("R1_192", (700,), heads=2, key_width=192, value_width=128, **LENGTHS),
    # Tiles of queries that see one tile of keys, cut at both its ends.
    Case("narrow", (700,), key_width=128, value_width=64, block=8, stride=4, window=20),
]
each_case = pytest.mark.parametrize("case", CASES, ids=case_id)


def takes(
    capability: tuple[int, int] = (9, 0),
    dtype: torch.dtype = torch.bfloat16,
    widths: tuple[int, int] = (128, 128),
    ratio: int = 16,
) -> bool:
    q = torch.empty(7, 4 * ratio, widths[0], dtype=dtype)
    v = torch.empty(9, 4, widths[1], dtype=dtype)
    with (
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch.object(shapes, "capability", return_value=capability),
    ):
        return hopper_forward_tile(q, v) is not None


def test_which_shapes_it_takes() -> None:
    """By GPU, dtype, widths and ratio; the lengths of inputs are no part of it."""
    widths = (16, 64, 80, 96, 128, 192, 256)
    taken = {(k, v) for k in widths for v in widths if takes(widths=(k, v))}
    assert taken == {(k, v) for k in (64, 128, 192) for v in (64, 128)}
    ratios = {ratio for ratio in range(1, 33) if takes(ratio=ratio)}
    assert ratios == {1, 2, 4, 8, 16, 32}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert [takes(dtype=dtype) for dtype in dtypes] == [True, True, False]
    gpus = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    assert [takes(capability) for capability in gpus] == [False, False, True, False, False]
    assert hopper_forward_tile(torch.empty(7, 64, 128), torch.empty(9, 4, 128)) is None


@pytest.mark.gpu
@on_hopper
@each_branch
def test_it_is_launched(name: str) -> None:
    from nsa_kernels.triton.banded import hopper_forward as module

    with mock.patch.object(module, "hopper_forward", wraps=module.hopper_forward) as launch:
        for case in (CASES[0], replace(CASES[0], key_width=80)):
            attend(name, case)
    assert launch.call_count == 1


def attend(name: str, case: Case) -> tuple[Tensor, Tensor]:
    branch = Branch(TRITON, name, case)
    return branch.attend(*branch.buffers(branch.inputs(torch.bfloat16)[0]))


@pytest.mark.gpu
@on_hopper
@each_case
@each_branch
def test_bits_do_not_depend_on_the_packing(name: str, case: Case) -> None:
    """A document alone, and behind others: other offsets in tiles, other rows of buffers."""
    alone = Branch(TRITON, name, case)
    inputs, _ = alone.inputs(torch.bfloat16)
    expected = list(alone.attend(*alone.buffers(inputs)))
    for before in ((1,), (7, 0, 60), (333, 5, 128, 64)):
        packed = Branch(TRITON, name, replace(case, documents=(*before, *case.documents, 50)))
        others, _ = packed.inputs(torch.bfloat16)
        start = sum(before), packed.key_bounds[len(before)], packed.key_bounds[len(before)]
        for x, y, at in zip(others, inputs, start, strict=True):
            x[at : at + len(y)] = y
        found = packed.attend(*packed.buffers(others))
        assert_same([x[start[0] :][: len(expected[0])] for x in found], expected)


@pytest.mark.gpu
@on_hopper
@each_case
@each_branch
def test_nothing_of_others_reaches_a_document(name: str, case: Case) -> None:
    """NaN in all rows of the documents beside it: in queries, keys and values of shared tiles."""
    packed = Branch(TRITON, name, replace(case, documents=(45, 101, 3, 70)))
    buffers = [x.detach() for x in packed.buffers(packed.inputs(torch.bfloat16)[0])]
    expected = packed.attend(*buffers)
    for document in range(4):
        rows = slice(*packed.case.bounds[document : document + 2])
        low, high = packed.key_bounds[document : document + 2]
        others = ~((packed.index >= low) & (packed.index < high)).to(DEVICE)
        q, k, v = (x.clone() for x in buffers)
        q[: rows.start] = q[rows.stop :] = torch.nan
        k[others] = v[others] = torch.nan
        found = packed.attend(q, k, v)
        assert_same([x[rows] for x in found], [x[rows] for x in expected])
        assert not any(x[rows].isnan().any() for x in found)


@pytest.mark.gpu
@on_hopper
@each_branch
def test_views_that_tma_cannot_read(name: str) -> None:
    """Rows and heads at odd distances, addresses at odd offsets: copied, the same bits."""
    branch = Branch(TRITON, name, CASES[1])
    buffers = branch.buffers(branch.inputs(torch.bfloat16)[0])
    expected = list(branch.attend(*buffers))

    def between(x: Tensor, rows: int, heads: int, before: int, after: int) -> Tensor:
        shape = (x.shape[0] + rows, x.shape[1] + heads, before + x.shape[2] + after)
        wide = x.new_full(shape, torch.nan)
        return wide[rows:, heads:, before : before + x.shape[2]].copy_(x)

    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: between(x, 1, 0, 0, 0),
        lambda x: between(x, 0, 3, 0, 0),
        lambda x: between(x, 1, 1, 8, 24),
        lambda x: between(x, 0, 0, 1, 0),
        lambda x: between(x, 2, 0, 0, 3),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    for change in layouts:
        views = tuple(change(x.detach()) for x in buffers)
        assert_same(list(branch.attend(*views)), expected)


@pytest.mark.gpu
@on_hopper
def test_no_key_at_all() -> None:
    case = Case("short", (5, 3, 2), heads=16, groups=1, key_width=64, value_width=64, **LENGTHS)
    o, lse = attend("compressed", case)
    assert not o.any()
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.gpu
@on_hopper
@each_branch
def test_in_a_cuda_graph(name: str) -> None:
    branch = Branch(TRITON, name, CASES[0])
    buffers = [x.detach() for x in branch.buffers(branch.inputs(torch.bfloat16)[0])]
    branch.attend(*buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = branch.attend(*buffers)
    for _ in range(2):
        buffers[0].neg_()
        expected = [x.clone() for x in branch.attend(*buffers)]
        graph.replay()
        assert_same(list(found), expected)


@pytest.mark.gpu
@on_hopper
@each_dtype
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_sums_over_most_keys(mean: float, dtype: torch.dtype) -> None:
    """65,536 compressed keys, 1024 tiles in four pieces, values that cancel or add up."""
    count, rows, scale = 1 << 16, 200, 128**-0.5
    position = count * 16 + 16 - rows
    q, k = random(rows, 16, 128, dtype=dtype), random(count, 1, 128, dtype=dtype)
    v = (random(count, 1, 128, dtype=torch.float32) + mean).to(dtype)
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    segments = QuerySegments.from_rows([(0, rows, position, 0, 0, 0)]).to(DEVICE)
    o, lse = compressed_attention(q, k, v, segments, block=32, stride=16, scale=scale)
    last = torch.arange(count, device=DEVICE) * 16 + 31
    seen = last <= position + torch.arange(rows, device=DEVICE)[:, None]
    dense = []
    for as_dtype in (dtype, torch.float64):
        probs, own_lse = masked_softmax(q.to(as_dtype), k.to(as_dtype), seen, scale)
        dense.append((weighted_values(probs, v.to(as_dtype)), own_lse))
    (plain, plain_lse), (exact, exact_lse) = dense
    assert_2x(o, plain, exact, dtype, "o", heads=True)
    assert_2x(lse, plain_lse, exact_lse, dtype, "lse", heads=True)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("pieces", [1, 2])
def test_pieces_do_not_depend_on_the_tile(pieces: int, width: int) -> None:
    """Queries on both sides of where a piece ends, in tiles that are cut elsewhere."""
    count, rows, dtype = PIECE.value * 64 * pieces + 100, 700, torch.bfloat16
    position = PIECE.value * 64 * pieces * 4 + 8 - rows // 2
    q, k, v = (
        random(n, h, width, dtype=dtype).to(DEVICE) for n, h in ((rows, 16), (count, 1), (count, 1))
    )
    found = []
    for ends in ((rows,), (1, 6, 200, 349, 350, 351, 355, 500, rows)):
        starts = (0, *ends[:-1])
        table = [(a, b - a, position + a, 0, 0, 0) for a, b in zip(starts, ends, strict=True)]
        segments = QuerySegments.from_rows(table).to(DEVICE)
        found.append(compressed_attention(q, k, v, segments, block=8, stride=4, scale=width**-0.5))
    assert_same(list(found[0]), list(found[1]))

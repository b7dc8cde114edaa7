"""Every width, group size and block shape on a GPU, at lengths of several tiles, in every dtype.

Tile shapes, masks of padded widths and the order of sums follow from these options, and differ from
what the interpreter's small inputs take. Gradients are computed twice: their bits must repeat.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.triton.compression.blocks_of_rows import BlocksOfRows
from nsa_kernels.triton.compression.kinds import KINDS
from nsa_kernels.triton.shared.tables import query_tiles
from tests.ops.backends import DEVICE, TRITON
from tests.ops.banded import Branch, assert_same
from tests.ops.choices import assert_highest, choose
from tests.ops.choices import make_inputs as make_scored
from tests.ops.op_cases import (
    Case,
    Layout,
    assert_attention,
    case_id,
    collect,
    fill,
    masks,
    random_choice,
)
from tests.ops.selected import attend, attention_results, make_inputs, pool
from tests.ops.test_compression import Blocks, assert_compresses, make_params

pytestmark = pytest.mark.gpu

PAPER = {"block": 32, "stride": 16, "select_block": 64, "num_selected": 16, "window": 512}
# Every R, every width as that of keys and of values, equal or not, one run or many.
CASES = [
    Case("R1_64", (333, 500), heads=2, key_width=64, value_width=64, **PAPER),
    Case(
        "R2_80_96",
        (1, 300, 0, 7, 33, 400),
        key_width=80,
        value_width=96,
        block=16,
        stride=8,
        select_block=32,
        window=100,
    ),
    Case(
        "R3_96_80",
        (40, 500, 90),
        ((1, 37, 250), (1, 350, 150), (2, 0, 13), (2, 60, 1)),
        heads=3,
        groups=1,
        key_width=96,
        value_width=80,
        num_selected=9,
        window=33,
    ),
    Case("R4_128_64", (700,), heads=8, key_width=128, value_width=64, **PAPER),
    Case(
        "R8_192_128",
        (450, 200),
        ((0, 130, 320), (1, 0, 200)),
        heads=8,
        groups=1,
        key_width=192,
        value_width=128,
        **PAPER,
    ),
    Case(
        "R12_128_192",
        (600,),
        heads=12,
        groups=1,
        key_width=128,
        value_width=192,
        block=64,
        stride=32,
        select_block=128,
        num_selected=3,
        window=1,
    ),
    Case("R16_128", (900, 31), heads=32, key_width=128, value_width=128, **PAPER),
    Case(
        "R32_256",
        (400,),
        heads=32,
        groups=1,
        key_width=256,
        value_width=256,
        block=4,
        stride=2,
        num_selected=6,
        window=64,
    ),
]
# Kernels of float32 take longest to compile.
every_case = pytest.mark.parametrize(
    "case, dtype",
    [
        *((case, dtype) for case in CASES for dtype in (torch.bfloat16, torch.float16)),
        *((case, torch.float32) for case in CASES[2::2]),
    ],
    ids=case_id,
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=case_id
)
# A few queries, many, and cuts that are no multiple of any tile.
RUNS = (
    ((0, 0, 1), (0, 1, 2999)),
    ((0, 0, 999), (0, 999, 1100), (0, 2099, 901)),
    tuple((0, start, min(173, 3000 - start)) for start in range(0, 3000, 173)),
)
BITS = [
    Case("R16_128", (3000,), heads=16, groups=1, key_width=128, value_width=128, **PAPER),
    # More keys than are summed in one piece, of which the first queries see but a few.
    Case("many_keys", (3000,), heads=4, key_width=192, value_width=64, block=4, stride=2),
    Case("R3_80", (3000,), heads=3, groups=1, key_width=80, value_width=80, window=200),
]


def judge(
    case: Case,
    found: list[Tensor],
    own_masks: list[Tensor],
    key_bounds: list[int],
    inputs: tuple[Tensor, ...],
    grad_o: Tensor,
) -> None:
    """o, lse and all gradients by the 2x rule, the oracle on the GPU."""
    names = ("o", "lse", "dq", "dk", "dv")
    ours = {name: x.to(DEVICE) for name, x in zip(names, found, strict=True)}
    own_masks, (q, k, v) = [x.to(DEVICE) for x in own_masks], (x.to(DEVICE) for x in inputs)
    assert_attention(case, ours, own_masks, key_bounds, (q, k, v), grad_o.to(DEVICE))


def assert_band(name: str, case: Case, dtype: torch.dtype) -> None:
    branch = Branch(TRITON, name, case)
    inputs, grad_o = branch.inputs(dtype)
    buffers = branch.buffers(inputs)
    found = branch.results(buffers, grad_o)
    assert_same(branch.results(buffers, grad_o), found)
    o, lse, dq, *grads = (x.detach().cpu() for x in found)
    grads = [collect(x, branch.index, inputs[1].shape[0]) for x in grads]
    judge(case, [o, lse, dq, *grads], masks(case, name), branch.key_bounds, inputs, grad_o)


@every_case
@pytest.mark.parametrize("name", ["compressed", "window"])
def test_band(name: str, case: Case, dtype: torch.dtype) -> None:
    assert_band(name, case, dtype)


@pytest.mark.xdist_group("long")  # One after another: the oracle takes much memory.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("width", [128, 192])
def test_widest_window(width: int, dtype: torch.dtype) -> None:
    """Its keys are more than are summed in one piece; nor do its bits depend on the split."""
    case = Case("widest", (9000,), groups=1, key_width=width, value_width=128, window=4096)
    assert_band("window", case, dtype)
    whole = Branch(TRITON, "window", case)
    inputs, _ = whole.inputs(dtype)
    expected = whole.attend(*whole.buffers(inputs))
    part = Branch(TRITON, "window", replace(case, runs=((0, 6001, 1500), (0, 7501, 1499))))
    found = part.attend(*part.buffers(inputs))
    assert_same(list(found), [x[6001:] for x in expected])


@every_case
def test_selected_attention(case: Case, dtype: torch.dtype) -> None:
    choice = random_choice(case)
    inputs, grad_o = make_inputs(case, dtype)
    found = attention_results(TRITON, case, inputs, grad_o, choice)
    assert_same(attention_results(TRITON, case, inputs, grad_o, choice), found)
    judge(case, found, masks(case, "selected", choice), case.bounds, inputs, grad_o)


@pytest.mark.xdist_group("long")  # One after another: the oracle takes much memory.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("width", [128, 256])
def test_most_keys_of_the_selected_branch(width: int, dtype: torch.dtype) -> None:
    """The longest sums there are, n l' keys a query, added one tile after another."""
    options = {"key_width": width, "value_width": width, "select_block": 128, "num_selected": 64}
    case = Case("most_keys", (8192,), heads=4, groups=1, **options)
    choice = random_choice(case)
    inputs, grad_o = make_inputs(case, dtype)
    found = attention_results(TRITON, case, inputs, grad_o, choice)
    judge(case, found, masks(case, "selected", choice), case.bounds, inputs, grad_o)


@every_case
def test_block_selection(case: Case, dtype: torch.dtype) -> None:
    layout = Layout(case)
    q, k = make_scored(case, dtype)
    rows = q[case.local_rows]
    selected = choose(TRITON, case, layout.segments, rows, fill(k, layout.compressed_index))
    assert_highest(case, selected, q, k)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_compression(kind: str, width: int) -> None:
    """In bfloat16, and by turns in another dtype, with weights of that dtype or float32."""
    blocks = Blocks(32, 16, (333, 3, 0, 32, 41))
    other = torch.float16 if width % 64 else torch.float32
    for dtype in (torch.bfloat16, other):
        params = make_params(kind, 32, torch.float32 if width == 128 else dtype, width=width)
        if kind == "attention_pool":  # logits as large as those of 16 channels
            params["query"] *= (16 / width) ** 0.5
        assert_compresses(TRITON, blocks, kind, dtype, params, width)


def test_tables_of_one_stream_are_waited_for_on_another() -> None:
    host = torch.arange(0, 3000, 16)
    segments = [QuerySegments.from_rows([(0, 3000, 0, 0, 0, 0)]) for _ in range(2)]
    rows = [host.to(DEVICE) for _ in range(2)]

    def tables(which: int) -> list[Tensor]:
        found = query_tiles(segments[which].to(DEVICE), 16 + which, "selected_base").table
        return [found, *BlocksOfRows.of(rows[which], 32, 3000)]

    torch.cuda.synchronize()
    late, other = torch.cuda.Stream(), torch.cuda.Stream()
    for which in range(2):  # The first time for what is compiled or loaded on the way.
        with torch.cuda.stream(late):
            torch.cuda._sleep(1 << 29)
            expected = tables(which)
        with torch.cuda.stream(other):
            copies = [x.clone() for x in tables(which)]
        torch.cuda.synchronize()
        assert_same(copies, expected)


@every_dtype
@pytest.mark.parametrize("case", BITS, ids=case_id)
@pytest.mark.parametrize("name", ["compressed", "window"])
def test_bits_of_a_band_do_not_depend_on_the_split(
    name: str, case: Case, dtype: torch.dtype
) -> None:
    if case.name == "many_keys" and name == "compressed":
        case = replace(case, documents=(18000,))
    whole = Branch(TRITON, name, case)
    inputs, _ = whole.inputs(dtype)
    expected = whole.attend(*whole.buffers(inputs))
    for runs in RUNS:
        part = Branch(TRITON, name, replace(case, runs=runs))
        found = part.attend(*part.buffers(inputs))
        assert_same(list(found), [x[:3000] for x in expected])


@every_dtype
@pytest.mark.parametrize("case", BITS, ids=case_id)
def test_bits_of_the_selected_branch_do_not_depend_on_the_split(
    case: Case, dtype: torch.dtype
) -> None:
    """Nor on which other blocks were fetched, or where blocks stand."""
    inputs, _ = make_inputs(case, dtype)
    choice = random_choice(case)
    results = []
    for runs in ((), *RUNS):
        part = replace(case, runs=runs)
        layout, selected = Layout(part), choice[part.local_rows]
        table = layout.block_table(selected)
        own, fetched = pool(table, inputs)
        q = inputs[0][part.local_rows]
        results.append(
            list(attend(TRITON, part, layout.segments, table, q, own, fetched, selected))
        )
    for found in results[1:]:
        assert_same(found, results[0])


@every_dtype
@pytest.mark.parametrize("case", BITS, ids=case_id)
def test_choices_do_not_depend_on_the_split(case: Case, dtype: torch.dtype) -> None:
    q, k = make_scored(case, dtype)
    whole = Layout(case)
    expected = choose(TRITON, case, whole.segments, q, fill(k, whole.compressed_index))
    for runs in RUNS:
        layout = Layout(replace(case, runs=runs))
        found = choose(TRITON, case, layout.segments, q, fill(k, layout.compressed_index))
        assert torch.equal(found, expected)

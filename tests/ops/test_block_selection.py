"""The choice of blocks: against the oracle where scores are exact, by scores where they round."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from nsa_kernels.reference import num_compressed, select_blocks
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import BackendOnDevice, over, over_all
from tests.ops.choices import (
    assert_highest,
    assert_well_formed,
    choose,
    exact_inputs,
    make_inputs,
    one,
    scores,
    small,
)
from tests.ops.op_cases import CASES, DTYPES, Case, Layout, fill, largest
from tests.traps.mutation import Rewritten, catches

EXACT = [
    replace(CASES[0], key_width=16, num_selected=5),
    replace(CASES[2], key_width=16, num_selected=6),
    Case("no_overlap", (99, 64), block=4, stride=4, select_block=8, num_selected=5),
    Case("much_overlap", (99, 64), block=8, stride=1, select_block=8, num_selected=5),
]
THREE_HEADS = Case("three_heads", (99, 64), heads=3, groups=1, block=4, stride=2, select_block=8)
# Of the largest finite float32, infinity, a NaN of a GPU and one of a CPU.
BITS = [0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, -0x400000]


@catches(
    "inverted compression mask",
    "scores are those of blocks that end later",
    Rewritten(
        "nsa_kernels.triton:_score_tiles",
        "$J * C.STRIDE + C.OFFSET <= $T",
        "$J * C.STRIDE + C.OFFSET > $T",
    ),
    case="triton-one_document-float32",
)
@over(
    "case, dtype",
    pytorch=product(CASES, DTYPES),
    triton=product(CASES, KERNEL_DTYPES),
)
def test_chosen_scores_are_the_highest(
    backend: BackendOnDevice, case: Case, dtype: torch.dtype
) -> None:
    layout = Layout(case)
    q, k = make_inputs(case, dtype)
    keys = fill(k, layout.compressed_index)
    selected = choose(backend, case, layout.segments, q[case.local_rows], keys)
    assert_highest(case, selected, q, k)


@pytest.mark.usefixtures("small_tiles")
@over(
    "case, dtype, init, local",
    pytorch=(
        (case, dtype, *forced)
        for case, dtype, forced in product(EXACT, DTYPES, [(1, 2), (0, 1), (2, 1), (3, 2)])
    ),
    triton=(
        (case, dtype, *forced)
        for case, dtype, forced in product(
            [*EXACT, THREE_HEADS], KERNEL_DTYPES, [(1, 2), (0, 1), (3, 2)]
        )
    ),
)
def test_equals_the_oracle_where_scores_are_exact(
    backend: BackendOnDevice, case: Case, dtype: torch.dtype, init: int, local: int
) -> None:
    layout = Layout(case)
    q, k = exact_inputs(case, dtype)
    options = replace(case.options, num_init_blocks=init, num_local_blocks=local)
    expected = torch.cat(
        [
            select_blocks(scores(case, number, q, k, torch.float64), options)
            for number in range(len(case.documents))
        ]
    )[case.local_rows]
    keys = fill(k, layout.compressed_index)
    selected = choose(backend, case, layout.segments, q[case.local_rows], keys, init, local)
    assert torch.equal(selected, expected)


@catches(
    "ties",
    "equal scores go to the higher index",
    Rewritten(
        "nsa_kernels.triton:top_keys", "$WIDTH - $COLUMN[None, :, :]", "$COLUMN[None, :, :] + 1"
    ),
    case="triton-0.0",
)
@pytest.mark.usefixtures("_same_bits_in_any_row")
@over("gain", pytorch=[0.0, 0.3], triton=[0.0, 0.3])  # 0.3: probabilities that no float holds
def test_trap_ties(backend: BackendOnDevice, gain: float) -> None:
    """All keys equal: every inner block scores the same, and the lowest win."""
    case = Case("one", (144,), block=4, stride=4, select_block=16, num_selected=5)
    q = torch.full((144, case.heads, case.key_width), gain)
    k = torch.full((36, case.groups, case.key_width), gain)
    selected = choose(backend, case, one(144), q, k)
    # Complete blocks tie; the query's own may not be complete, and the first is forced.
    expected = torch.tensor([0, 1, 2, 7, 8], dtype=torch.int32)
    assert torch.equal(selected[143], expected.expand(case.groups, -1))
    assert torch.equal(selected[16 * 6, 0], torch.tensor([0, 1, 2, 5, 6], dtype=torch.int32))


@catches(
    "k larger than the blocks there are",
    "places without an eligible block keep a future one",
    Rewritten(
        "nsa_kernels.triton:_choose_kernel",
        "tl.where($LOCAL < $BLOCKS[:, None], $LOCAL, -1)",
        "$LOCAL",
    ),
    case="triton",
)
@over_all
def test_trap_k_larger_than_the_blocks_there_are(backend: BackendOnDevice) -> None:
    case = Case("one", (70,), num_selected=9)
    q, k = make_inputs(case, torch.float32)
    selected = choose(backend, case, one(70), q, k)
    block = torch.arange(9, dtype=torch.int32)
    eligible = torch.arange(70)[:, None, None] // 16
    assert torch.equal(selected, block.where(block <= eligible, -1).expand(-1, 2, -1))


@catches(
    "Eq. 9's sign",
    "a key counts for the block before the one it begins in",
    Rewritten(
        "nsa_kernels.triton:_score_tiles",
        "tl.store($P + 3, $PASSED, mask=$M & ($B + 1 < $PITCH))",
        "tl.store($P - 1, $PASSED, mask=$M & ($B > 0))",
    ),
)
@over("shining", pytorch=[7, 8], triton=[7, 8])
def test_trap_eq_9_sign(backend: BackendOnDevice, shining: int) -> None:
    """Block j is touched by compression blocks 2j-1, 2j, 2j+1 (l = l' = 8, d = 4): the one before
    it counts for it too, and the one after it does not."""
    case = Case("one", (80,), heads=1, groups=1, block=8, stride=4, select_block=8, num_selected=3)
    q = torch.zeros(80, 1, case.key_width)
    q[..., 0] = 1000.0
    k = torch.zeros(num_compressed(80, 8, 4), 1, case.key_width)
    k[shining, 0, 0] = 1.0
    selected = choose(backend, case, one(80), q, k, init=1, local=1)
    # 7 is tokens 28..35, in blocks 3 and 4: a tie, and the lower one wins.
    assert selected[79, 0].tolist() == {7: [0, 3, 9], 8: [0, 4, 9]}[shining]


@over("documents", pytorch=[(), (0,), (1, 3, 2)], triton=[(), (0,), (1, 3, 2)])
def test_documents_without_compressed_tokens(
    backend: BackendOnDevice, documents: tuple[int, ...]
) -> None:
    case = Case("short", documents)
    q, k = make_inputs(case, torch.float32)
    selected = choose(backend, case, Layout(case).segments, q, k[:0])
    expected = torch.tensor([0, -1, -1, -1], dtype=torch.int32)
    assert torch.equal(selected, expected.expand(sum(documents), case.groups, -1))


@pytest.mark.usefixtures("small_tiles")
@over(
    "documents, value, t",
    pytorch=product([(150, 90)], ["huge", "inf", "nan"], [0, 47, 48, 100, 149]),
    triton=product([(110, 50)], BITS, [48, 100]),
)
def test_future_and_other_documents_change_no_choice(
    backend: BackendOnDevice, documents: tuple[int, ...], value: str | int, t: int
) -> None:
    """value: what later keys are multiplied with, or the bits that they become."""
    case = Case("two", documents)
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    keys = fill(k, layout.compressed_index)
    before = choose(backend, case, layout.segments, q, keys)
    later = layout.compressed_index * case.stride + case.block - 1 > t
    if isinstance(value, str):
        keys[later] *= -{"huge": largest(torch.float32), "inf": math.inf, "nan": math.nan}[value]
    else:
        keys.view(torch.int32)[later] = value
    q[t + 1 :] *= -3
    after = choose(backend, case, layout.segments, q, keys)
    assert torch.equal(before[: t + 1], after[: t + 1])
    # Whoever sees what is not finite still gets blocks that exist.
    first = documents[0]
    assert_well_formed(case, after[:first].long(), torch.arange(first), 1, 2)


@over("case, length", pytorch=[(Case("one", (100,)), 100)], triton=[(small("one"), 70)])
def test_has_no_gradient(backend: BackendOnDevice, case: Case, length: int) -> None:
    q, k = (x.requires_grad_() for x in make_inputs(case, torch.float32))
    count = num_compressed(length, case.block, case.stride)
    selected = choose(backend, case, one(length), q[:length], k[:count])
    assert not selected.requires_grad

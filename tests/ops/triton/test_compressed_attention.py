"""The compression branch's attention in Triton against the oracle, and what must not be noticed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nsa_kernels import QuerySegments
from nsa_kernels.triton import compressed_attention
from tests.ops.op_cases import Case, assert_unchanged_bits, case_id, largest
from tests.ops.triton.banded import (
    CASES,
    Branch,
    assert_same,
    check_against_the_oracle,
    check_bits_of_a_split,
    check_empty,
    check_grad_mode,
    check_strides,
    small_pieces,
)
from tests.ops.triton.conftest import DEVICE, DTYPES, INTERPRETED, natively_all
from tests.ops.triton.guard import far_apart
from tests.traps.mutation import Rewritten, catches

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
BITS = Case("bits", (150,), heads=6, groups=2, value_width=16, block=4, stride=2)


@catches(
    "zero-length documents",
    "tiles are numbered as if empty documents were not there",
    Rewritten(
        "nsa_kernels.triton:numbered",
        "torch.repeat_interleave($COUNT)",
        "torch.repeat_interleave($COUNT[$COUNT > 0])",
    ),
    case="packed-float32",
)
@catches(
    "tail padding that drops keys",
    "the last tile of keys is walked only when it is full",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "_forward_tiles($...HEAD, $LIMIT, $FIRST, $LIMIT, $...TAIL)",
        "_forward_tiles($...HEAD, $LIMIT // BN * BN, $FIRST, $LIMIT, $...TAIL)",
    ),
    case="one_document-float32",
)
@catches(
    "unmasked dK/dV store",
    "a short tile's gradients are stored as those of a whole one",
    Rewritten(
        "nsa_kernels.triton:_add_parts_kernel",
        "(($J >= $FIRST) & ($J < $END))[:, None]",
        "($J >= 0)[:, None]",
    ),
    case="packed-float32",
)
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype) -> None:
    check_against_the_oracle("compressed", case, dtype)


@pytest.mark.parametrize("block, stride", [(4, 2), (4, 4), (8, 2), (32, 16), (64, 32), (64, 2)])
def test_blocks(block: int, stride: int) -> None:
    case = Case("blocks", (130, 67), heads=3, groups=1, value_width=16, block=block, stride=stride)
    check_against_the_oracle("compressed", case, torch.float32)


@every_dtype
def test_more_tiles_than_are_added_in_a_row(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    case = Case("long", (150, 100), heads=16, groups=1, value_width=16, block=4, stride=1)
    check_against_the_oracle("compressed", case, dtype)


@every_dtype
@pytest.mark.usefixtures("_same_bits_in_any_row")
@pytest.mark.parametrize("pieces", [False, True], ids=["short", "pieces"])
@pytest.mark.parametrize("stride", [1, 2])
def test_bits_do_not_depend_on_the_split(
    stride: int, pieces: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        small_pieces(monkeypatch)
    check_bits_of_a_split("compressed", replace(BITS, stride=stride), dtype)


@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
def test_gradients_repeat(dtype: torch.dtype) -> None:
    branch = Branch("compressed", CASES[2])
    inputs, grad_o = branch.inputs(dtype)
    buffers = branch.buffers(inputs)
    assert_same(branch.results(buffers, grad_o), branch.results(buffers, grad_o))


@every_dtype
def test_views_of_any_strides(dtype: torch.dtype) -> None:
    check_strides("compressed", dtype)


def test_no_query_or_key() -> None:
    check_empty("compressed")


def test_grad_mode() -> None:
    check_grad_mode("compressed")


@catches(
    "int32 offsets",
    "rows of keys are int32 in the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton:_forward_tiles", "$BASE + $J.to(tl.int64)", "($BASE + $J).to(tl.int32)"
    ),
    case="rows",
)
@pytest.mark.skipif(not INTERPRETED, reason="what overflows shows in the interpreter")
@pytest.mark.parametrize("strides", [(1 << 28, 16, 1), (16, 1 << 30, 1)], ids=["rows", "heads"])
def test_offsets_past_two_to_the_31(strides: tuple[int, int, int]) -> None:
    case = Case("one", (20,), heads=8, groups=4, value_width=16, block=4, stride=2)
    branch = Branch("compressed", case)
    inputs, grad_o = branch.inputs(torch.float32)
    buffers = branch.buffers(inputs)
    expected = branch.results(buffers, grad_o)
    apart = tuple(far_apart(x.detach(), *strides).requires_grad_() for x in buffers)
    assert_same(branch.results(apart, far_apart(grad_o, *strides)), expected)  # type: ignore[arg-type]


@catches(
    "block visible one token early",
    "a block counts from its last token but one on",
    Rewritten(
        "nsa_kernels.triton:sees", "$J * STRIDE + OFFSET <= $T", "$J * STRIDE + OFFSET <= $T + 1"
    ),
)
def test_trap_block_visible_one_token_early() -> None:
    """Values are an identity: the output shows who sees which block."""
    case = Case("one", (60,), heads=1, groups=1, value_width=16)
    assert case.compressed_bounds == [0, 14]
    branch = Branch("compressed", case)
    q, k = torch.randn(60, 1, 16), torch.randn(14, 1, 16)
    v = torch.eye(14, 16)[:, None]
    o, _ = branch.attend(*branch.buffers((q, k, v)))
    last_token = torch.arange(14) * 4 + 7
    assert torch.equal(o[:, 0, :14].cpu() > 0, last_token <= torch.arange(60)[:, None])


@catches(
    "inverted compression mask",
    "completed blocks are hidden, the others shown",
    Rewritten("nsa_kernels.triton:sees", "$J * STRIDE + OFFSET <= $T", "$J * STRIDE + OFFSET > $T"),
    case="8",
)
@pytest.mark.parametrize("position", [0, 6, 7, 8, 40])
def test_trap_inverted_compression_mask(position: int) -> None:
    """Gradients of one query reach the blocks that ended before it, and no other."""
    case = Case("one", (60,), ((0, position, 1),), heads=2, value_width=16)
    branch = Branch("compressed", case)
    inputs, grad_o = branch.inputs(torch.float32)
    _, lse, _, _, dv = branch.results(branch.buffers(inputs), grad_o)
    reached = dv.abs().sum(dim=(1, 2)).cpu() > 0
    assert torch.equal(reached, (branch.index >= 0) & (branch.index * 4 + 7 <= position))
    assert bool(lse.isinf().all()) == (position < 7)


@catches(
    "rows or ranks fully masked",
    "a tile of which a row sees nothing makes its maximum -inf - -inf",
    Rewritten(
        "nsa_kernels.triton:_forward_tiles", "tl.where($NEW == -float('inf'), 0.0, $NEW)", "$NEW"
    ),
)
def test_trap_fully_masked_rows() -> None:
    """The first l - 1 queries see no block: 0, -inf, no gradient, and the others as ever."""
    branch = Branch("compressed", Case("one", (30,), value_width=16))
    inputs, grad_o = branch.inputs(torch.float32)
    o, lse, dq, _, _ = branch.results(branch.buffers(inputs), grad_o)
    blind = branch.case.block - 1
    assert not o[:blind].any()
    assert not dq[:blind].any()
    assert o[blind:].all()
    assert dq[blind + branch.case.stride :].all()  # those between see one block
    assert torch.equal(lse[:blind], torch.full_like(lse[:blind], -math.inf))
    assert lse[blind:].isfinite().all()


@catches(
    "zero compression windows",
    "a sum of nothing is divided by 0",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "tl.where($SUM == 0.0, 1.0, $SUM)",
        "$SUM",
    ),
    case="(3, 7, 2)",
)
@pytest.mark.parametrize("documents", [(5,), (3, 7, 2), (0,)], ids=str)
def test_trap_zero_compression_windows(documents: tuple[int, ...]) -> None:
    """Documents shorter than a block: no compressed key anywhere, gradients of zeros."""
    branch = Branch("compressed", Case("short", documents, value_width=16))
    inputs, grad_o = branch.inputs(torch.float32)
    assert inputs[1].shape[0] == 0
    o, lse, *grads = branch.results(branch.buffers(inputs), grad_o)
    assert not o.any()
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    assert not any(x.any() for x in grads)


@catches(
    "finite mask value that leaks future blocks",
    "-1e9 for the hidden keys of the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton:_forward_tiles",
        "tl.where(sees($...ARGS), $S, -float('inf'))",
        "tl.where(sees($...ARGS), $S, -1e9)",
    ),
)
def test_trap_finite_mask_value_leaks_future() -> None:
    """Logits of seen blocks far below any mask value: the future must still weigh nothing."""
    q = torch.ones(40, 1, 16, device=DEVICE)
    k, v = torch.full((9, 1, 16), -1e30), torch.eye(9, 16)[:, None]
    k[5:] = 1e30
    segments = QuerySegments.from_rows([(0, 40, 0, 0, 0, 0)], DEVICE)
    o, _ = compressed_attention(
        q, k.to(DEVICE), v.to(DEVICE), segments, block=8, stride=4, scale=1.0
    )
    for t in range(7, 27):
        seen = (t - 7) // 4 + 1
        torch.testing.assert_close(o[t, 0].cpu(), (torch.arange(16) < seen) / seen)


@every_dtype
@pytest.mark.parametrize("t", [6, 7, 63])
def test_future_and_other_documents_change_no_bit(t: int, dtype: torch.dtype) -> None:
    branch = Branch("compressed", Case("two", (150, 40), value_width=16))
    q, k, v = (x.detach() for x in branch.buffers(branch.inputs(dtype)[0]))
    other = (branch.index >= branch.key_bounds[1]).to(DEVICE)

    def disturb() -> None:
        later = (branch.index * branch.case.stride + branch.case.block - 1 > t).to(DEVICE)
        k[later] *= -largest(dtype)
        v[later] = largest(dtype)
        k[other], v[other] = math.inf, math.nan
        q[t + 1 :] *= -3

    assert_unchanged_bits(lambda: branch.attend(q, k, v), disturb, slice(0, t + 1))


@catches(
    "KV base pointer wrong with batches",
    "every document reads the keys of the first",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "tl.load(tiles + $TILE * 4 + 3)",
        "tl.load(tiles + 3)",
    ),
)
def test_trap_kv_base_with_batches() -> None:
    """Two documents in one call are each document alone."""
    both = Branch("compressed", Case("two", (50, 50), value_width=16))
    (q, k, v), _ = both.inputs(torch.float32)
    o, lse = both.attend(*both.buffers((q, k, v)))
    for document in (0, 1):
        alone = Branch("compressed", Case("one", (50,), value_width=16))
        tokens = slice(50 * document, 50 * document + 50)
        blocks = slice(11 * document, 11 * document + 11)
        found = alone.attend(*alone.buffers((q[tokens], k[blocks], v[blocks])))
        torch.testing.assert_close(found[0], o[tokens])
        torch.testing.assert_close(found[1], lse[tokens])

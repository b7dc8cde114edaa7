"""The compressed branch's attention against the oracle, and what its queries must not notice."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from nsa_kernels import QuerySegments
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import PYTORCH, BackendOnDevice, over
from tests.ops.banded import KERNEL_CASES, Branch, check_against_the_oracle
from tests.ops.op_cases import CASES, DTYPES, Case, assert_unchanged_bits, case_id, largest
from tests.traps.mutation import Rewritten, catches

NARROW = [torch.float32, torch.bfloat16, torch.float16]


@catches(
    "zero-length documents",
    "tiles are numbered as if empty documents were not there",
    Rewritten(
        "nsa_kernels.triton:numbered",
        "torch.repeat_interleave($COUNT)",
        "torch.repeat_interleave($COUNT[$COUNT > 0])",
    ),
    case="triton-packed-float32",
)
@catches(
    "tail padding that drops keys",
    "the last tile of keys is walked only when it is full",
    Rewritten(
        "nsa_kernels.triton.banded:_forward_kernel",
        "_forward_tiles($...HEAD, $LIMIT, $SCALE, True, C)",
        "_forward_tiles($...HEAD, $LIMIT // C.BN * C.BN, $SCALE, True, C)",
        given=("$LIMIT = num_seen($LAST, C)",),
    ),
    case="triton-one_document-float32",
)
@catches(
    "unmasked dK/dV store",
    "a short tile's gradients are stored as those of a whole one",
    Rewritten(
        "nsa_kernels.triton:_add_parts",
        "(($J >= $FIRST) & ($J < $END))[:, None]",
        "($J >= 0)[:, None]",
    ),
    case="triton-packed-float32",
)
@over(
    "case, dtype",
    pytorch=product(CASES, DTYPES),
    triton=product(KERNEL_CASES, KERNEL_DTYPES),
)
def test_against_the_oracle(backend: BackendOnDevice, case: Case, dtype: torch.dtype) -> None:
    check_against_the_oracle(backend, "compressed", case, dtype)


@over("block, stride", triton=[(4, 2), (4, 4), (8, 2), (32, 16), (64, 32), (64, 2)])
def test_blocks(backend: BackendOnDevice, block: int, stride: int) -> None:
    case = Case("blocks", (130, 67), heads=3, groups=1, value_width=16, block=block, stride=stride)
    check_against_the_oracle(backend, "compressed", case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=case_id)
def test_more_tiles_than_are_added_in_a_row(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query a tile: 383 tiles, 6 pieces in pairs of pairs."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", 1)
    case = Case("long", (390,), heads=2, groups=1)
    check_against_the_oracle(PYTORCH, "compressed", case, dtype)


@catches(
    "block visible one token early",
    "a block counts from its last token but one on",
    Rewritten(
        "nsa_kernels.triton:sees",
        "$J * C.STRIDE + C.OFFSET <= $T",
        "$J * C.STRIDE + C.OFFSET <= $T + 1",
    ),
    case="triton-16-16",
)
@over("key_width, value_width", pytorch=[(4, 14)], triton=[(16, 16)])
def test_trap_block_visible_one_token_early(
    backend: BackendOnDevice, key_width: int, value_width: int
) -> None:
    """Values are an identity: the output shows who sees which block."""
    case = Case("one", (60,), heads=1, groups=1, key_width=key_width, value_width=value_width)
    assert case.compressed_bounds == [0, 14]
    branch = Branch(backend, "compressed", case)
    q, k = torch.randn(60, 1, key_width), torch.randn(14, 1, key_width)
    v = torch.eye(14, value_width)[:, None]
    o, _ = branch.attend(*branch.buffers((q, k, v)))
    last_token = torch.arange(14) * 4 + 7
    assert torch.equal(o[:, 0, :14].cpu() > 0, last_token <= torch.arange(60)[:, None])


@catches(
    "inverted compression mask",
    "completed blocks are hidden, the others shown",
    Rewritten(
        "nsa_kernels.triton:sees", "$J * C.STRIDE + C.OFFSET <= $T", "$J * C.STRIDE + C.OFFSET > $T"
    ),
    case="triton-16-float32-8",
)
@over(
    "value_width, dtype, position",
    pytorch=product([12], [torch.float64], [0, 5, 6, 7, 8, 40]),
    triton=product([16], [torch.float32], [0, 6, 7, 8, 40]),
)
def test_trap_inverted_compression_mask(
    backend: BackendOnDevice, value_width: int, dtype: torch.dtype, position: int
) -> None:
    """Gradients of one query reach the blocks that ended before it, and no other."""
    case = Case("one", (60,), ((0, position, 1),), heads=2, value_width=value_width)
    branch = Branch(backend, "compressed", case)
    inputs, grad_o = branch.inputs(dtype)
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
    case="triton-16",
)
@over("value_width", pytorch=[12], triton=[16])
def test_trap_fully_masked_rows(backend: BackendOnDevice, value_width: int) -> None:
    """The first l - 1 queries see no block: 0, -inf, no gradient, and the others as ever."""
    branch = Branch(backend, "compressed", Case("one", (30,), value_width=value_width))
    inputs, grad_o = branch.inputs(torch.float32)
    o, lse, dq, _, _ = branch.results(branch.buffers(inputs), grad_o)
    blind = branch.case.block - 1
    assert not o[:blind].any()
    assert not dq[:blind].any()
    assert o[blind:].all()
    assert dq[blind + branch.case.stride :].all()  # those between see one block: o is its value
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
    case="triton-(3, 7, 2)-16",
)
@over(
    "documents, value_width",
    pytorch=product([(5,), (3, 7, 2), (0,)], [12]),
    triton=product([(5,), (3, 7, 2), (0,)], [16]),
)
def test_trap_zero_compression_windows(
    backend: BackendOnDevice, documents: tuple[int, ...], value_width: int
) -> None:
    """Documents shorter than a block: no compressed key anywhere, gradients of zeros."""
    branch = Branch(backend, "compressed", Case("short", documents, value_width=value_width))
    inputs, grad_o = branch.inputs(torch.float32)
    assert inputs[1].shape[0] == 0
    buffers = branch.buffers(inputs)
    o, lse, *grads = branch.results(buffers, grad_o)
    assert not o.any()
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    for x, grad in zip(buffers, grads, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@catches(
    "finite mask value that leaks future blocks",
    "-1e9 for the hidden keys of the compressed and window branches",
    Rewritten(
        "nsa_kernels.triton:_forward_tiles",
        "tl.where(sees($...ARGS), $S, -float('inf'))",
        "tl.where(sees($...ARGS), $S, -1e9)",
    ),
    case="triton-16-16",
)
@over("width, values", pytorch=[(2, 9)], triton=[(16, 16)])
def test_trap_finite_mask_value_leaks_future(
    backend: BackendOnDevice, width: int, values: int
) -> None:
    """Logits of seen blocks far below any mask value: the future must still weigh nothing."""
    q = torch.ones(40, 1, width, device=backend.device)
    k, v = torch.full((9, 1, width), -1e30), torch.eye(9, values)[:, None]
    k[5:] = 1e30
    segments = QuerySegments.from_rows([(0, 40, 0, 0, 0, 0)], backend.device)
    o, lse = backend.ops.compressed_attention(
        q, k.to(backend.device), v.to(backend.device), segments, block=8, stride=4, scale=1.0
    )
    for t in range(7, 27):
        seen = (t - 7) // 4 + 1
        torch.testing.assert_close(o[t, 0].cpu(), (torch.arange(values) < seen) / seen)
    if backend is PYTORCH:
        assert torch.equal(lse[7:27], torch.full((20, 1), -2e30))


@pytest.mark.usefixtures("small_tiles")
@over(
    "value, dtype, t",
    pytorch=product(["huge", "inf", "nan"], NARROW, [6, 7, 10, 11, 63, 149]),
    triton=product(["huge"], KERNEL_DTYPES, [6, 7, 63]),
)
def test_future_and_other_documents_change_no_bit(
    backend: BackendOnDevice, value: str, dtype: torch.dtype, t: int
) -> None:
    """A token that overflows in the compressor makes its compressed token inf or NaN.

    The others' tokens are infinite and NaN in kernels, whatever the later ones are.
    """
    width = 12 if backend is PYTORCH else 16
    branch = Branch(backend, "compressed", Case("two", (150, 40), value_width=width))
    q, k, v = (x.detach() for x in branch.buffers(branch.inputs(dtype)[0]))
    bad = {"huge": largest(dtype), "inf": math.inf, "nan": math.nan}[value]
    other = (branch.index >= branch.key_bounds[1]).to(backend.device)

    def disturb() -> None:
        later = branch.index * branch.case.stride + branch.case.block - 1 > t
        k[later.to(backend.device)] *= -bad
        v[later.to(backend.device)] = bad
        if backend is not PYTORCH:
            k[other], v[other] = math.inf, math.nan
        q[t + 1 :] *= -3

    assert_unchanged_bits(lambda: branch.attend(q, k, v), disturb, slice(0, t + 1))


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("value", [largest(torch.float32), math.inf, math.nan], ids=str)
def test_trap_nan_left_behind_in_a_masked_tile(value: float, where: str) -> None:
    """NaN in a block that some queries of a tile see: the outputs and gradients of the others are
    what they are without that block."""
    branch = Branch(PYTORCH, "compressed", Case("one", (40,)))
    (q, k, v), grad_o = branch.inputs(torch.float32)
    grad_o[20:] = 0
    results = []
    for bad in (0.5, value):
        (k if where == "keys" else v)[4:] = bad  # seen from 4*4 + 7 = 23 on
        o, lse, dq, _, _ = branch.results(branch.buffers((q, k, v)), grad_o)
        results.append((o[:23], lse[:23], dq[:23]))
    if not math.isfinite(value):
        assert o[23:].isnan().all()
        assert lse[23:].isnan().all()
        assert dq[23:].isnan().any(dim=-1).all()
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@catches(
    "KV base pointer wrong with batches",
    "every document reads the keys of the first",
    Rewritten("nsa_kernels.triton:load_query_tile", "tl.load($TILE + 3)", "tl.load(tiles + 3)"),
    case="triton-16-float32",
)
@over("value_width, dtype", pytorch=[(12, torch.float64)], triton=[(16, torch.float32)])
def test_trap_kv_base_with_batches(
    backend: BackendOnDevice, value_width: int, dtype: torch.dtype
) -> None:
    """Two documents in one call are each document alone."""
    both = Branch(backend, "compressed", Case("two", (50, 50), value_width=value_width))
    (q, k, v), _ = both.inputs(dtype)
    o, lse = both.attend(*both.buffers((q, k, v)))
    for document in (0, 1):
        alone = Branch(backend, "compressed", Case("one", (50,), value_width=value_width))
        tokens = slice(50 * document, 50 * document + 50)
        blocks = slice(11 * document, 11 * document + 11)
        found = alone.attend(*alone.buffers((q[tokens], k[blocks], v[blocks])))
        for x, y in zip(found, (o[tokens], lse[tokens]), strict=True):
            if backend is PYTORCH:
                assert torch.equal(x, y)
            else:
                torch.testing.assert_close(x, y)

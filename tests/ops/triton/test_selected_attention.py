"""The kernels of the selected branch: lists cut in pieces, splits, orders, strides, offsets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nsa_kernels.triton.selected import backward, blocks
from nsa_kernels.triton.shared import shapes
from nsa_kernels.triton.shared.shapes import WalkTile
from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.backends import DEVICE, DTYPES, INTERPRETED, TRITON, natively_all
from tests.ops.op_cases import (
    Case,
    Layout,
    assert_attention,
    case_id,
    dense_attention,
    masks,
    random,
    random_choice,
    same_bits,
)
from tests.ops.selected import (
    attend,
    attend_plain,
    attention_results,
    check_against_the_oracle,
    make_inputs,
    pool,
)
from tests.traps.mutation import Rewritten, catches


@catches(
    "float32 atomics not repeatable",
    "the programs of a selected block add its dk to one place atomically",
    Rewritten(
        "nsa_kernels.triton.selected:_dkv_kernel",
        "store_tile(dk + $TILE * C.DK, $SUM, C.BN, C.DK, C.PDK)",
        "tl.atomic_add("
        "dk + (($BEFORE - $START).to(tl.int32) * C.BLOCK + $KEY"
        " + tl.arange(0, C.BN)[:, None]) * C.DK + tl.arange(0, C.PDK)[None, :],"
        " $SUM, mask=(tl.arange(0, C.PDK) < C.DK)[None, :])",
        given=(
            "$TILE = ($PROGRAM - $START).to(tl.int32) * C.BLOCK + $KEY",
            "$BEGIN = tl.load($FIRST) + ($PROGRAM - $BEFORE) * MOST",
        ),
    ),
    case="one",
)
@pytest.mark.parametrize("launches", ["one", "many"])
def test_lists_of_queries_cut_in_pieces(launches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of queries a program, so that a block has many, over one or more launches."""
    case = Case("packed", (61, 20), key_width=16, value_width=32)
    monkeypatch.setattr(backward, "PIECE", 1)
    if launches == "many":
        widths = case.key_width + case.value_width
        monkeypatch.setattr(backward, "WORKSPACE", 8 * case.select_block * widths * 4)
    check_against_the_oracle(TRITON, case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_gradients_repeat_whatever_the_workspace(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("one", (37,), value_width=16)
    inputs, grad_o = make_inputs(case, dtype)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    results = []
    for workspace in (1 << 20, 1 << 20, 6 * 16 * 32 * 4):
        monkeypatch.setattr(backward, "PIECE", 1)
        monkeypatch.setattr(backward, "WORKSPACE", workspace)
        o, _ = attend_plain(TRITON, case, *leaves, random_choice(case))
        results.append(torch.autograd.grad(o, leaves, grad_o.to(DEVICE)))
    for again in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.usefixtures("_same_bits_in_any_row")
def test_bits_do_not_depend_on_the_split(dtype: torch.dtype) -> None:
    """The same document, alone, cut in runs, in part, and behind another one.

    Tiles of 16 tokens begin elsewhere, blocks stand elsewhere, and a block at the causal edge of
    some tiles is before it in others. Products are summed in one order here, as on a GPU.
    """
    whole = Case("whole", (66,), value_width=16, heads=8)
    choice = random_choice(whole)
    inputs, _ = make_inputs(whole, dtype)
    others = [torch.cat([random(13, *x.shape[1:], dtype=dtype), x]) for x in inputs]
    other_choice = random_choice(replace(whole, documents=(13,)))
    cut = replace(whole, runs=((0, 0, 3), (0, 3, 20), (0, 23, 1), (0, 24, 42)))
    part = replace(whole, runs=((0, 31, 18),))
    packed = replace(whole, documents=(13, 66))
    results = []
    for case, tensors, chosen in (
        (whole, inputs, choice),
        (cut, inputs, choice),
        (part, inputs, choice),
        (packed, others, torch.cat([other_choice, choice])),
    ):
        layout = Layout(case)
        selected = chosen[case.local_rows]
        table = layout.block_table(selected)
        q, (own, fetched) = tensors[0][case.local_rows], pool(table, tensors)
        results.append(attend(TRITON, case, layout.segments, table, q, own, fetched, selected))
    runs = [slice(0, 66), slice(0, 66), slice(31, 49), slice(0, 66)]
    for (o, lse), run in zip(results, runs, strict=True):
        local = slice(-66, None) if run.stop == 66 else slice(None)
        assert same_bits(o[local], results[0][0][run])
        assert same_bits(lse[local], results[0][1][run])


@catches(
    "index order changing bits",
    "a tile walks its last blocks first, as many as follow from its number of blocks",
    Rewritten(
        "nsa_kernels.triton:_block_lists_kernel",
        "$LIST[:, None] + C.EDGES - 1 + $RUN",
        "$LIST[:, None] + C.EDGES"
        " + ($RUN - 1 + tl.max($RUN, 1)[:, None] % 4) % tl.max($RUN, 1)[:, None]",
    ),
)
@pytest.mark.usefixtures("_same_bits_in_any_row")
def test_trap_index_order_changing_bits() -> None:
    """Blocks come in one order for a query, whatever those beside it in the tile chose."""
    case = Case("one", (200,), ((0, 180, 6),), heads=2, value_width=16, num_selected=8)
    layout = Layout(case)
    inputs, _ = make_inputs(case, torch.float32)
    choice = random_choice(case)[case.local_rows]
    choice[5] = torch.tensor([0, 1, 3, 4, 6, 8, 10, 11], dtype=torch.int32)
    results = []
    for others in ([0, 1, 2, 3, 5, 7, 10, 11], [0, 4, 5, 6, 7, 8, 10, 11]):
        choice[:5] = torch.tensor(others, dtype=torch.int32)
        table = layout.block_table(choice)
        own, fetched = pool(table, inputs)
        q = inputs[0][case.local_rows]
        results.append(attend(TRITON, case, layout.segments, table, q, own, fetched, choice))
    for x, y in zip(*results, strict=True):
        assert same_bits(x[5], y[5])


@catches(
    "NaN left behind in a masked tile",
    "keys and values behind the last query are multiplied by 0",
    Rewritten("nsa_kernels.triton:_load_block", "$FIRST + $N < $LIMIT", "$FIRST + $N >= 0"),
)
def test_trap_nan_behind_the_last_query() -> None:
    """Keys of a chosen block that no query of the call may see: no bit of anything changes."""
    case = Case("one", (64,), value_width=16, select_block=32, num_selected=3)
    (q, k, v), grad_o = make_inputs(case, torch.float32)
    leaves = [x.to(DEVICE).requires_grad_() for x in (q[:41], k, v)]
    results = []
    for value in (0.5, math.nan):
        with torch.no_grad():
            for x in leaves[1:]:
                x[41:] = value
        o, lse = attend_plain(TRITON, case, *leaves, random_choice(case)[:41])
        results.append((o, lse, *torch.autograd.grad(o, leaves, grad_o[:41].to(DEVICE))))
    for x, y in zip(*results, strict=True):
        assert same_bits(x, y)
    for grad in results[1][3:]:
        assert not grad[41:].any()


@catches(
    "finite mask value that leaks future blocks",
    "-1e9 for the hidden keys of the selected branch",
    Rewritten(
        "nsa_kernels.triton.selected:_attend",
        "tl.where($SEEN, $S, -float('inf'))",
        "tl.where($SEEN, $S, -1e9)",
    ),
)
def test_trap_finite_mask_value_leaks_future() -> None:
    """Logits of seen keys far below any mask value: later keys must still weigh nothing."""
    case = Case("one", (32,), heads=1, groups=1, value_width=32)
    q, v = torch.ones(32, 1, 16, device=DEVICE), torch.eye(32, device=DEVICE)[:, None]
    t = torch.arange(32)
    selected = torch.stack([t * 0, (t // 16).where(t >= 16, -1)], dim=-1)[:, None].int()
    for first in (5, 20):
        k = torch.full((32, 1, 16), -1e30, device=DEVICE)
        k[first:] = 1e30
        o, _ = attend_plain(TRITON, case, q, k, v, selected)
        seen = (torch.arange(32) < first) / first
        torch.testing.assert_close(o[first - 1, 0].cpu(), seen)


@catches(
    "rows or ranks fully masked",
    "a query that chose no block of a tile makes its maximum -inf - -inf",
    Rewritten(
        "nsa_kernels.triton.selected:_attend",
        "tl.where($NEW == -float('inf'), 0.0, $NEW)",
        "$NEW",
    ),
)
def test_trap_fully_masked_rows() -> None:
    """A query without any block: 0, -inf, no gradient; its neighbours as ever."""
    case = Case("one", (35,), value_width=16)
    inputs, grad_o = make_inputs(case, torch.float32)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    selected = random_choice(case)
    results = []
    for empty in (False, True):
        if empty:
            selected[20] = -1
        o, lse = attend_plain(TRITON, case, *leaves, selected)
        results.append((o, lse, torch.autograd.grad(o, leaves[0], grad_o.to(DEVICE))[0]))
    others = torch.arange(35) != 20
    for x, y in zip(*results, strict=True):
        assert same_bits(x[others], y[others])
    o, lse, dq = results[1]
    assert not o[20].any()
    assert not dq[20].any()
    assert lse[20].tolist() == [-math.inf] * 4


def test_trap_a_document_of_one_token_has_no_gradient_of_logits() -> None:
    case = Case("one", (1,), value_width=16)
    inputs, grad_o = make_inputs(case, torch.float32)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    o, _ = attend_plain(TRITON, case, *leaves, random_choice(case))
    dq, dk, dv = torch.autograd.grad(o, leaves, grad_o.to(DEVICE))
    assert not dq.any()
    assert not dk.any()
    assert dv.all()


@pytest.mark.parametrize("dtype", natively_all(torch.float16), ids=case_id)
def test_views_of_a_fused_projection(dtype: torch.dtype) -> None:
    """Strides of q, k, v, the choice and the gradient as views have them: the bits of copies."""
    case = Case("one", (40,), value_width=16)
    inputs, grad_o = make_inputs(case, dtype)
    inputs = tuple(x.to(DEVICE) for x in inputs)
    fused = torch.cat(inputs, dim=1)
    views = fused.requires_grad_().split([case.heads, case.groups, case.groups], dim=1)
    selected = random_choice(case)
    transposed = selected.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    copies = [x.clone().requires_grad_() for x in inputs]
    o, _ = attend_plain(TRITON, case, *copies, selected)
    view_o, _ = attend_plain(TRITON, case, *views, transposed)
    assert same_bits(o, view_o)
    grad_o = grad_o[:1, :1, :1].expand_as(o).to(DEVICE)
    grads = torch.autograd.grad(o, copies, grad_o)
    assert same_bits(torch.autograd.grad(view_o, fused, grad_o)[0], torch.cat(grads, dim=1))


@catches(
    "int32 offsets",
    "rows of queries are int32 in the gradients of selected blocks",
    Rewritten(
        "nsa_kernels.triton.selected:_dkv_kernel",
        "tl.load($ROWS + tl.minimum($PLACE, $LAST)).to(tl.int64)",
        "tl.load($ROWS + tl.minimum($PLACE, $LAST))",
        count=2,
    ),
    case="rows",
)
@catches(
    "int32 offsets",
    "heads are int32 in the selected branch",
    Rewritten(
        "nsa_kernels.triton.selected:_forward_kernel",
        "tl.program_id(1).to(tl.int64)",
        "tl.program_id(1)",
    ),
    case="heads",
)
@pytest.mark.skipif(not INTERPRETED, reason="memory that is only addresses is the host's")
@pytest.mark.parametrize("far", ["rows", "heads"])
def test_offsets_past_two_to_the_31st(far: str) -> None:
    from tests.ops.triton.guard import far_apart

    case = Case("one", (37,), heads=8, groups=4, value_width=16)
    inputs, grad_o = make_inputs(case, torch.float16)
    copies = [x.clone().requires_grad_() for x in inputs]
    selected = random_choice(case)
    o, _ = attend_plain(TRITON, case, *copies, selected)
    grads = torch.autograd.grad(o, copies, grad_o)
    # The last rows so far apart that a block of them passes 2^31 by itself.
    strides = [(1 << 26, 1 << 22, 1), (1 << 26, 1 << 24, 1), (1 << 28, 1 << 24, 1)]
    if far == "heads":
        strides = [(16, 1 << 29, 1), (16, 1 << 30, 1), (16, 1 << 30, 1)]
    views = [far_apart(x, *s).requires_grad_() for x, s in zip(inputs, strides, strict=True)]
    far_o, _ = attend_plain(TRITON, case, *views, selected)
    assert same_bits(o, far_o)
    far_grads = torch.autograd.grad(far_o, views, far_apart(grad_o, *strides[0]))
    for x, y in zip(grads, far_grads, strict=True):
        assert same_bits(x, y)


# Blocks own and fetched, behind each other in rows or mixed; short ones at the ends of documents;
# tiles of a block; sums apart.
TMA_CASES = [
    Case("packed", (1, 37, 0, 7, 21), key_width=16, value_width=32),
    Case("runs", (60, 90), ((1, 37, 21), (1, 70, 1)), 8, 1, 64, 64, select_block=32),
    Case("many_keys", (280,), ((0, 240, 17),), 8, 1, 16, 16, select_block=128, num_selected=40),
]
LONG_TMA_CASES = [
    Case("R16", (900, 31), (), 32, 2, 128, 128, select_block=64, num_selected=16),
    Case("R1", (500, 20), (), 2, 2, 64, 128),
    Case("R3", (500, 20), (), 6, 2, 32, 16, select_block=32),
    Case("R32", (400,), (), 32, 1, 128, 64),
    Case("block_128", (1500, 200), (), 8, 1, 128, 128, select_block=128, num_selected=6),
    Case("apart", (6000,), ((0, 5000, 600),), 16, 1, 128, 128, select_block=64, num_selected=70),
]


@pytest.mark.parametrize("case", TMA_CASES + LONG_TMA_CASES * (not INTERPRETED), ids=case_id)
@pytest.mark.parametrize("dtype", natively_all(torch.float16), ids=case_id)
def test_tma_gives_the_bits_of_pointers(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain kernels, where TMA is there; the interpreter's descriptors are bounded pointers."""
    if not INTERPRETED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU whose kernels use TMA")
    inputs, grad_o = make_inputs(case, dtype)
    choice, made, results = random_choice(case), [], []
    descriptor = blocks._descriptor
    monkeypatch.setattr(blocks, "_descriptor", lambda *a: made.append(a) or descriptor(*a))
    for tma in (False, True):
        made.clear()
        gpu = replace(shapes.HOPPER, selected_tma=tma, selected_gluon=False)
        monkeypatch.setattr(shapes, "INTERPRETER", gpu)
        monkeypatch.setitem(shapes.GPUS, 9, gpu)
        results.append(attention_results(TRITON, case, inputs, grad_o, choice))
        assert len(made) == (8 if tma and dtype != torch.float32 else 0)
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


def test_pointers_where_tma_cannot() -> None:
    """Addresses and strides of whole 16 bytes, widths that are not padded, blocks of one kind."""
    tile = WalkTile(16, 4, 3, False, tma=True)

    def found(rows: tuple[int, int], cut: tuple[int, int] = (0, 0), width: int = 16) -> list[bool]:
        wide = [torch.zeros(row + 1, 2, 34 if cut[0] else 32, dtype=torch.float16) for row in rows]
        x = [y[:-1, :, cut[1] : cut[1] + width] for y in wide]
        return [y is not None for y in blocks.tiles_of([x[0], x[0], x[1], x[1]], tile)]

    assert found((32, 16)) == [True] * 4
    assert found((32, 16), (0, 8)) == [True] * 4
    assert found((32, 0)) == [True, True, False, False]
    assert found((0, 16)) == [True] * 4
    for cannot in (((0, 0),), ((32, 16), (0, 4)), ((32, 16), (2, 0)), ((32, 16), (0, 0), 24)):
        assert found(*cannot) == [False] * 4
    assert not any(blocks.tiles_of([torch.zeros(16, 2, 16)] * 4, tile._replace(tma=False)))


# The second one has kernels of its own on Hopper.
GATE_CASES = [
    Case("small", (37,), value_width=16),
    Case("R16", (300,), (), 16, 1, 128, 128, select_block=64),
]


@pytest.mark.parametrize("case", GATE_CASES[: 1 if INTERPRETED else 2], ids=case_id)
@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
def test_gate(case: Case, dtype: torch.dtype) -> None:
    """Gradients of g o and of g, for gates of both signs and 0; o is that without a gate."""
    inputs, grad_o = make_inputs(case, dtype)
    gates = random(case.documents[0], case.heads, 3, dtype=torch.float32)
    gates[5, 1] = 0
    gate, selected = gates[..., 1], random_choice(case)
    leaves = [x.to(DEVICE).requires_grad_() for x in (*inputs, gate)]
    o, lse, summand = attend_plain(TRITON, case, *leaves[:3], selected, gate=leaves[3])
    assert not o.requires_grad
    assert summand.shape == o.shape
    assert same_bits(o, attend_plain(TRITON, case, *leaves[:3], selected)[0])
    dq, dk, dv, dgate = torch.autograd.grad(summand, leaves, grad_o.to(DEVICE))

    found = dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, dq, dk, dv), strict=True))
    found = {name: x.detach().cpu() for name, x in found.items()}
    own_masks = masks(case, "selected", selected)
    gated = gate[..., None].double() * grad_o.double()
    assert_attention(case, found, own_masks, case.bounds, inputs, gated)
    exact, plain = (
        dense_attention(case, own_masks, case.bounds, inputs, gated, x)["o"] * grad_o.to(x)
        for x in (torch.float64, plain_dtype(dtype))
    )
    sums = plain.sum(-1), exact.sum(-1)
    assert_2x(dgate.cpu(), *sums, dtype, "gate", cu_seqlens=case.bounds, heads=True)


def test_recomputed_and_without_gradients() -> None:
    case = Case("one", (20,), value_width=16)
    inputs, _ = make_inputs(case, torch.float16)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    selected = random_choice(case)
    o, lse = attend_plain(TRITON, case, *leaves, selected)
    assert not lse.requires_grad
    with torch.no_grad():
        assert same_bits(attend_plain(TRITON, case, *leaves, selected)[0], o)
    again, _ = checkpoint(attend_plain, TRITON, case, *leaves, selected, use_reentrant=False)
    grads = [torch.autograd.grad(x.sum(), leaves) for x in (o, again)]
    assert all(same_bits(x, y) for x, y in zip(*grads, strict=True))

"""Traps of masks: values too small to be out of the way, and what stands where nobody looks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_dist import NativeSparseAttention
from nsa_kernels import QuerySegments
from tests.traps.mutation import Rewritten, catches
from tests.traps.seam import (
    BACKEND,
    SELECT,
    SMALL,
    WINDOW,
    all_blocks,
    assert_sees,
    attend_compressed,
    attend_selected,
    attend_window,
    choose,
    identity_values,
    num_blocks,
    one_document,
)
from tests.traps.test_compression import blocks_up_to


@catches(
    "finite mask value that leaks future blocks",
    "-1e9 for the hidden keys of the compressed and window branches",
    Rewritten(
        "nsa_kernels.pytorch:Tile.logits",
        "$X.masked_fill($HIDDEN, -math.inf)",
        "$X.masked_fill($HIDDEN, -1e9)",
    ),
)
@catches(
    "finite mask value that leaks future blocks",
    "-1e9 for the hidden keys of the selected branch",
    Rewritten(
        "nsa_kernels.pytorch:_Pool.attend",
        "$X = $X.masked_fill($HIDDEN, -math.inf)",
        "$X = $X.masked_fill($HIDDEN, -1e9)",
    ),
)
def test_trap_finite_mask_value_that_leaks_future_blocks() -> None:
    """However low the logits of the keys that are seen, a masked one weighs nothing beside them."""
    length = 45
    t = torch.arange(length)
    segments, causal = one_document(length), t <= t[:, None]
    for dtype in (torch.float32, torch.float64):
        # Powers of two: all logits are the same number, whatever the order of additions.
        q = torch.full((length, 2, 4), 2.0**50, dtype=dtype)
        k = torch.full((length, 1, 4), -(2.0**50), dtype=dtype)
        values = identity_values(length, 1, dtype)
        o, _ = attend_window(q, k, values, segments)
        assert_sees(o, causal & (t > t[:, None] - WINDOW))
        blocks = all_blocks(t, 1, 6)
        assert_sees(attend_selected(q, k, values, blocks, segments, length)[0], causal)
        count = num_blocks(length)[0]
        o, _ = attend_compressed(q, k[:count], values[:count, :, :count], segments)
        assert_sees(o, blocks_up_to(t, count))
        selected = choose(q, k[:count], segments, n=3)
        assert (selected <= t[:, None, None] // SELECT).all()


def with_unseen_rows(x: Tensor, value: float, before: int = 3, after: int = 5) -> Tensor:
    """x [E, ...] among rows of ``value``."""
    rows = [x.new_full((n, *x.shape[1:]), value) for n in (before, after)]
    return torch.cat([rows[0], x.detach(), rows[1]]).requires_grad_()


@catches(
    "NaN left behind in a masked tile",
    "keys and values that are not finite are multiplied by 0",
    Rewritten("nsa_kernels.pytorch:FiniteRows.of", "not $BAD.any()", "True"),
)
def test_trap_nan_left_behind_in_a_masked_tile() -> None:
    """NaN in keys or values that a query does not see reaches neither output nor gradient."""
    length, seen = 45, 21
    segments = one_document(seen)
    q, k, v = (torch.randn(n, h, 8) for n, h in ((seen, 4), (length, 2), (length, 2)))
    selected = all_blocks(torch.arange(seen), 2, 3)
    complete = num_blocks(seen)[0]

    def run(k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, k_cmp, v_cmp)]
        query, k, v, k_cmp, v_cmp = leaves
        outputs = [
            attend_compressed(query, k_cmp, v_cmp, segments),
            attend_selected(query, k, v, selected, segments, length),
            attend_window(query, k, v, segments),
        ]
        sum(o.square().sum() for o, _ in outputs).backward()
        chosen = choose(query.detach(), k_cmp.detach(), segments, n=2)
        return [*(x for pair in outputs for x in pair), chosen, *(x.grad for x in leaves)]

    def spoiled(x: Tensor, first: int) -> Tensor:
        return torch.cat([x[:first], torch.full_like(x[first:], math.nan)])

    count = num_blocks(length)[0]
    clean = run(k, v, k[:count], v[:count])
    found = run(
        spoiled(k, seen),
        spoiled(v, seen),
        spoiled(k[:count], complete),
        spoiled(v[:count], complete),
    )
    for expected, result in zip(clean, found, strict=True):
        assert torch.equal(result, expected)
    # The first query of a tile sees less than the last, whose row may hold NaN.
    for x, where in ((k, 20), (v, 20)):
        bad = x.clone()
        bad[where] = math.nan
        o, _ = attend_window(q, bad if x is k else k, bad if x is v else v, segments)
        assert torch.isfinite(o[:where]).all() and o[where].isnan().all()


def test_trap_nan_of_another_document() -> None:
    """Through the layer: a document of NaN leaves every bit of its neighbours alone."""
    layer = NativeSparseAttention(24, SMALL)
    cu_seqlens = torch.tensor([0, 37, 58, 103], dtype=torch.int32)
    x = torch.randn(1, 103, 24)
    spoiled = x.clone()
    spoiled[0, 37:58] = math.nan
    out, found = (layer(y, cu_seqlens=cu_seqlens) for y in (x, spoiled))
    assert found[0, 37:58].isnan().all()
    assert torch.equal(found[0, :37], out[0, :37]) and torch.equal(found[0, 58:], out[0, 58:])


@catches(
    "unmasked dK/dV store",
    "a short block's gradients are stored as those of a whole one",
    Rewritten(
        "nsa_kernels.pytorch:_Pool.__init__",
        "$ROWS.where($INSIDE, $END)",
        "$ROWS.clamp(max=$END)",
        given=("$END = own[0].shape[0] + fetched[0].shape[0]",),
    ),
)
def test_trap_unmasked_dk_dv_store_past_a_short_block() -> None:
    """The gradient of a document's short last block ends where the block ends.

    Fetched blocks stand by owner: here the short block, number 1 of five tokens, is followed by
    number 0, whose gradient a store of a whole tile would overwrite.
    """
    length = SELECT + 5
    q = torch.randn(length, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(length, 1, 8, dtype=torch.float64) for _ in range(2))
    grad = torch.randn(length, 2, 8, dtype=torch.float64)
    selected = all_blocks(torch.arange(length), 1, 2)

    def gradients(order: list[int], rows: list[int]) -> list[Tensor]:
        """Of k, v in the document's order; ``order`` tells which tokens stand in the buffer."""
        tokens = torch.tensor(order)
        fetched = [x[tokens].requires_grad_() for x in (k, v)]
        nothing = k.new_zeros(0, 1, 8)
        o, _ = BACKEND.selected_attention(
            q,
            nothing,
            nothing,
            *fetched,
            selected,
            torch.tensor([rows]),
            torch.tensor([SELECT, length - SELECT]),
            one_document(length),
            select_block=SELECT,
            scale=0.3,
        )
        o.backward(grad)
        inverse = tokens.argsort()
        return [x.grad[inverse] for x in fetched if x.grad is not None]

    in_order = gradients(list(range(length)), [0, SELECT])
    turned = gradients([*range(SELECT, length), *range(SELECT)], [length - SELECT, 0])
    for expected, found in zip(in_order, turned, strict=True):
        assert expected.abs().sum(-1).all()
        assert torch.equal(found, expected)


@catches(
    "unmasked dK/dV store",
    "gradients start as memory that was never written",
    Rewritten(
        "nsa_kernels.pytorch:TreeSum.__init__", "torch.zeros_like($LIKE)", "torch.empty_like($LIKE)"
    ),
)
def test_trap_unmasked_dk_dv_store_to_rows_that_nobody_sees() -> None:
    """Their gradient is written, as 0, whatever they hold."""
    length = 21
    q = torch.randn(length, 4, 8)
    for value in (0.5, math.nan):
        k, v = (with_unseen_rows(torch.randn(length, 2, 8), value) for _ in range(2))
        segments = QuerySegments.from_rows([(0, length, 0, 3, 0, 3)])
        blocks = torch.arange(3, 3 + length, SELECT)
        nothing = k.detach()[:0]
        for o, used in (
            (attend_window(q, k, v, segments)[0], slice(3, 3 + length)),
            (attend_compressed(q, k, v, segments)[0], slice(3, 3 + num_blocks(length)[0])),
            (
                BACKEND.selected_attention(
                    q,
                    k,
                    v,
                    nothing,
                    nothing,
                    all_blocks(torch.arange(length), 2, 3),
                    blocks.expand(2, -1),
                    (3 + length - blocks).clamp(max=SELECT),
                    segments,
                    select_block=SELECT,
                    scale=0.3,
                )[0],
                slice(3, 3 + length),
            ),
        ):
            for grad in torch.autograd.grad(o.square().sum(), (k, v)):
                unseen = torch.ones(len(grad), dtype=torch.bool)
                unseen[used] = False
                assert torch.equal(grad[unseen], torch.zeros_like(grad[unseen]))
                assert grad[used].abs().sum(-1).all()

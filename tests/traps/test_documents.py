"""Traps of packed documents, padding and batches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import (
    BlockCompressor,
    NativeSparseAttention,
    NSAConfig,
    make_sharding,
    native_sparse_attention,
    shard_batch,
)
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan import Plan
from nsa_kernels import QuerySegments, Segment
from tests.traps.mutation import Replaced, Rewritten, catches
from tests.traps.seam import BLOCK, SELECT, SMALL, STRIDE

LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(layer: NativeSparseAttention, x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Output and all gradients of the sum of its squares."""
    x = x.clone().requires_grad_()
    out = layer(x, cu_seqlens=cu_seqlens)
    out.square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    return [g for g in (out.detach(), x.grad, *grads) if g is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def one_by_one(layer: NativeSparseAttention, x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """What ``run`` returns when every document is a call of its own."""
    results = [run(layer, piece, None) for piece in x.split(lengths, dim=1) if piece.shape[1]]
    out, grad_x = (torch.cat(pieces, dim=1) for pieces in list(zip(*results, strict=True))[:2])
    grads = [torch.stack(g).sum(0) for g in list(zip(*results, strict=True))[2:]]
    return [out, grad_x, *grads]


@catches(
    "zero-length documents",
    "documents are numbered as if the empty ones were not there",
    Rewritten(
        "nsa_dist.plan:cut_stream",
        "torch.searchsorted($BOUNDARIES, $STARTS, right=True)",
        "torch.searchsorted($BOUNDARIES.unique_consecutive(), $STARTS, right=True)",
        given=("$BOUNDARIES = cu_seqlens.long()",),
    ),
)
def test_trap_zero_length_documents() -> None:
    """Empty documents, at any place and several in a row, take part in nothing."""
    layer = NativeSparseAttention(24, SMALL, dtype=torch.float64)
    full, lengths = (5, 40, 1, 29), (0, 0, 5, 40, 0, 1, 0, 0, 0, 29, 0)
    x = torch.randn(1, sum(full), 24, dtype=torch.float64)
    found = run(layer, x, bounds(*lengths))
    assert_same(found, run(layer, x, bounds(*full)))
    assert_same(found, one_by_one(layer, x, full))
    tokens = torch.arange(sum(full))[None]
    for layout, rank in itertools.product(LAYOUTS, range(4)):
        # The padding of whole documents, if any, does not depend on the empty ones.
        group = ContextGroup(None, rank, 4)
        with_empty, without = (
            shard_batch(tokens, cu_seqlens=bounds(*n), layout=layout, group=group)
            for n in (lengths, full)
        )
        for name in ("tokens", "labels", "position_ids"):
            assert torch.equal(getattr(with_empty, name), getattr(without, name))


@catches(
    "slack rows past cu_seqlens[-1]",
    "only too few rows are refused",
    Rewritten(
        "nsa_dist.plan:check_lengths",
        "int(cu_seqlens[-1]) != length",
        "int(cu_seqlens[-1]) > length",
    ),
)
@catches(
    "slack rows past cu_seqlens[-1]",
    "sharding leaves its padding out of the boundaries",
    Rewritten(
        "nsa_dist:make_sharding",
        "torch.cat((cu_seqlens, cu_seqlens.new_tensor([$LENGTH])))",
        "cu_seqlens.clone()",
    ),
)
def test_trap_slack_rows_past_the_last_document() -> None:
    """Rows behind cu_seqlens[-1] belong to no document: refused, and never made by sharding."""
    layer = NativeSparseAttention(24, SMALL)
    x, tokens = torch.randn(1, 40, 24), torch.zeros(1, 40, dtype=torch.int64)
    for last in (32, 48):
        with pytest.raises(
            ValueError, match=rf"cu_seqlens must end at .* 40\b.*, got last boundary {last}"
        ):
            layer(x, cu_seqlens=bounds(13, last - 13))
        with pytest.raises(
            ValueError, match=rf"cu_seqlens must end at .* 40\b.*, got last boundary {last}"
        ):
            shard_batch(tokens, cu_seqlens=bounds(13, last - 13))
    for layout, rank in itertools.product(LAYOUTS, range(4)):
        group = ContextGroup(None, rank, 4)
        batch = shard_batch(tokens[:, :37], cu_seqlens=bounds(13, 24), layout=layout, group=group)
        assert batch.cu_seqlens is not None
        assert int(batch.cu_seqlens[-1]) == 4 * batch.tokens.shape[1]


@catches(
    "tail padding that drops keys",
    "a document's short last selection block is left out",
    Rewritten(
        "nsa_dist.plan:Grid.per_document",
        "($LENGTH + self.stride - 1) // self.stride",
        "$LENGTH // self.stride",
    ),
)
@catches(
    "tail padding that drops keys",
    "a short last selection block counts as empty",
    Rewritten(
        "nsa_dist.plan:_own_blocks",
        "$LENGTH.clamp(max=$BLOCK)",
        "$LENGTH.clamp(max=$BLOCK) // $BLOCK * $BLOCK",
    ),
)
def test_trap_tail_padding_that_drops_keys() -> None:
    """The last tokens of a document that fills no whole block are keys like the others."""
    config = NSAConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        compress_block=BLOCK,
        compress_stride=STRIDE,
        select_block=SELECT,
        num_selected=8,
        window=64,
        branches=("selected", "window"),
        independent_kv=False,
    )
    for length in (1, 7, 13, 29, 47):
        q, k, v = (torch.randn(1, length, n, 8, dtype=torch.float64) for n in (2, 1, 1))
        for branch in config.branches:  # n blocks and w tokens reach over the whole document
            gates = torch.zeros(1, length, 2, 2, dtype=torch.float64)
            gates[..., config.branches.index(branch)] = 1.0
            compressor = BlockCompressor(config, 8, dtype=torch.float64)
            out = native_sparse_attention(q, k, v, gates, compressor, config=config)
            dense = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
            torch.testing.assert_close(out, dense.transpose(1, 2), rtol=0, atol=1e-12)
    for layout, size, lengths in itertools.product(LAYOUTS, (2, 4, 8), ((29,), (1, 0, 13, 15))):
        tokens = torch.arange(sum(lengths))[None]
        held = [
            make_sharding(
                sum(lengths),
                cu_seqlens=bounds(*lengths),
                layout=layout,
                group=ContextGroup(None, rank, size),
            ).shard(tokens, -1)
            for rank in range(size)
        ]
        whole = torch.cat(held, dim=1)
        assert whole[whole >= 0].sort().values.tolist() == tokens[0].tolist()


def with_base_0(plan: Plan, column: str) -> Plan:
    table = plan.segments.table.clone()
    table[:, Segment._fields.index(column)] = 0
    return replace(plan, segments=QuerySegments.from_table(table))


def from_compressed_base_0(build_plan: Any, *args: Any) -> Plan:
    return with_base_0(build_plan(*args), "compressed_base")


def from_selected_base_0(build_plan: Any, *args: Any) -> Plan:
    return with_base_0(build_plan(*args), "selected_base")


def from_window_base_0(build_plan: Any, *args: Any) -> Plan:
    return with_base_0(build_plan(*args), "window_base")


@catches(
    "KV base pointer wrong with batches",
    "compressed keys are read from the first row's base",
    Replaced("nsa_dist.plan:build_plan", from_compressed_base_0),
    case="compressed",
)
@catches(
    "KV base pointer wrong with batches",
    "selection blocks are read from the first row's base",
    Replaced("nsa_dist.plan:build_plan", from_selected_base_0),
    case="selected",
)
@catches(
    "KV base pointer wrong with batches",
    "windows are read from the first row's base",
    Replaced("nsa_dist.plan:build_plan", from_window_base_0),
    case="window",
)
@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_trap_kv_base_pointer_wrong_with_batches(branch: str) -> None:
    """Two rows at once are each row alone: blocks and windows start at the row's own base."""
    layer = NativeSparseAttention(24, replace(SMALL, branches=(branch,)), dtype=torch.float64)
    x = torch.randn(2, 61, 24, dtype=torch.float64)
    alone = [run(layer, row[None], None) for row in x]
    expected = [torch.cat(rows) for rows in list(zip(*alone, strict=True))[:2]]
    expected += [a + b for a, b in list(zip(*alone, strict=True))[2:]]
    assert_same(run(layer, x, None), expected)


def whatever_the_documents(same_documents: Any, *args: Any) -> bool:
    return True


@catches(
    "plan cached by shape and used for other documents",
    "the boundaries are no part of the key",
    Replaced("nsa_dist.attention:_same_documents", whatever_the_documents),
)
@catches(
    "plan cached by shape and used for other documents",
    "the key holds the caller's tensor, which then changes in place",
    Rewritten(
        "nsa_dist.attention:find_plan",
        "None if cu_seqlens is None else cu_seqlens.clone()",
        "cu_seqlens",
    ),
)
def test_trap_plan_cached_by_shape_and_used_for_other_documents() -> None:
    """Streams of one length with as many documents, boundaries elsewhere: each gets its own plan,
    also when the boundaries are changed in place and when an old stream comes back."""
    layer = NativeSparseAttention(24, SMALL, dtype=torch.float64)
    x = torch.randn(1, 60, 24, dtype=torch.float64)
    streams = ((20, 30, 10), (10, 30, 20), (1, 58, 1), (20, 30, 10))
    expected = [one_by_one(layer, x, lengths) for lengths in streams]
    reused = torch.zeros(4, dtype=torch.int32)
    for lengths, result in zip(streams, expected, strict=True):
        reused.copy_(bounds(*lengths))
        assert_same(run(layer, x, reused), result)
    for lengths, result in zip(streams, expected, strict=True):
        assert_same(run(layer, x, bounds(*lengths)), result)


def test_plan_made_in_inference_mode_serves_training() -> None:
    """Evaluation may be the first to see a batch's documents or its shape."""
    layer = NativeSparseAttention(24, SMALL, dtype=torch.float64)
    x = torch.randn(1, 44, 24, dtype=torch.float64)
    for cu_seqlens in (None, bounds(20, 24)):
        with torch.inference_mode():
            evaluated = layer(x, cu_seqlens=None if cu_seqlens is None else cu_seqlens.clone())
        assert torch.equal(run(layer, x, cu_seqlens)[0], evaluated)

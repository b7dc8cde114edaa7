"""Traps of the compressed branch: who sees which compressed token, and who sees none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist import NativeSparseAttention
from nsa_kernels import QuerySegments, Segment
from nsa_kernels.reference import ReferenceOptions, RotaryOptions, layer_reference
from tests.traps.mutation import Replaced, Rewritten, catches
from tests.traps.seam import (
    BLOCK,
    SMALL,
    STRIDE,
    assert_sees,
    attend_compressed,
    identity_values,
    num_blocks,
)


def blocks_up_to(positions: Tensor, count: int) -> Tensor:
    """bool [N, count]: block i is complete at or before the position."""
    return torch.arange(count) * STRIDE + BLOCK - 1 <= positions[:, None]


def inverted(hidden_blocks: Any, *args: Any) -> Tensor:
    return ~hidden_blocks(*args)


@catches(
    "inverted compression mask",
    "completed blocks are hidden, the others shown",
    Replaced("nsa_kernels.pytorch:hidden_blocks", inverted),
)
def test_trap_inverted_compression_mask() -> None:
    """Read the wrong way round, the mask shows the answer instead of the past, and the training
    loss falls to 0: gradients reach future tokens and not the earlier ones."""
    config = replace(SMALL, branches=("compressed",))
    layer = NativeSparseAttention(24, config, rotary=None, dtype=torch.float64)
    length = 40
    for t in (0, 2, 3, 4, 17, 38, 39):
        x = torch.randn(1, length, 24, dtype=torch.float64, requires_grad=True)
        layer(x)[0, t].square().sum().backward()
        assert x.grad is not None
        reached = x.grad[0].abs().sum(-1) > 0
        expected = torch.zeros(length, dtype=torch.bool)
        complete = int(blocks_up_to(torch.tensor([t]), num_blocks(length)[0]).sum())
        if complete:
            expected[: (complete - 1) * STRIDE + BLOCK] = True
            expected[t] = True  # through the query and the gate
        assert torch.equal(reached, expected)


def of_the_token_after(hidden_blocks: Any, segment: Segment, *rest: Any) -> Tensor:
    return hidden_blocks(segment._replace(position=segment.position + 1), *rest)


def counted_a_token_early(num_visible: Any, position: int, *rest: Any) -> int:
    return num_visible(position + 1, *rest)


@catches(
    "block visible one token early",
    "a block counts from its last token but one on",
    Replaced("nsa_kernels.pytorch:hidden_blocks", of_the_token_after),
)
@catches(
    "block visible one token early",
    "the number of blocks that all queries of a tile see is one token early",
    Replaced("nsa_kernels.pytorch:num_visible", counted_a_token_early),
)
def test_trap_block_visible_one_token_early() -> None:
    """A block counts from its last token on, wherever runs of queries begin and end."""
    lengths, runs = (21, 30), ((0, 21), (0, 3), (3, 4), (7, 1), (8, 22))
    counts = [num_blocks(length)[0] for length in lengths]
    documents = (0, 1, 1, 1, 1)
    rows, start = [], 0
    for (position, length), document in zip(runs, documents, strict=True):
        rows.append((start, length, position, document * counts[0], 0, 0))
        start += length
    q = torch.randn(start, 4, 8, dtype=torch.float64)
    k = torch.randn(sum(counts), 2, 8, dtype=torch.float64)
    segments = QuerySegments.from_rows(rows)
    o, lse = attend_compressed(q, k, identity_values(len(k), 2), segments)
    visible = torch.block_diag(
        *(
            blocks_up_to(torch.arange(length), count).double()
            for length, count in zip(lengths, counts, strict=True)
        )
    ).bool()
    assert_sees(o, visible)
    assert torch.equal(lse > -torch.inf, visible.any(-1, keepdim=True).expand(-1, 4))


@catches(
    "rows or ranks fully masked",
    "queries before the first block's end get a softmax over nothing",
    Rewritten(
        "nsa_kernels.pytorch:compressed_attention",
        "min(max(0, block - 1 - $SEGMENT.position), $SEGMENT.length)",
        "0",
    ),
)
def test_trap_row_fully_masked() -> None:
    """The first l-1 queries of a document see no block: 0 out, -inf, no gradient, never NaN."""
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (21, 9, 9))
    o, lse = attend_compressed(q, k, v, QuerySegments.from_rows([(0, 21, 0, 0, 0, 0)]))
    blind = torch.arange(21) < BLOCK - 1
    assert not o[blind].any() and o[~blind].abs().sum(-1).all()
    assert torch.equal(lse == -torch.inf, blind[:, None].expand(-1, 2))
    o.backward(torch.randn_like(o))
    for x in (q, k, v):
        assert x.grad is not None and torch.isfinite(x.grad).all()
    assert not q.grad[blind].any()


@catches(
    "zero compression windows",
    "the number of blocks of a document shorter than one falls below 0",
    Rewritten("nsa_dist.plan:Grid.per_document", "$COUNT.clamp(min=0)", "$COUNT"),
)
def test_trap_zero_compression_windows() -> None:
    """Documents shorter than a block have no compressed token, and a stream may hold no other."""
    layer = NativeSparseAttention(24, SMALL, dtype=torch.float64)
    lengths = (1, 3, 2, 1, 3)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(1, sum(lengths), 24, dtype=torch.float64, requires_grad=True)
    out, details = layer(x, cu_seqlens=cu_seqlens, return_details=True)
    assert (details.lse["compressed"] == -torch.inf).all()
    expected = layer_reference(
        x[0],
        dict(layer.named_parameters()),
        ReferenceOptions.from_config(SMALL),
        rotary=RotaryOptions(),
        cu_seqlens=cu_seqlens,
    ).output
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)
    out.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != ("compressor" in name), name

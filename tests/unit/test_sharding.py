"""Padding, cutting, label shifting and their inverses, without processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import make_sharding, shard, shard_batch, unshard
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan.layout import check_lengths, make_layout
from tests.distributed.ranks import Ranks

LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
BOUNDS = torch.tensor([0, 5, 5, 6, 37, 53], dtype=torch.int32)


def on_rank(rank: int, size: int) -> ContextGroup:
    """A group that nothing is sent over."""
    return ContextGroup(None, rank, size)


def test_zigzag_columns() -> None:
    columns = [
        make_sharding(16, layout="zigzag", group=on_rank(r, 2)).local_columns.tolist()
        for r in range(2)
    ]
    assert columns == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]


def test_contiguous_columns_and_padding_document() -> None:
    sharding = make_sharding(53, cu_seqlens=BOUNDS, layout="contiguous", group=on_rank(1, 4))
    assert sharding.padded_length == 56
    assert sharding.cu_seqlens is not None
    assert sharding.cu_seqlens.tolist() == [0, 5, 5, 6, 37, 53, 56]
    assert sharding.local_columns.tolist() == list(range(14, 28))


def test_per_document_zigzag_pads_each_document() -> None:
    sharding = make_sharding(
        53, cu_seqlens=BOUNDS, layout="zigzag_per_document", group=on_rank(0, 2)
    )
    assert sharding.cu_seqlens is not None
    assert sharding.cu_seqlens.tolist() == [0, 8, 8, 12, 44, 60]
    # Chunks 0 and 3 of each document: 2, then 1, then 8, then 4 tokens a chunk.
    assert sharding.local_columns.tolist() == [
        *(0, 1, 6, 7),
        *(8, 11),
        *range(12, 20),
        *range(36, 44),
        *range(44, 48),
        *range(56, 60),
    ]
    source = sharding.source.tolist()
    assert source[:8] == [0, 1, 2, 3, 4, -1, -1, -1]
    assert source[8:12] == [5, -1, -1, -1]
    assert source[12:43] == list(range(6, 37))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_shards_make_up_the_batch(layout: str, size: int, packed: bool) -> None:
    bounds = BOUNDS if packed else None
    x = torch.randn(1 if packed else 3, 53, 2)
    shardings = [
        make_sharding(53, cu_seqlens=bounds, layout=layout, group=on_rank(r, size))
        for r in range(size)
    ]
    parts = [s.shard(x, pad_value=9.0) for s in shardings]
    assert len({part.shape for part in parts}) == 1
    first = shardings[0]
    cut = make_layout(layout, size)
    assert check_lengths(cut, x.shape[0], first.padded_length, first.cu_seqlens) is None
    whole = torch.full((x.shape[0], first.padded_length, 2), torch.nan)
    for s, part in zip(shardings, parts, strict=True):
        whole[:, s.local_columns] = part
    assert torch.equal(whole[:, first.source >= 0], x)
    assert bool((whole[:, first.source < 0] == 9.0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_labels_are_shifted_per_document_before_the_cut(layout: str, size: int) -> None:
    tokens = torch.arange(100, 153)[None]
    batches = [
        shard_batch(tokens, cu_seqlens=BOUNDS, layout=layout, group=on_rank(r, size))
        for r in range(size)
    ]
    pairs, positions = {}, {}
    for batch in batches:
        assert batch.num_targets == 53 - 4  # One for each document that has tokens.
        for token, label, position in zip(
            batch.tokens[0].tolist(),
            batch.labels[0].tolist(),
            batch.position_ids[0].tolist(),
            strict=True,
        ):
            if token:
                pairs[token], positions[token] = label, position
            else:
                assert label == -100
    last = {104, 105, 136, 152}
    assert pairs == {t: -100 if t in last else t + 1 for t in range(100, 153)}
    starts = [100, 105, 106, 137]
    assert positions == {t: t - max(s for s in starts if s <= t) for t in range(100, 153)}


def test_given_labels_keep_their_mask() -> None:
    tokens = torch.arange(8)[None]
    labels = tokens.clone()
    labels[0, 3] = -100
    batch = shard_batch(tokens, labels=labels)
    assert batch.labels.tolist() == [[1, 2, -100, 4, 5, 6, 7, -100]]
    assert batch.num_targets == 6


def test_rows_without_boundaries_end_without_a_target() -> None:
    batch = shard_batch(torch.arange(10).view(2, 5))
    assert batch.cu_seqlens is None
    assert batch.labels.tolist() == [[1, 2, 3, 4, -100], [6, 7, 8, 9, -100]]


def round_trip(layout: str, packed: bool) -> bool:
    group = dist.group.WORLD
    bounds = BOUNDS if packed else None
    x = torch.arange((1 if packed else 2) * 53 * 2).view(-1, 53, 2)
    options = {"cu_seqlens": bounds, "layout": layout, "group": group}
    local = shard(x, **options)
    tokens = x[..., 0]
    batch = shard_batch(tokens, **options)
    return torch.equal(unshard(local, 53, **options), x) and torch.equal(
        batch.unshard(batch.tokens), tokens
    )


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unshard_inverts_shard(layout: str, packed: bool, ranks_of: Callable[[int], Ranks]) -> None:
    assert all(ranks_of(4).run(round_trip, layout, packed))


def test_unshard_carries_no_gradient() -> None:
    x: Tensor = torch.randn(1, 6, 2, requires_grad=True)
    assert not unshard(shard(x), 6).requires_grad

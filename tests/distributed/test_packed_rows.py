"""Packed documents in batches of several rows, and their boundaries found from positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import boundaries_from_positions, context_group, make_sharding
from tests.distributed.layer_case import LayerCase, variants
from tests.distributed.ranks import Ranks

TOLERANCE = 1e-12
ROWS = ((16, 48, 24, 40), (8, 0, 96, 24))
"""Documents of each row: multiples of 2P for every number P of ranks here."""
CASES = {
    "contiguous": LayerCase(layout="contiguous"),
    "zigzag": LayerCase(),
    "zigzag_per_document": LayerCase(layout="zigzag_per_document"),
    "zigzag-shared-kv": variants(LayerCase(), independent_kv=False),
}


def bounds_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    shape = (len(ROWS), sum(ROWS[0]), 24)
    x, grad = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return x, grad


def by_rows(case: LayerCase) -> dict[str, Tensor]:
    """Each row by itself on one rank, the gradients of weights added."""
    layer = case.layer()
    x, grad = inputs()
    x.requires_grad_()
    outputs = [
        layer(x[row : row + 1], cu_seqlens=bounds_of(lengths)) for row, lengths in enumerate(ROWS)
    ]
    output = torch.cat(outputs)
    output.backward(grad)
    return {"output": output.detach(), "x": x.grad} | {
        name: p.grad for name, p in layer.named_parameters() if p.grad is not None
    }


def as_a_batch(case: LayerCase) -> dict[str, Tensor]:
    """The rows as one batch on the ranks of this process's world."""
    group = dist.group.WORLD
    layer = case.layer(group)
    shardings = [
        make_sharding(sum(lengths), cu_seqlens=bounds_of(lengths), layout=case.layout, group=group)
        for lengths in ROWS
    ]
    whole = torch.cat([bounds_of(lengths)[:-1] + row * 128 for row, lengths in enumerate(ROWS)])
    whole = torch.cat((whole, torch.tensor([len(ROWS) * 128]))).int()

    def cut(rows: Tensor) -> Tensor:
        return torch.cat([s.shard(rows[i : i + 1]) for i, s in enumerate(shardings)])

    def join(rows: Tensor) -> Tensor:
        return torch.cat([s.unshard(rows[i : i + 1]) for i, s in enumerate(shardings)])

    x, grad = map(cut, inputs())
    x.requires_grad_()
    output = layer(x, cu_seqlens=whole)
    output.backward(grad)
    found = {"output": join(output.detach()), "x": join(x.grad)}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_rows(name: str, ranks: int, ranks_of: Callable[[int], Ranks]) -> None:
    expected = by_rows(CASES[name])
    for found in ranks_of(ranks).run(as_a_batch, CASES[name]):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            largest = float(value.abs().max())
            assert float((found[key] - value).abs().max()) <= TOLERANCE * max(1.0, largest), key


def refused(bounds: list[int]) -> str:
    layer = LayerCase().layer(dist.group.WORLD)
    x = torch.zeros(2, 128 // dist.get_world_size(), 24, dtype=torch.float64)
    try:
        layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ([0, 128], "cu_seqlens must end at the whole stream's length 256 (2 rows of 128)"),
        ([0, 100, 256], "cu_seqlens must hold the start of each of the 2 rows of 128 tokens"),
    ],
    ids=["one-row", "a-document-over-two-rows"],
)
def test_boundaries_that_do_not_fit_the_rows(
    bounds: list[int], told: str, ranks_of: Callable[[int], Ranks]
) -> None:
    for message in ranks_of(2).run(refused, bounds):
        assert told in message


def positions_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def found_in_positions(positions: Tensor, layout: str, cut_as: str) -> Any:
    """The boundaries, or the error, of whole positions that were split by the layout ``cut_as``."""
    group = dist.group.WORLD
    local = make_sharding(positions.shape[1], layout=cut_as, group=group).shard(positions)
    try:
        return boundaries_from_positions(local, layout=layout, group=context_group(group)).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_boundaries_from_positions(
    layout: str, ranks: int, ranks_of: Callable[[int], Ranks]
) -> None:
    positions = torch.stack([positions_of(lengths) for lengths in ROWS])
    positions[1, :8] += 30  # The row begins within a document.
    found = ranks_of(ranks).run(found_in_positions, positions, layout, layout)
    # A document of no tokens has no position.
    assert found == [[0, 16, 64, 88, 128, 136, 232, 256]] * ranks


@pytest.mark.parametrize(
    ("layout", "cut_as", "told"),
    [
        ("zigzag", "contiguous", "positions must go on by 1 or start again at 0 in rows split as"),
        ("contiguous", "zigzag", "positions must go on by 1 or start again at 0 in rows split as"),
        ("zigzag_per_document", "zigzag", "layout must be 'contiguous' or 'zigzag' to find"),
    ],
)
def test_positions_that_are_split_otherwise(
    layout: str, cut_as: str, told: str, ranks_of: Callable[[int], Ranks]
) -> None:
    positions = torch.arange(128).repeat(2, 1)
    for message in ranks_of(2).run(found_in_positions, positions, layout, cut_as):
        assert told in message

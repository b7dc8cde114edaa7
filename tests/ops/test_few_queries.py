"""The PyTorch backend's attention of few queries, against dense code."""

from __future__ import annotations

import pytest
import torch

from nsa_kernels import QuerySegments
from nsa_kernels.pytorch import few_queries
from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.backends import PYTORCH
from tests.ops.few_queries import CASES, Decoding, Problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_against_dense_code(case: Decoding, dtype: torch.dtype) -> None:
    problem = Problem(case, dtype)
    out, blocks = problem.run(PYTORCH, problem.segments(), torch.arange(len(problem.q)))
    assert out.dtype == dtype
    plain = problem.dense(blocks, plain_dtype(dtype))
    assert_2x(out, plain, problem.dense(blocks, torch.float64), dtype, case.name, heads=True)
    expected = PYTORCH.ops.select_blocks(
        problem.q,
        problem.keys["compressed"],
        torch.zeros(problem.q.shape[:2]),
        problem.segments(),
        block=case.block,
        stride=case.stride,
        scale=case.scale,
        select_block=case.select_block,
        num_selected=case.num_selected,
        num_init_blocks=1,
        num_local_blocks=2,
    )
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("elements", [1, 1 << 9])
def test_some_queries_at_a_time(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one query and of some give what all at once give."""
    problem = Problem(CASES[1], torch.float64)
    every = torch.arange(len(problem.q))
    expected, blocks = problem.run(PYTORCH, problem.segments(), every)
    monkeypatch.setattr(few_queries, "tile_rows", lambda *_: max(1, elements >> 8))
    found, found_blocks = problem.run(PYTORCH, problem.segments(), every)
    assert torch.equal(found_blocks, blocks)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name.replace(" ", "-"))
def test_paged_caches(case: Decoding) -> None:
    problem = Problem(case, torch.float64)
    every = torch.arange(len(problem.q))
    expected, expected_blocks = problem.run(PYTORCH, problem.segments(), every)
    problem.into_pages(8)
    found, blocks = problem.run(PYTORCH, problem.segments(), every)
    assert torch.equal(found, expected)
    assert torch.equal(blocks, expected_blocks)


def test_no_query() -> None:
    problem = Problem(CASES[0], torch.float32)
    out, blocks = problem.run(PYTORCH, QuerySegments.from_rows([]), torch.arange(0))
    assert out.shape == (0, 4, 32)
    assert blocks.shape == (0, 2, 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_positions_that_the_device_alone_knows(case: Decoding) -> None:
    """The last token of each row, in tables for caches that are full."""
    problem = Problem(case, torch.float64)
    last = torch.tensor([new for _, new in case.rows]).cumsum(0) - 1
    expected, expected_blocks = problem.run(PYTORCH, problem.segments(only=1), last)
    found, blocks = problem.run(PYTORCH, problem.on_device(), last)
    assert torch.equal(blocks, expected_blocks)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()

"""Attention of few queries over caches, against dense code and against itself in other batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_kernels import QuerySegments
from nsa_kernels.triton.decoding import constants
from tests.ops.accuracy import assert_2x
from tests.ops.backends import PYTORCH, TRITON, natively_all
from tests.ops.few_queries import CASES, Decoding, Problem
from tests.ops.op_cases import same_bits


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short documents have several parts, and pieces of parts."""
    monkeypatch.setattr(constants, "SPLIT", 64)
    monkeypatch.setattr(constants, "PART", 32)
    monkeypatch.setattr(constants, "PIECE", 2)


def case_id(value: Any) -> str:
    return value.name.replace(" ", "-") if isinstance(value, Decoding) else str(value)


@pytest.mark.parametrize("dtype", natively_all(torch.float32))
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_dense_code(case: Decoding, dtype: torch.dtype) -> None:
    problem = Problem(case, dtype)
    out, blocks = problem.run(TRITON, problem.segments(), torch.arange(len(problem.q)))
    assert out.dtype == dtype
    exact = problem.dense(blocks, torch.float64)
    assert_2x(out, problem.dense(blocks, dtype), exact, dtype, case.name, heads=True)
    q, keys = problem.q.double(), problem.keys["compressed"].double()
    band = {"block": case.block, "stride": case.stride, "scale": case.scale}
    lse = torch.zeros(q.shape[:2])
    expected = PYTORCH.ops.select_blocks(
        q,
        keys,
        lse,
        problem.segments(),
        select_block=case.select_block,
        num_selected=case.num_selected,
        num_init_blocks=1,
        num_local_blocks=2,
        **band,
    )
    if dtype == torch.float32:  # Of random scores no two are as close as its rounding.
        assert torch.equal(blocks, expected)


def test_float16() -> None:
    test_against_dense_code(replace(CASES[1], rows=((70, 2),)), torch.float16)


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=case_id)
def test_bits_are_those_of_every_batch_and_chunking(case: Decoding) -> None:
    """A query alone, its document alone, and all of them."""
    problem = Problem(case, torch.float32)
    out, blocks = problem.run(TRITON, problem.segments(), torch.arange(len(problem.q)))
    first = 0
    for b, (_, new) in enumerate(case.rows):
        at = torch.arange(first, first + new)
        alone, alone_blocks = problem.run(TRITON, problem.segments([b]), at)
        assert same_bits(alone, out[at])
        assert torch.equal(alone_blocks, blocks[at])
        for i in range(new):
            single, _ = problem.run(TRITON, problem.segments([b], only=new - i), at[i : i + 1])
            assert same_bits(single, out[at[i : i + 1]])
        first += new


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=case_id)
def test_bits_are_those_of_positions_that_the_device_alone_knows(case: Decoding) -> None:
    """The last token of each row, in grids and buffers for caches that are full."""
    problem = Problem(case, torch.float32)
    last = torch.tensor([new for _, new in case.rows]).cumsum(0) - 1
    expected, expected_blocks = problem.run(TRITON, problem.segments(only=1), last)
    found, blocks = problem.run(TRITON, problem.on_device(), last)
    assert torch.equal(blocks, expected_blocks)
    assert same_bits(found, expected)


@pytest.mark.parametrize("page", [4, 32])
def test_paged_caches_give_the_same_bits(page: int) -> None:
    case = CASES[1]
    problem, every = Problem(case, torch.float32), torch.arange(9)
    expected, expected_blocks = problem.run(TRITON, problem.segments(), every)
    problem.into_pages(page)
    found, blocks = problem.run(TRITON, problem.segments(), every)
    assert same_bits(found, expected)
    assert torch.equal(blocks, expected_blocks)


def test_equal_scores_go_to_the_lower_block() -> None:
    """Queries of zeros: all compressed keys have one probability, in all parts."""
    problem = Problem(Decoding("equal", ((290, 1),), block=4, stride=4), torch.float32)
    problem.q.zero_()
    _, blocks = problem.run(TRITON, problem.segments(), torch.arange(1))
    assert blocks.tolist() == [[[0, 1, 17, 18]] * 2]


def test_no_query() -> None:
    problem = Problem(CASES[0], torch.float32)
    out, blocks = problem.run(TRITON, QuerySegments.from_rows([]), torch.arange(0))
    assert out.shape == (0, 4, 32)
    assert blocks.shape == (0, 2, 4)

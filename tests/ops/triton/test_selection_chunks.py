"""Rows of scores in chunks, and lines that are ranked in parts, are noticed in no choice."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_kernels import QuerySegments
from nsa_kernels.reference import num_compressed
from nsa_kernels.triton.selection import choose as ranking
from nsa_kernels.triton.selection import operator, scores
from tests.ops.backends import DEVICE, DTYPES, TRITON
from tests.ops.choices import assert_highest, choose, make_inputs, one, small
from tests.ops.op_cases import Case, Layout, case_id, fill
from tests.traps.mutation import Rewritten, catches


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, whose ends are not those of tiles, and lines ranked in parts."""
    monkeypatch.setattr(operator, "WORKSPACE_BYTES", 47 * 1024)
    monkeypatch.setattr(ranking, "MOST_COLUMNS", 16)
    monkeypatch.setattr(scores, "SPAN_TILES", 1)


@pytest.mark.usefixtures("small_workspace")
def test_trap_ties_between_parts() -> None:
    """No score but the forced blocks': the lowest win, in whichever parts of the line they are."""
    case = small("ties", num_selected=4)
    q = torch.zeros(70, case.heads, case.key_width)
    k = torch.zeros(num_compressed(70, 4, 2), 1, case.key_width)
    selected = choose(TRITON, case, one(70), q, k, init=0, local=1)
    # Block 0 has one key less in front of it than the others.
    assert selected[69, 0].tolist() == [1, 2, 3, 17]


def captured(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `run` returns, and the scores in its workspace, [N, G, pitch, parts]."""
    chunks = []
    rank = operator.choose_blocks

    def keep(
        work: Tensor,
        selected: Tensor,
        positions: Tensor,
        chunk: Any,
        parts: int,
        select_block: int,
        *rest: Any,
    ) -> None:
        pitch = scores.pitch(chunk.last // select_block + 1)
        shape = chunk.end - chunk.begin, selected.shape[1], pitch, parts
        chunks.append(work[: math.prod(shape)].view(shape).cpu().clone())
        rank(work, selected, positions, chunk, parts, select_block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(operator, "choose_blocks", keep)
        selected = run()
    pitch = max(x.shape[2] for x in chunks)
    return selected, torch.cat([pad(x, (0, 0, 0, pitch - x.shape[2])) for x in chunks])


@pytest.mark.usefixtures("_same_bits_in_any_row")
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_bits_do_not_depend_on_split_chunks_or_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Every score and choice of a row, from one segment and from pieces of a document."""
    case = small("split", heads=8, num_selected=6)
    case = replace(case, documents=(133,), runs=())
    q, k = make_inputs(case, dtype)
    expected, whole = captured(monkeypatch, lambda: choose(TRITON, case, one(133), q, k))
    assert_highest(case, expected, q, k)
    cut = replace(case, runs=((0, 100, 33), (0, 3, 41), (0, 64, 1), (0, 97, 2)))
    layout = Layout(cut)
    rows = cut.local_rows
    keys = fill(k, layout.compressed_index)
    request.getfixturevalue("small_workspace")
    selected, parts = captured(
        monkeypatch, lambda: choose(TRITON, cut, layout.segments, q[rows], keys)
    )
    assert torch.equal(selected, expected[rows])
    block = torch.arange(whole.shape[2])
    visible = (rows - case.block + case.stride).clamp(min=0) // case.stride
    written = -(-visible // (case.select_block // case.stride))[:, None, None]
    # Sums of the keys that begin in block j, and of what those of block j - 1 pass on to it.
    written = torch.stack([block < written, (block > 0) & (block <= written)], dim=-1)
    a, b = (x.masked_fill(~written, 0.0) for x in (parts[:, :, : len(block)], whole[rows]))
    assert written.any()
    assert torch.equal(a, b)


def test_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated at a time, with lines ranked in parts, and parts of what these found."""
    assert operator.WORKSPACE_BYTES == 256 << 20
    bound = 64 * 1024
    monkeypatch.setattr(operator, "WORKSPACE_BYTES", bound)
    monkeypatch.setattr(ranking, "MOST_COLUMNS", 16)
    held = most = 0

    def counted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **options: Any) -> Tensor:
            nonlocal held, most
            made = make(*args, **options)

            def drop(size: int) -> None:
                nonlocal held
                held -= size

            weakref.finalize(made, drop, made.nbytes)
            held += made.nbytes
            most = max(most, held)
            return made

        return run

    case = replace(small("long", heads=4, groups=2, num_selected=7), documents=(300,), runs=())
    q, k = make_inputs(case, torch.float32)
    with monkeypatch.context() as patch:
        # After the log-sum-exp, which `choose` computes by other code.
        segments = one(300)
        patch.setattr(operator, "torch", SimpleNamespace(**vars(torch)))
        patch.setattr(operator.torch, "empty", counted(torch.empty))
        patch.setattr(Tensor, "new_empty", counted(Tensor.new_empty))
        selected = choose(TRITON, case, segments, q, k)
    assert bound // 2 < most - selected.nbytes <= bound
    assert_highest(case, selected, q, k)


def test_a_tile_that_a_chunk_cuts_leaves_other_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its later tokens see a block more than the chunk's rows have scores for."""
    case = Case("cut", (1040,), groups=2, key_width=16, block=4, stride=2, num_selected=6)
    q, k = make_inputs(case, torch.float32)
    # Tiles of 16 tokens begin at position 1000, block 64 at 1024, and chunks have 20 rows.
    segments = QuerySegments.from_rows([(0, 40, 1000, 0, 0, 0)])
    expected = choose(TRITON, case, segments, q[1000:], k)
    monkeypatch.setattr(operator, "WORKSPACE_BYTES", 20 * 2048)
    assert torch.equal(choose(TRITON, case, segments, q[1000:], k), expected)


@catches(
    "int32 offsets",
    "heads are int32 in the scores",
    Rewritten(
        "nsa_kernels.triton:_score_kernel",
        "tl.program_id(1).to(tl.int64)",
        "tl.program_id(1).to(tl.int32)",
    ),
    case="heads",
)
@pytest.mark.skipif(DEVICE == "cuda", reason="memory that is only addresses is the host's")
@pytest.mark.parametrize("far", [(1 << 28, 1 << 24, 1), (16, 1 << 30, 1)], ids=["rows", "heads"])
def test_offsets_past_two_to_the_31st(far: tuple[int, ...]) -> None:
    from tests.ops.triton.guard import far_apart

    case = small("far", heads=4, groups=4)
    q, k = make_inputs(case, torch.float16)
    expected = choose(TRITON, case, one(70), q[:70], k[: num_compressed(70, 4, 2)])
    selected = choose(
        TRITON,
        case,
        one(70),
        far_apart(q[:70], *far),
        far_apart(k[: num_compressed(70, 4, 2)], *far),
    )
    assert torch.equal(selected, expected)

"""What tests of the choice of blocks share: scores by the dense code, and the judge of a choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_kernels import QuerySegments
from nsa_kernels.reference import block_scores, compressed_mask, masked_softmax
from tests.ops.accuracy import plain_dtype
from tests.ops.backends import PYTORCH, BackendOnDevice
from tests.ops.op_cases import Case, random


def choose(
    backend: BackendOnDevice,
    case: Case,
    segments: QuerySegments,
    q: Tensor,
    k: Tensor,
    init: int = 1,
    local: int = 2,
) -> Tensor:
    """int32 [N, G, n], with the log-sum-exp of the PyTorch backend."""
    blocks = {"block": case.block, "stride": case.stride, "scale": case.scale}
    _, lse = PYTORCH.ops.compressed_attention(q, k, k, segments, **blocks)
    selected = backend.ops.select_blocks(
        *(x.to(backend.device) for x in (q, k, lse)),
        segments.to(backend.device),
        select_block=case.select_block,
        num_selected=case.num_selected,
        num_init_blocks=init,
        num_local_blocks=local,
        **blocks,
    )
    return selected.cpu()


def one(length: int) -> QuerySegments:
    return QuerySegments.from_rows([(0, length, 0, 0, 0, 0)])


def small(name: str, **options: int) -> Case:
    blocks = {"block": 4, "stride": 2, "select_block": 4, "heads": 2, "groups": 1}
    return Case(name, (70, 33), ((0, 11, 59), (1, 0, 33)), **{**blocks, **options})


def scores(case: Case, document: int, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, G, B] by the dense code in `dtype`, of the whole stream's q and compressed k."""
    tokens = slice(case.bounds[document], case.bounds[document + 1])
    keys = slice(case.compressed_bounds[document], case.compressed_bounds[document + 1])
    mask = compressed_mask(case.documents[document], case.block, case.stride, q.device)
    probs, _ = masked_softmax(q[tokens].to(dtype), k[keys].to(dtype), mask, case.scale)
    return block_scores(probs, case.options)


def make_inputs(case: Case, dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """q of the stream, compressed k of its documents."""
    count = case.compressed_bounds[-1]
    q = random(sum(case.documents), case.heads, case.key_width, dtype=dtype, gain=gain)
    return q, random(count, case.groups, case.key_width, dtype=dtype)


def exact_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each head reads a channel of its own, in which some keys outshine all before them: the last
    of these has probability 1 to the bit, all others 0, and most blocks tie."""
    group = case.heads // case.groups
    q = torch.zeros(sum(case.documents), case.groups, group, case.key_width, dtype=dtype)
    for r in range(group):
        q[:, :, r, r] = 2048.0
    shape = case.compressed_bounds[-1], case.groups, case.key_width
    shines = torch.rand(shape) < 0.2
    k = torch.where(shines, torch.arange(shape[0])[:, None, None] + 1.0, -1.0).to(dtype)
    assert shape[0] < 256  # exact in bfloat16
    return q.flatten(1, 2), k


def assert_well_formed(
    case: Case, selected: Tensor, positions: Tensor, init: int, local: int
) -> None:
    """Ascending, eligible, no more and no fewer than there are, -1 at the end, the forced there."""
    eligible = positions // case.select_block + 1
    for row, count in zip(selected, eligible.tolist(), strict=True):
        for choice in row.tolist():
            chosen = choice[: min(case.num_selected, count)]
            assert chosen == sorted(set(chosen))
            assert chosen[0] >= 0
            assert chosen[-1] < count
            assert choice[len(chosen) :] == [-1] * (case.num_selected - len(chosen))
            forced = {*range(min(init, count)), *range(max(0, count - local), count)}
            assert forced <= set(chosen)


def assert_highest(
    case: Case, selected: Tensor, q: Tensor, k: Tensor, init: int = 1, local: int = 2
) -> None:
    """Among blocks not forced, in float64: no unchosen one above a chosen one by more than tau,
    4 x the largest error of the plain code's scores in this dtype."""
    assert selected.dtype == torch.int32
    assert selected.shape == (case.run_bounds[-1], case.groups, case.num_selected)
    start = 0
    for document, position, length in case.local_runs:
        own = selected[start : start + length].long()
        start += length
        if not length:
            continue
        t = torch.arange(position, position + length)
        assert_well_formed(case, own, t, init, local)
        exact = scores(case, document, q, k, torch.float64)
        tau = 4 * (scores(case, document, q, k, plain_dtype(q.dtype)).double() - exact).abs().max()
        exact = exact[position : position + length]
        num_blocks = exact.shape[-1]
        last = (t // case.select_block)[:, None, None]
        block = torch.arange(num_blocks)
        free = (block >= init) & (block <= last - local)
        chosen = torch.zeros(length, case.groups, num_blocks + 1, dtype=torch.bool)
        chosen.scatter_(-1, own.where(own >= 0, num_blocks), True)
        chosen = chosen[..., :-1]
        worst_chosen = exact.masked_fill(~(chosen & free), math.inf).amin(dim=-1)
        best_left = exact.masked_fill(chosen | ~free, -math.inf).amax(dim=-1)
        assert (best_left - worst_chosen <= tau).all()


def scores_of(
    positions: Tensor, q: Tensor, k: Tensor, case: Case, dtype: torch.dtype, num_blocks: int
) -> Tensor:
    """[m, G, B] of some queries of one document, by the dense code in `dtype`."""
    last = torch.arange(k.shape[0], device=q.device) * case.stride + case.block - 1
    mask = last <= positions[:, None]
    probs, _ = masked_softmax(q.to(dtype), k.to(dtype), mask, case.scale)
    probs = probs.sum(dim=2)
    per_block, overlap = case.select_block // case.stride, case.block // case.stride
    probs = pad(probs, (overlap - 1, per_block * num_blocks - probs.shape[-1]))
    width = per_block * num_blocks
    shifted = (probs[..., b : b + width] for b in range(overlap))
    return torch.stack(tuple(shifted)).sum(dim=0).unflatten(-1, (-1, per_block)).sum(dim=-1)


def assert_some_are_the_highest(
    case: Case, selected: Tensor, rows: Tensor, q: Tensor, k: Tensor
) -> None:
    """As `assert_highest`, of the queries at `rows` of one document, on the device of all."""
    assert_well_formed(case, selected[rows].cpu().long(), rows.cpu(), 1, 2)
    num_blocks = -(-q.shape[0] // case.select_block)
    exact = scores_of(rows, q[rows], k, case, torch.float64, num_blocks)
    plain = scores_of(rows, q[rows], k, case, q.dtype, num_blocks)
    tau = 4 * (plain.double() - exact).abs().max()
    block, own = torch.arange(num_blocks, device=q.device), (rows // case.select_block)
    free = (block >= 1) & (block <= own[:, None, None] - 2)
    chosen = (selected[rows].long().unsqueeze(-1) == block).any(dim=2)
    worst_chosen = exact.masked_fill(~(chosen & free), math.inf).amin(dim=-1)
    best_left = exact.masked_fill(chosen | ~free, -math.inf).amax(dim=-1)
    assert (best_left - worst_chosen <= tau).all()

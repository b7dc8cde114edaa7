"""The two passes of a branch by themselves: what its function gives, for all queries or for some.

On a GPU with the kernels for its kind; in the interpreter with the plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels import triton as backend
from nsa_kernels.backend import branch_passes, get_backend
from tests.ops.backends import DEVICE, INTERPRETED
from tests.ops.op_cases import same_bits
from tests.ops.triton.guard import fixed_order_dot

ON_GPU = not INTERPRETED
H, G, D, SELECT = (32, 2, 128, 64) if ON_GPU else (2, 1, 16, 16)
BLOCK, STRIDE, WINDOW = (32, 16, 100) if ON_GPU else (4, 2, 7)
TOKENS, CUT = (1000, 450) if ON_GPU else (28, 18)
"""Queries are cut where no tile and no block begins."""
DTYPE = torch.float16


def arguments(branch: str, first: int, end: int) -> tuple[list[Any], dict[str, Any], int, int]:
    """What follows q for queries [first, end) of one document, options, and the keys they see."""
    scale = D**-0.5
    generator = torch.Generator().manual_seed(3)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, G, D, generator=generator).to(DEVICE, DTYPE)

    if branch == "selected":
        blocks = -(-TOKENS // SELECT)
        positions = torch.arange(first, end)
        own = positions // SELECT
        choice = torch.stack([own * 0, torch.where(own > 0, own, -1)], dim=-1)
        choice = choice[:, None].expand(-1, G, -1).int().to(DEVICE)
        seen = min(TOKENS, -(-end // SELECT) * SELECT)
        k, v = draw(TOKENS)[:seen], draw(TOKENS)[:seen]
        rows = (torch.arange(blocks) * SELECT).expand(G, -1).contiguous().to(DEVICE)
        lengths = (TOKENS - rows[0]).clamp(max=SELECT)
        segments = QuerySegments.from_rows([(0, end - first, first, 0, 0, 0)], DEVICE)
        more = [k, v, k[:0], v[:0], choice, rows, lengths, segments]
        return more, {"select_block": SELECT, "scale": scale}, 0, seen
    if branch == "window":
        low, high = max(0, first - WINDOW + 1), end
        base, options = (0, 0, -low), {"window": WINDOW, "scale": scale}
        k, v = draw(TOKENS)[low:high], draw(TOKENS)[low:high]
    else:
        count = (TOKENS - BLOCK) // STRIDE + 1
        low, high = 0, max(0, (end - BLOCK) // STRIDE + 1)
        base, options = (0, 0, 0), {"block": BLOCK, "stride": STRIDE, "scale": scale}
        k, v = draw(count)[low:high], draw(count)[low:high]
    segments = QuerySegments.from_rows([(0, end - first, first, *base)], DEVICE)
    return [k, v, segments], options, low, high


@pytest.fixture(autouse=True)
def _one_order_of_sums() -> Iterator[None]:
    """In the interpreter, whose products follow numpy's."""
    with fixed_order_dot() if INTERPRETED else nullcontext():
        yield


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_passes_are_those_of_the_function(branch: str, gated: bool) -> None:
    passes = branch_passes(backend)[branch]
    generator = torch.Generator().manual_seed(2)
    q, do = (torch.randn(TOKENS, H, D, generator=generator).to(DEVICE, DTYPE) for _ in "ab")
    gate = torch.rand(TOKENS, H, generator=generator).to(DEVICE) if gated else None
    more, options, _, _ = arguments(branch, 0, TOKENS)
    results = passes.forward(q, *more, **options)

    def function(rows: slice, more: list[Any]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Results and all gradients of the queries."""
        given = [q[rows], *(x for x in more if isinstance(x, Tensor) and x.dtype == DTYPE)]
        given = [x.detach().requires_grad_() for x in given]
        gates = [] if gate is None else [gate[rows].detach().requires_grad_()]
        out = getattr(backend, f"{branch}_attention")(
            *given, *more[len(given) - 1 :], **options, **({"gate": gates[0]} if gates else {})
        )
        of = out[2] if gated else out[0]
        return out, list(torch.autograd.grad(of, [*given, *gates], do[rows]))

    for rows in (slice(0, CUT), slice(CUT, TOKENS), slice(CUT, CUT)):
        own, options, _, _ = arguments(branch, rows.start, max(rows.stop, rows.start))
        out, expected = function(rows, own)
        # A query's results do not depend on the others, nor on keys that it does not see.
        assert all(same_bits(x[rows], y) for x, y in zip(results[:2], out[:2], strict=True))
        dq = torch.full_like(q, torch.nan)
        of_rows = tuple(x[rows] for x in results)
        own_gate = None if gate is None else gate[rows]
        found = passes.backward(dq[rows], do[rows], own_gate, of_rows, q[rows], *own, **options)
        ours = [dq[rows], *found[:-1], *([found[-1]] if gated else [])]
        assert [same_bits(x, y) for x, y in zip(ours, expected, strict=True)] == [True] * len(ours)
        outside = torch.ones(TOKENS, dtype=torch.bool)
        outside[rows] = False
        assert bool(dq[outside.to(DEVICE)].isnan().all())


def test_a_backend_without_passes_has_none() -> None:
    assert branch_passes(get_backend("pytorch")) == {}

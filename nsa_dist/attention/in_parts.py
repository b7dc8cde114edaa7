"""A branch over all local queries at once, or with ``exact_gradients`` over one part after another.

Letters: N local queries, H query heads, D width, n selected blocks per query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_dist.attention.call import Call, recomputed
from nsa_dist.comm.exact import PartSource
from nsa_dist.plan.parts import InParts
from nsa_kernels import QuerySegments
from nsa_kernels.autograd import first_order
from nsa_kernels.backend import as_gate

Source = Sequence[Tensor] | PartSource
"""Keys and values of a branch: as they are, or to be read part by part."""


def tensors_of(source: Source) -> Sequence[Tensor]:
    """The keys and values themselves."""
    return source.tensors if isinstance(source, PartSource) else source


def attend_branch(
    call: Call,
    branch: str,
    function: Callable[..., tuple[Tensor, ...]],
    q_NHD: Tensor,
    source: Source,
    gate_NH: Tensor | None,
    blocks_NGn: Tensor | None = None,
    tables: Sequence[Tensor] = (),
    **options: Any,
) -> tuple[Tensor, ...]:
    """``function(q, *source, blocks, *tables, segments, **options)`` of the backend.

    Returns:
        o [N, H, Dv], lse [N, H], and with a gate the summand.
    """

    def run(
        q: Tensor,
        tensors: Sequence[Tensor],
        gate: Tensor | None,
        blocks: Tensor | None,
        segments: QuerySegments,
    ) -> tuple[Tensor, ...]:
        rows = () if blocks is None else (blocks,)
        return recomputed(
            call,
            branch,
            function,
            q,
            *tensors,
            *rows,
            *tables,
            segments,
            **options,
            **as_gate(gate),
        )

    if not isinstance(source, PartSource):
        return run(q_NHD, source, gate_NH, blocks_NGn, call.plan.segments)
    parts = over_parts(call, q_NHD, source, gate_NH, blocks_NGn)
    return joined(call, [run(*of_part) for of_part in parts])


def over_parts(
    call: Call, q_NHD: Tensor, source: PartSource, *by_query: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """(q, the source's tensors, each of ``by_query``, segments) of every part."""
    parts = call.plan.parts
    assert parts is not None
    nothing = (None,) * len(parts)
    queries, *rows = (nothing if x is None else parts.queries.split(x) for x in (q_NHD, *by_query))
    for part, segments in enumerate(parts.segments):
        yield queries[part], source.of_part(part), *(x[part] for x in rows), segments


def joined(call: Call, results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """o, lse and the summand, if there is one, of all queries from those of parts."""
    assert call.plan.parts is not None
    queries = call.plan.parts.queries
    o, lse, *summands = zip(*results, strict=True)
    whole = queries.join(list(o)), queries.join(list(lse))
    return (*whole, JoinSummands.apply(queries, *summands[0])) if summands else whole


class JoinSummands(torch.autograd.Function):
    """The summand (``nsa_kernels.autograd.summand_of``) of all queries, without values as well."""

    @staticmethod
    def forward(ctx: Any, queries: InParts, *summands: Tensor) -> Tensor:
        ctx.queries = queries
        of = summands[0]
        return of.new_zeros(()).expand(sum(queries.sizes), *of.shape[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.queries.split(grad)

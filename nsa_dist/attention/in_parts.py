"""A branch over all local queries: at once, or with ``exact_gradients`` its backward by part.

Forward gives the same bits however queries are taken together, if the backend says so: it runs once
for all of them, as without the option. Backward runs for one part after another, from the rows of
what forward left. A backend that says nothing (``nsa_kernels.backend.branch_passes``) runs forward
by part too, and once more in backward.

Letters: N local queries, H query heads, D width, n selected blocks per query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.attention.call import Call, recomputed
from nsa_dist.comm.exact import PartSource
from nsa_kernels.autograd import first_order, with_summand
from nsa_kernels.backend import as_gate, branch_passes

Source = Sequence[Tensor] | PartSource
"""Keys and values of a branch: as they are, or to be read part by part."""


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
    if isinstance(source, PartSource):
        run = _Branch(call, branch, function, source, tuple(tables), options)
        given = q_NHD, gate_NH, blocks_NGn, source.ticket, *source.tensors
        return recomputed(call, branch, run, *given)
    rows = () if blocks_NGn is None else (blocks_NGn,)
    gate = as_gate(gate_NH)
    segments = call.plan.segments
    return recomputed(
        call, branch, function, q_NHD, *source, *rows, *tables, segments, **options, **gate
    )


def select_by_part(
    call: Call, q_NHD: Tensor, k_CGD: Tensor, lse_NH: Tensor, *_: Any, **options: Any
) -> Tensor:
    """``select_blocks`` of a backend whose bits do not depend on the split, or part by part."""
    if branch_passes(call.backend):
        return call.backend.select_blocks(q_NHD, k_CGD, lse_NH, call.plan.segments, **options)
    parts = call.plan.parts
    assert parts is not None
    reads, (q, lse) = parts.reads["compressed"], map(parts.queries.split, (q_NHD, lse_NH))
    return parts.queries.join(
        [
            call.backend.select_blocks(
                q[part], k_CGD[first:end], lse[part], reads.segments[part], **options
            )
            for part, (first, end) in enumerate(reads.rows)
        ]
    )


@dataclass(frozen=True, eq=False)
class _Branch:
    """A branch with its queries' parts: what does not change from one tensor to the next.

    Attributes:
        function: the backend's, for backends without passes.
        tables, options: more arguments of it.
    """

    call: Call
    branch: str
    function: Callable[..., tuple[Tensor, ...]]
    source: PartSource
    tables: tuple[Tensor, ...]
    options: dict[str, Any]

    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Of q, gate, blocks, ticket, and the source's tensors."""
        results: tuple[Tensor, ...] = _InParts.apply(self, *tensors)
        return results

    def forward(
        self, q: Tensor, blocks: Tensor | None, sources: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """o, lse, and what else backward reads of each query."""
        parts, passes = self.call.plan.parts, branch_passes(self.call.backend).get(self.branch)
        assert parts is not None
        if passes is not None:
            more = () if blocks is None else (blocks,)
            segments = self.call.plan.segments
            return passes.forward(q, *sources, *more, *self.tables, segments, **self.options)
        results = []
        for part, (query, block) in enumerate(zip(*self._split(q, blocks), strict=True)):
            arguments = self._arguments(part, query, block, sources)
            results.append(self.function(*arguments, **self.options))
        return tuple(parts.queries.join(list(of_parts)) for of_parts in zip(*results, strict=True))

    def backward(
        self,
        do: Tensor,
        gate: Tensor | None,
        results: tuple[Tensor, ...],
        q: Tensor,
        blocks: Tensor | None,
        sources: tuple[Tensor, ...],
        gives: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of q and the gate; those of the sources go into their sums.

        Args:
            gives: whether the sources need gradients.
        """
        parts, passes = self.call.plan.parts, branch_passes(self.call.backend).get(self.branch)
        assert parts is not None
        rows = zip(*self._split(q, blocks, do, gate, *results), strict=True)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        of_q, of_gate = dq.split(parts.queries.sizes), []
        for part, (query, block, grad, own_gate, *own) in enumerate(rows):
            arguments = self._arguments(part, query, block, sources)
            if not len(query):
                *grads, dgate = *(x[:0] for x in arguments[1 : 1 + len(sources)]), own_gate
            elif passes is not None:
                *grads, dgate = passes.backward(
                    of_q[part], grad, own_gate, tuple(own), *arguments, **self.options
                )
            else:
                *grads, dgate = self._again(of_q[part], grad, own_gate, arguments, len(sources))
            if own_gate is not None:
                of_gate.append(dgate.to(own_gate.dtype))
            if gives:
                self.source.sums.put(self.source.reader, part, tuple(grads))
        whole = dq if parts.queries.back is None else dq.index_select(0, parts.queries.back)
        return whole, parts.queries.join(of_gate) if gate is not None else None

    def _split(self, *by_query: Tensor | None) -> list[Sequence[Any]]:
        """Each of the tensors by part."""
        parts = self.call.plan.parts
        assert parts is not None
        nothing = (None,) * len(parts)
        return [nothing if x is None else parts.queries.split(x) for x in by_query]

    def _arguments(
        self, part: int, q: Tensor, blocks: Tensor | None, sources: tuple[Tensor, ...]
    ) -> tuple[Any, ...]:
        """Of the backend's function, for the queries of a part."""
        parts, source = self.call.plan.parts, self.source
        assert parts is not None
        read = source.sums.rows_of_part(source.reader, part, sources)
        more = () if blocks is None else (blocks,)
        return q, *read, *more, *self.tables, parts.reads[self.branch].segments[part]

    def _again(
        self,
        dq: Tensor,
        do: Tensor,
        gate: Tensor | None,
        arguments: tuple[Any, ...],
        sources: int,
    ) -> tuple[Any, ...]:
        """What a backend's backward gives, by its function, whose forward runs once more."""
        q, *rest = arguments
        given = [x.detach().requires_grad_() for x in (q, *rest[:sources])]
        gates = [] if gate is None else [gate.detach().requires_grad_()]
        with torch.enable_grad():
            o, _, *summand = self.function(
                *given, *rest[sources:], **self.options, **as_gate(gates[0] if gates else None)
            )
        of_q, *grads = torch.autograd.grad(summand[0] if summand else o, [*given, *gates], do)
        dq.copy_(of_q)
        return *grads, *(() if gates else (None,))


class _InParts(torch.autograd.Function):
    """o, lse, and with a gate the summand, of ``_Branch``."""

    @staticmethod
    def forward(
        ctx: Any,
        of: _Branch,
        q: Tensor,
        gate: Tensor | None,
        blocks: Tensor | None,
        ticket: Tensor,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        results = of.forward(q, blocks, sources)
        ctx.of, ctx.dtype = of, ticket.dtype
        ctx.save_for_backward(q, gate, blocks, *sources, *results)
        ctx.sources = len(sources)
        return with_summand(ctx, results[0], results[1], gate)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, gate, blocks, *rest = ctx.saved_tensors
        sources, results = tuple(rest[: ctx.sources]), tuple(rest[ctx.sources :])
        do = grads[0] if gate is None else grads[-1]
        gives = ctx.needs_input_grad[4]
        dq, dgate = ctx.of.backward(do, gate, results, q, blocks, sources, gives)
        ticket = do.new_empty(0, dtype=ctx.dtype) if gives else None
        return None, dq, dgate, None, ticket, *[None] * ctx.sources

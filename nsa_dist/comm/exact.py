"""Gradients that are added in the order of parts, so that no split changes their bits.

The backward of a reader of keys and values (a branch, the compression, one KV head of the selected
branch) runs once for each part of its queries or blocks. What a part gives is rounded to the
tensors' dtype by the backend, as what a rank gives otherwise. From there on everything is added in
float32 (float64) as one binary tree over all parts of the stream (``nsa_dist.plan.parts``,
``nsa_dist.comm.tree_sums``): a rank adds the parts of its chunks, sends one sum a chunk, and the
owner of a row adds the chunks' sums. Where nobody reads a row, a summand is left out or zero, which
are the same number: a part's has the rows that it reads alone. Several readers of one tensor have a
tree each, and the sums of these are added in a fixed order and rounded once.

Gradients of a part are not passed on by autograd, which would add them in its own order and round
each time. They are put into a ``Sums``, whose nodes hand on an empty tensor, the ticket:

    home        made where the transfer begins in forward; in backward it ends the return of
                gradients and gives the total to the tensors that were sent
    opened      made where the transfer ends in forward; in backward it begins the return
    of_part     gives a part its tensors; in backward it puts their gradients into the sums. A
                branch has one node for all parts instead (``nsa_dist.attention.in_parts``)

Autograd runs them in backward in the opposite order. Messages have the kinds and the places of
those without the option, and one more, ``weight_grad``.

Letters: N local tokens, E rows of a buffer with its halo, F fetched tokens, C compressed tokens, G
KV heads, g those of a transfer, D = Dk + Dv widths, c chunks of a rank, P ranks, S = c P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import accumulation_dtype, begin_all_to_all
from nsa_dist.comm.fetch import Transfer
from nsa_dist.comm.tree_sums import PartSums, Returned, SummandT, tree_sum
from nsa_dist.comm.work import Work
from nsa_dist.plan import BlockOwnership, Halo
from nsa_dist.plan.parts import Parts
from nsa_kernels.autograd import first_order


class Sums:
    """What the three nodes of a transfer share. See the kinds of it below.

    It keeps no ticket: a node would keep itself, and its graph, by what it shares.
    """

    def __init__(self, parts: Parts, channel: Channel) -> None:
        self.parts, self.channel = parts, channel
        self.returning: Work[Tensor] | None = None

    def rows_of_part(
        self, reader: str, part: int, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The rows of the tensors that ``part`` reads."""
        return tensors

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        """Add the gradients of the rows of ``part``."""
        raise NotImplementedError

    def begin(self) -> None:
        """Begin to return the sums."""
        raise NotImplementedError

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for what others return: the gradients of what ``home`` was given."""
        raise NotImplementedError

    def _returned(self) -> Tensor | None:
        work, self.returning = self.returning, None
        return None if work is None else work.finish()

    def _over_chunks(self, summand: Callable[[int, int], SummandT | None]) -> SummandT | None:
        """The tree over the chunks of all ranks; ``summand(rank, which of its chunks)``."""
        owners = self.parts.owners
        places = [owners[:chunk].count(owner) for chunk, owner in enumerate(owners)]
        return tree_sum(lambda s: summand(owners[s], places[s]), 0, len(owners))

    def _over_ranks(
        self,
        local: Sequence[Tensor],
        returned: Tensor | None,
        runs: Sequence[tuple[slice, Tensor]],
        first: int = 0,
    ) -> Tensor:
        """The tree over chunks whose sums are all rows here and some from others.

        Args:
            local: of this rank's chunks, each [rows, ...]; written to.
            returned: [.., chunks, ...] from the others, by rank.
            runs: of each rank, where its rows are in ``returned``, and which they are.
            first: place of the first chunk among those of ``returned``.
        """

        def summand(p: int, place: int) -> Returned | None:
            count = len(local[0])
            if p == self.channel.group.rank:
                return Returned(local[place], None, count)
            run, rows = runs[p]
            if returned is None or not len(rows):
                return None
            return Returned(returned[run, first + place], rows, count)

        total = self._over_chunks(summand)
        assert total is not None
        return total.whole()


def home(sums: Sums, *tensors: Tensor) -> Tensor:
    """The ticket of a transfer of ``tensors``, which get its gradients."""
    ticket: Tensor = _Home.apply(sums, *tensors)
    return ticket


def opened(sums: Sums, ticket: Tensor) -> Tensor:
    """The ticket for readers of a transfer that has arrived."""
    opened: Tensor = _Opened.apply(sums, ticket)
    return opened


@dataclass(frozen=True, eq=False)
class PartSource:
    """Tensors that a reader reads, part by part.

    Attributes:
        sums: where their gradients go.
        ticket: the result of ``opened``.
        tensors: as they arrived, without gradient.
        reader: what reads them.
    """

    sums: Sums
    ticket: Tensor
    tensors: tuple[Tensor, ...]
    reader: str = ""

    def rows_of_part(self, part: int) -> tuple[Tensor, ...]:
        """The rows of the tensors that one part of the reader's queries or blocks reads."""
        return self.sums.rows_of_part(self.reader, part, self.tensors)

    def of_part(self, part: int) -> tuple[Tensor, ...]:
        """The same, whose gradients go into the sums."""
        given: tuple[Tensor, ...] = _OfPart.apply(
            self.sums, self.reader, part, self.ticket, *self.rows_of_part(part)
        )
        return given


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Sums, *tensors: Tensor) -> Tensor:
        ctx.sums = sums
        return tensors[0].new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.finish()


class _Opened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Sums, ticket: Tensor) -> Tensor:
        ctx.sums = sums
        return ticket.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, ticket: Tensor) -> tuple[None, Tensor]:
        ctx.sums.begin()
        return None, ticket


class _OfPart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sums: Sums, reader: str, part: int, ticket: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sums, ctx.reader, ctx.part, ctx.count = sums, reader, part, len(tensors)
        ctx.dtype = ticket.dtype
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.sums.put(ctx.reader, ctx.part, grads)
        return None, None, None, grads[0].new_empty(0, dtype=ctx.dtype), *[None] * ctx.count


READS = {"window": "window", "compressed": "blocks"}
"""Which of ``Parts.reads`` says what a reader of a set reads; the compressed branch its blocks."""


class SetSums(Sums):
    """Of a set of keys and values with its halo.

    Blocks of the selected branch come back to their owner whole, so that it adds them up also for
    the tokens of a block that stand on the next rank, and sends those the total. Windows and
    compression blocks of several ranks may read one token, so its rank gets their sums by chunk.

    Args:
        readers: those of the set by part, in the order in which their sums are added.
        selects: whether the selected branch reads it as well, added last.
        k, v: local, of whose shapes and dtypes the gradients are.
    """

    def __init__(
        self,
        halo: Halo,
        parts: Parts,
        channel: Channel,
        readers: Sequence[str],
        selects: bool,
        k_NGD: Tensor,
        v_NGD: Tensor,
    ) -> None:
        super().__init__(parts, channel)
        self.halo, self.widths = halo, (k_NGD.shape[-1], v_NGD.shape[-1])
        self._dtype, self.like = k_NGD.dtype, k_NGD.new_empty(0)
        self._shape = (halo.num_rows, k_NGD.shape[1], sum(self.widths))
        self._by_reader = {reader: PartSums(parts) for reader in readers}
        self._selects = selects
        self.selected: dict[int, Tensor] = {}
        self._local: list[Tensor] = []

    def rows_of_part(
        self, reader: str, part: int, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        first, end = self.parts.reads[READS[reader]].rows[part]
        return tuple(x[first:end] for x in tensors)

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        first, _ = self.parts.reads[READS[reader]].rows[part]
        self._by_reader[reader].put(part, *grads, first=first)

    def begin(self) -> None:
        self._local = [
            sum_EGD
            for sums in self._by_reader.values()
            for sum_EGD in sums.take(self._shape, self.like)
        ]
        if self._selects:
            heads = [self.selected.pop(head) for head in sorted(self.selected)]
            self._local.append(heads[0] if len(heads) == 1 else torch.cat(heads, dim=1))
        halo = self.halo
        if not halo.is_local:
            self.returning = begin_all_to_all(
                torch.stack([x[halo.recv_rows] for x in self._local], dim=1),
                halo.recv_counts,
                halo.send_counts,
                self.channel,
                "halo_grad",
            )

    def finish(self) -> tuple[Tensor, ...]:
        halo, chunks = self.halo, len(self.parts.chunks)
        returned, local = self._returned(), self._local
        self._local = []
        rows = halo.send_rows if halo.is_identity else halo.own_rows[halo.send_rows]
        runs = _runs(rows, halo.send_counts)
        # The rows of halos stay beside: they are their owners'.
        totals = [
            self._over_ranks(local[first : first + chunks], returned, runs, first)
            for first in range(0, len(self._by_reader) * chunks, chunks)
        ]
        if self._selects:
            total = local[-1]
            for run, rows in runs:
                # One rank at most owns a token's block, and all others add zeros.
                if returned is not None and len(rows):
                    total.index_add_(0, rows, returned[run, len(local) - 1])
            totals.append(total)
        grad = totals[0]
        for total in totals[1:]:
            grad = grad.add_(total)
        if not halo.is_identity:
            grad = grad[halo.own_rows]
        k, v = _rounded(grad, self._dtype).split(self.widths, dim=-1)
        return k, v


class HeadSums(Sums):
    """Of the selected blocks of the heads of a transfer, to the sums of their set."""

    def __init__(self, of_set: SetSums) -> None:
        super().__init__(of_set.parts, of_set.channel)
        self._of_set = of_set
        self._own, self._fetched = PartSums(of_set.parts), PartSums(of_set.parts)
        self._transfer: Transfer | None = None
        self._local: list[Tensor] = []
        self._like, self._heads = of_set.like, 0

    def source(self, ticket: Tensor, transfer: Transfer, *tensors: Tensor) -> PartSource:
        """k, v of own rows [E, g, D] and of fetched ones [F, g, D], to be read by part.

        Args:
            ticket: of ``home``.
        """
        self._transfer, self._heads = transfer, tensors[0].shape[1]
        return PartSource(self, opened(self, ticket), tensors)

    def rows_of_part(
        self, reader: str, part: int, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if self.parts.fetches[part]:  # Fetched rows are counted from the last own one on.
            return tensors
        k_own, v_own, k_fetched, v_fetched = tensors
        _, end = self.parts.reads["selected"].rows[part]
        return k_own[:end], v_own[:end], k_fetched[:0], v_fetched[:0]

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        _, end = self.parts.reads["selected"].rows[part]
        self._own.put(part, *(x[:end] for x in grads[:2]))
        self._fetched.put(part, *grads[2:])

    def begin(self) -> None:
        transfer = self._transfer
        assert transfer is not None
        shape = self._heads, sum(self._of_set.widths)
        self._local = self._own.take((self._of_set.halo.num_rows, *shape), self._like)
        fetched = self._fetched.take((transfer.received, *shape), self._like)
        if self.channel.group.size > 1:
            self.returning = begin_all_to_all(
                torch.stack(fetched, dim=1),
                transfer.recv_counts,
                transfer.send_counts,
                self.channel,
                "fetch_grad",
            )

    def finish(self) -> tuple[Tensor, ...]:
        transfer, returned, local = self._transfer, self._returned(), self._local
        self._local = []
        assert transfer is not None
        # A rank asks for a row once at most.
        runs = _runs(transfer.send_rows, transfer.send_counts)
        self._of_set.selected[transfer.first_head] = self._over_ranks(local, returned, runs)
        return (self._like.new_empty(0),)


def _runs(rows: Tensor, counts: Sequence[int]) -> list[tuple[slice, Tensor]]:
    """Of each rank, where its ``counts`` rows stand, and which they are."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    runs = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [(run, rows[run]) for run in runs]


class GatherSums(Sums):
    """Of gathered rows, a key and a value for each block of a grid."""

    def __init__(
        self, blocks: BlockOwnership, parts: Parts, channel: Channel, k_CGD: Tensor, v_CGD: Tensor
    ) -> None:
        super().__init__(parts, channel)
        self._blocks, self._sums = blocks, PartSums(parts)
        self._widths = (k_CGD.shape[-1], v_CGD.shape[-1])
        self._shape = (blocks.total, k_CGD.shape[1], sum(self._widths))
        self._dtype, self._like = k_CGD.dtype, k_CGD.new_empty(0)
        self._local: list[Tensor] = []

    def rows_of_part(
        self, reader: str, part: int, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        first, end = self.parts.reads["compressed"].rows[part]
        return tuple(x[first:end] for x in tensors)

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        first, _ = self.parts.reads["compressed"].rows[part]
        self._sums.put(part, *grads, first=first)

    def begin(self) -> None:
        blocks, group = self._blocks, self.channel.group
        self._local = self._sums.take(self._shape, self._like)
        if group.size > 1:
            own = blocks.counts[group.rank]
            self.returning = begin_all_to_all(
                torch.stack([x[blocks.by_rank] for x in self._local], dim=1),
                blocks.counts,
                [own] * group.size,
                self.channel,
                "gather_grad",
            )

    def finish(self) -> tuple[Tensor, ...]:
        returned, local = self._returned(), self._local
        self._local = []
        if returned is None:
            total = self._over_chunks(lambda _, c: local[c])
        else:
            by_rank = returned.unflatten(0, (self.channel.group.size, -1))
            total = self._over_chunks(lambda p, c: by_rank[p, :, c])
        assert total is not None
        k, v = _rounded(total, self._dtype).split(self._widths, dim=-1)
        return k, v


class WeightSums(Sums):
    """Of weights that every rank holds and reads block by block.

    Ranks' gradients of weights are added up later, by FSDP, DDP or others, in an order of theirs.
    So each rank returns the total of its share of the weights and zeros for the rest: the sum over
    ranks is the total, in any order.
    """

    def __init__(self, parts: Parts, channel: Channel, weights: Sequence[Tensor]) -> None:
        super().__init__(parts, channel)
        self._sums = PartSums(parts)
        self._shapes = [(x.shape, x.dtype) for x in weights]
        self._count = sum(x.numel() for x in weights)
        self._like = weights[0].new_empty(0)
        self._local: list[Tensor] = []

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        dtype = accumulation_dtype(self._like.dtype)
        self._sums.put(part, torch.cat([x.flatten().to(dtype) for x in grads]))

    def begin(self) -> None:
        size = self.channel.group.size
        self._local = self._sums.take((self._count,), self._like)
        if size > 1:
            padding = -self._count % size
            rows = [torch.nn.functional.pad(x, (0, padding)).view(size, -1) for x in self._local]
            one = [1] * size
            message = torch.stack(rows, dim=1)
            self.returning = begin_all_to_all(message, one, one, self.channel, "weight_grad")

    def finish(self) -> tuple[Tensor, ...]:
        returned, local = self._returned(), self._local
        self._local = []
        if returned is None:
            total = self._over_chunks(lambda _, c: local[c])
            assert total is not None
        else:
            share = self._over_chunks(lambda p, c: returned[p, c])
            assert share is not None
            total = share.new_zeros(self.channel.group.size, len(share))
            total[self.channel.group.rank] = share
            total = total.flatten()[: self._count]
        counts = [shape.numel() for shape, _ in self._shapes]
        return tuple(
            _rounded(x, dtype).view(shape)
            for x, (shape, dtype) in zip(total.split(counts), self._shapes, strict=True)
        )


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``. Zeros are +0: whether a summand was zero or left out does not show."""
    return total.to(dtype).add_(0.0)

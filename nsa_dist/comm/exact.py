"""Gradients that are added in the order of parts, so that no split changes their bits.

A reader of keys and values (a branch, the compression, one KV head of the selected branch) runs
once for each part of its queries or blocks. What a part gives is rounded to the tensors' dtype by
the backend, as what a rank gives otherwise. From there on everything is added in float32 (float64)
as one binary tree over all parts of the stream (``nsa_dist.plan.parts``): a rank adds the parts of
its chunks, sends one sum a chunk, and the owner of a row adds the chunks' sums. Where nobody reads
a row, a summand is left out or zero, which are the same number. Several readers of one tensor have
a tree each, and the sums of these are added in a fixed order and rounded once.

Gradients of a part are not passed on by autograd, which would add them in its own order and round
each time. They are put into a ``Sums``, whose nodes hand on an empty tensor, the ticket:

    home        made where the transfer begins in forward; in backward it ends the return of
                gradients and gives the total to the tensors that were sent
    opened      made where the transfer ends in forward; in backward it begins the return
    of_part     gives a part its tensors; in backward it puts their gradients into the sums

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
from nsa_dist.comm.work import Work
from nsa_dist.plan import BlockOwnership, Halo
from nsa_dist.plan.parts import Parts
from nsa_kernels.autograd import first_order


def tree_sum(summand: Callable[[int], Tensor | None], first: int, end: int) -> Tensor | None:
    """The sum over [first, end), a power of two, of pairs, then of pairs of these.

    Args:
        summand: makes one, which is written to; None for zero.
    """
    if end - first == 1:
        return summand(first)
    middle = (first + end) // 2
    left, right = tree_sum(summand, first, middle), tree_sum(summand, middle, end)
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


class PartSums:
    """Adds what a rank's parts give, in any order of arrival, to one sum for each of its chunks."""

    def __init__(self, parts: Parts) -> None:
        self._levels = parts.per_chunk.bit_length() - 1
        self._chunks = len(parts.chunks)
        self._waiting: dict[tuple[int, int], Tensor] = {}

    def put(self, part: int, x: Tensor) -> None:
        """Add x, which is written to, as the gradient of the rank's part number ``part``."""
        level = 0
        while level < self._levels and (level, part ^ 1) in self._waiting:
            x = x.add_(self._waiting.pop((level, part ^ 1)))
            level, part = level + 1, part // 2
        assert (level, part) not in self._waiting, (level, part)
        self._waiting[level, part] = x

    def take(self, shape: Sequence[int], like: Tensor) -> list[Tensor]:
        """The sums, zeros of ``shape`` if nothing was put. It is empty afterwards."""
        dtype = accumulation_dtype(like.dtype)
        if not self._waiting:
            return [like.new_zeros(shape, dtype=dtype) for _ in range(self._chunks)]
        return [self._waiting.pop((self._levels, chunk)) for chunk in range(self._chunks)]


def _wide(*grads: Tensor) -> Tensor:
    """Keys' and values' gradients beside each other, a new tensor in the accumulation dtype."""
    dtype = accumulation_dtype(grads[0].dtype)
    return torch.cat([x.to(dtype) for x in grads], dim=-1)


class Sums:
    """What the three nodes of a transfer share. See the kinds of it below.

    It keeps no ticket: a node would keep itself, and its graph, by what it shares.
    """

    def __init__(self, parts: Parts, channel: Channel) -> None:
        self.parts, self.channel = parts, channel
        self.returning: Work[Tensor] | None = None

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        """Add the gradients of the tensors of ``part``."""
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

    def _over_chunks(self, summand: Callable[[int, int], Tensor | None]) -> Tensor | None:
        """The tree over the chunks of all ranks; ``summand(rank, which of its chunks)``."""
        owners = self.parts.owners
        places = [owners[:chunk].count(owner) for chunk, owner in enumerate(owners)]
        return tree_sum(lambda s: summand(owners[s], places[s]), 0, len(owners))


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

    def of_part(self, part: int) -> tuple[Tensor, ...]:
        """The tensors for one part of the reader's queries or blocks."""
        given: tuple[Tensor, ...] = _OfPart.apply(
            self.sums, self.reader, part, self.ticket, *self.tensors
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

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        self._by_reader[reader].put(part, _wide(*grads))

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
        halo, rank, chunks = self.halo, self.channel.group.rank, len(self.parts.chunks)
        returned, local = self._returned(), self._local
        self._local = []
        if not halo.is_identity:
            local = [x[halo.own_rows] for x in local]
        ends = torch.tensor(halo.send_counts).cumsum(0).tolist()

        def from_rank(p: int, place: int) -> Tensor | None:
            run = slice(ends[p] - halo.send_counts[p], ends[p])
            if returned is None or not halo.send_counts[p]:
                return None
            return torch.zeros_like(local[0]).index_copy_(
                0, halo.send_rows[run], returned[run, place]
            )

        def of_reader(first: int) -> Tensor:
            total = self._over_chunks(
                lambda p, c: local[first + c] if p == rank else from_rank(p, first + c)
            )
            assert total is not None
            return total

        totals = [of_reader(number * chunks) for number in range(len(self._by_reader))]
        if self._selects:
            total = local[-1]
            for p in range(self.channel.group.size):
                of_rank = from_rank(p, len(local) - 1)
                # One rank at most owns a token's block, and all others add zeros.
                total = total if of_rank is None else total.add_(of_rank)
            totals.append(total)
        grad = totals[0]
        for total in totals[1:]:
            grad = grad.add_(total)
        k, v = _rounded(grad, self._dtype).split(self.widths, dim=-1)
        return k, v


class HeadSums(Sums):
    """Of the selected blocks of the heads of a transfer, to the sums of their set."""

    def __init__(self, of_set: SetSums) -> None:
        super().__init__(of_set.parts, of_set.channel)
        self._of_set, self._sums = of_set, PartSums(of_set.parts)
        self._transfer: Transfer | None = None
        self._local: list[Tensor] = []
        self._like, self._shape = of_set.like, (0, 0, 0)

    def source(self, ticket: Tensor, transfer: Transfer, *tensors: Tensor) -> PartSource:
        """k, v of own rows [E, g, D] and of fetched ones [F, g, D], to be read by part.

        Args:
            ticket: of ``home``.
        """
        self._transfer = transfer
        k_own, _, k_fetched, _ = tensors
        rows = k_own.shape[0] + k_fetched.shape[0]
        self._shape = (rows, k_own.shape[1], sum(self._of_set.widths))
        return PartSource(self, opened(self, ticket), tensors)

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        k_own, v_own, k_fetched, v_fetched = grads
        own, fetched = _wide(k_own, v_own), _wide(k_fetched, v_fetched)
        self._sums.put(part, torch.cat((own, fetched)) if len(fetched) else own)

    def begin(self) -> None:
        transfer, num_own = self._transfer, self._of_set.halo.num_rows
        assert transfer is not None
        sums = self._sums.take(self._shape, self._like)
        self._local = [x[:num_own] for x in sums]
        if self.channel.group.size > 1:
            self.returning = begin_all_to_all(
                torch.stack([x[num_own:] for x in sums], dim=1),
                transfer.recv_counts,
                transfer.send_counts,
                self.channel,
                "fetch_grad",
            )

    def finish(self) -> tuple[Tensor, ...]:
        transfer, returned, local = self._transfer, self._returned(), self._local
        self._local = []
        assert transfer is not None
        ends = torch.tensor(transfer.send_counts).cumsum(0).tolist()

        def summand(p: int, place: int) -> Tensor | None:
            if p == self.channel.group.rank:
                return local[place]
            count = transfer.send_counts[p]
            if returned is None or not count:
                return None
            run = slice(ends[p] - count, ends[p])
            # A rank asks for a row once at most.
            return torch.zeros_like(local[0]).index_copy_(
                0, transfer.send_rows[run], returned[run, place]
            )

        total = self._over_chunks(summand)
        assert total is not None
        self._of_set.selected[transfer.first_head] = total
        return (self._like.new_empty(0),)


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

    def put(self, reader: str, part: int, grads: tuple[Tensor, ...]) -> None:
        self._sums.put(part, _wide(*grads))

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
        self._sums.put(part, _wide(*(x.flatten() for x in grads)))

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
    return (total + 0.0).to(dtype)

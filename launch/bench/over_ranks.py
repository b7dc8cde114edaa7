"""Checks of an attention over ranks before it is timed, without a whole tensor on any GPU.

Rows of all ranks are sampled. Each rank runs the attention on its share, with gradients of its
sampled rows alone. What they should be is computed in float64 on every rank alike, one KV head
after another, from that head's keys and values, which are gathered for it. Each rank compares its
share of every gradient, and what differs is added up over ranks: the error is that of the whole
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor

from launch.bench.judges import ROUNDINGS, Verdict, choice_verdict, sampled_rows
from launch.bench.stream import Stream
from launch.bench.work import Flops
from nsa_dist import BRANCHES, CommunicationCounter, Sharding
from nsa_kernels import get_backend
from nsa_kernels.reference import masked_softmax, weighted_values

Attend = Callable[..., Tensor]
"""A rank's share of the inputs -> its share [L, H, Dv] of the output."""
OfHead = Callable[..., Tensor]
"""(KV head, sampled rows [m], float64 inputs of the head) -> [m, R, Dv], the output of these rows.

Of the first ``by_row`` inputs it gets the sampled rows, of those by token all T, others whole."""
DENSE_ELEMENTS = 1 << 27
"""Probabilities of dense attention that are computed at once in float64: 1 GiB."""


@dataclass(frozen=True)
class Candidate:
    """An attention over ranks that is checked and timed.

    Args:
        name: nsa, nsa_exact or dense_ring.
        attend: what is timed, on ``local``.
        local: this rank's inputs: queries (and gates), keys and values, [L, heads, ...], and
            weights, which are whole.
        sharding: of the inputs by token.
        by_row, by_token: how many inputs belong to queries, and how many to tokens.
        of_head: the reference.
        operators: how many round one after another.
        counter: of the bytes that ``attend`` moves.
        flops: useful operations, on all ranks.
        choose: the blocks [L, G, n] that ``attend`` chooses on these inputs; None without blocks.
        stream: what blocks are chosen from.
    """

    name: str
    attend: Attend
    local: list[Tensor]
    sharding: Sharding
    by_row: int
    by_token: int
    of_head: Callable[[Tensor | None], OfHead]
    operators: int
    counter: CommunicationCounter
    flops: Flops
    stream: Stream
    choose: Callable[..., Tensor] | None = None

    def received_mib(self) -> tuple[float, float]:
        """What this rank receives, forward and backward."""
        self.counter.reset()
        out = self.attend(*self.local)
        forward = sum(self.counter.received.values())
        out.sum().backward(inputs=self.local)
        both = sum(self.counter.received.values())
        for x in self.local:
            x.grad = None
        return forward / 2**20, (both - forward) / 2**20

    def verdict(self) -> Verdict:
        """The same on all ranks. A collective."""
        out = self.attend(*self.local)
        rows = sampled_rows(self.stream.length).to(out.device)
        mine, here = self._own(rows)
        seeded = torch.Generator().manual_seed(self.stream.length)
        weight = torch.randn(len(rows), *out.shape[1:], generator=seeded).to(out)
        grad = torch.zeros_like(out)
        grad[here] = weight[mine]
        grads = list(torch.autograd.grad(out, self.local, grad))
        found = out.detach()[here]
        del out, grad
        wrong = False
        for i in range(self.by_row):
            of_rows = grads[i][here]
            wrong |= bool(grads[i].index_fill_(0, here, 0).any())
            grads[i] = of_rows
        sums = _Sums(len(self.local) + 1, rows.device)
        chosen = None
        if self.choose is not None:
            with torch.no_grad():
                chosen = self._rows_of_all(self.choose(*self.local), rows, mine, here)
            wrong |= not self._chose_right(rows, mine, here, chosen)
        self._compare(sums, rows, mine, weight, [found, *grads], self.of_head(chosen), here)
        if wrong:
            sums.refuse()
        limit = self.operators * ROUNDINGS[found.dtype] * torch.finfo(found.dtype).eps
        return Verdict(sums.error(self.sharding), limit)

    def _own(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows this rank has, and where."""
        length = self.stream.length
        tokens = self.sharding.shard(torch.arange(length)[None])[0].to(rows.device)
        place = torch.full((length,), -1, device=rows.device)
        place[tokens] = torch.arange(len(tokens), device=rows.device)
        mine = (place[rows] >= 0).nonzero().squeeze(1)
        return mine, place[rows[mine]]

    def _rows_of_all(self, x: Tensor, rows: Tensor, mine: Tensor, here: Tensor) -> Tensor:
        """x [L, ...] of every rank at the sampled rows: [m, ...]."""
        own = x.detach()[here]  # Before it is widened: x may be most of a GPU's memory.
        own = own.double() if x.is_floating_point() else own.long()
        of_all = own.new_zeros(len(rows), *x.shape[1:])
        of_all[mine] = own
        dist.all_reduce(of_all, group=self.sharding.context.process_group)
        return of_all.to(x.dtype)

    def _of_head(self, x: Tensor, head: int) -> Tensor:
        """x [.., heads, ...], its columns of one KV head."""
        of_head = x.shape[1] // self.stream.config.num_kv_heads
        return x[:, head * of_head : (head + 1) * of_head]

    def _whole(self, x: Tensor, head: int) -> Tensor:
        """x [L, G, D] of every rank: [T, 1, D] of one head, in the order of the stream."""
        return self.sharding.unshard(self._of_head(x.detach(), head).contiguous()[None])[0]

    def _chose_right(self, rows: Tensor, mine: Tensor, here: Tensor, chosen: Tensor) -> bool:
        """Whether the blocks are those with the highest scores: `judges.compare_choice`."""
        stream, right = self.stream, True
        q = self._rows_of_all(self.local[0], rows, mine, here)
        for head in range(stream.config.num_kv_heads):
            with torch.no_grad():
                k = stream.compress(self._whole(self.local[self.by_row], head))
                of_head = self._of_head(q, head), chosen[:, head : head + 1], k
                right &= choice_verdict(stream, rows, *of_head).right
        return right

    def _compare(
        self,
        sums: _Sums,
        rows: Tensor,
        mine: Tensor,
        weight: Tensor,
        found: Sequence[Tensor],
        of_head: OfHead,
        here: Tensor,
    ) -> None:
        """Add up what differs from the reference.

        Args:
            found: the output at own rows; gradients of the inputs, of ``by_row`` at own rows.
        """
        weights = [x.detach().double().requires_grad_() for x in self.local[self.by_token :]]
        of_weights = [torch.zeros_like(x) for x in weights]
        of_rows = [self._rows_of_all(x, rows, mine, here) for x in self.local[: self.by_row]]
        for head in range(self.stream.config.num_kv_heads):
            given = [self._of_head(x, head).double().requires_grad_() for x in of_rows]
            given += [
                self._whole(x, head).double().requires_grad_()
                for x in self.local[self.by_row : self.by_token]
            ]
            exact = of_head(head, rows, *given, *weights)
            grad = self._of_head(weight, head).double()
            exact_grads = list(torch.autograd.grad(exact, [*given, *weights], grad))
            del given
            sums.add(0, self._of_head(found[0], head), exact.detach()[mine])
            for i in range(self.by_token):
                ours, theirs = self._of_head(found[1 + i], head), exact_grads.pop(0)
                if i < self.by_row:
                    sums.add(1 + i, ours, theirs[mine])
                else:
                    sums.add(1 + i, ours, self.sharding.shard(theirs[None])[0])
            for total, x in zip(of_weights, exact_grads, strict=True):
                total += x
        context = self.sharding.context
        for i, exact_total in enumerate(of_weights):
            total = found[1 + self.by_token + i].double()
            dist.all_reduce(total, group=context.process_group)
            if context.rank == 0:  # It is the same on all.
                sums.add(1 + self.by_token + i, total, exact_total)


class _Sums:
    """Squares of differences and of expected values, by tensor, on this rank."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._squares = torch.zeros(count, 2, dtype=torch.float64, device=device)

    def add(self, number: int, found: Tensor, expected: Tensor) -> None:
        """Compare one more piece of tensor ``number`` in float64, some rows at a time."""
        for a, b in zip(found.split(1 << 16), expected.split(1 << 16), strict=True):
            self._squares[number, 0] += (a.double() - b).square().sum()
            self._squares[number, 1] += b.square().sum()

    def refuse(self) -> None:
        """Nothing is right, whatever was compared."""
        self._squares[:, 0] = math.inf

    def error(self, sharding: Sharding) -> float:
        """The largest relative error of the whole tensors, infinite for NaN. A collective."""
        total = self._squares.clone()
        dist.all_reduce(total, group=sharding.context.process_group)
        norms = total.sqrt()
        error = float((norms[:, 0] / norms[:, 1].clamp(min=1e-30)).max())
        return math.inf if math.isnan(error) else error


def sparse_of_head(stream: Stream, chosen: Tensor | None) -> OfHead:
    """Native Sparse Attention at sampled rows, with the blocks [m, G, n] that they chose."""
    assert chosen is not None
    config, exact = stream.config, get_backend("pytorch")
    names = [name for name, _ in stream.compressors[0].named_parameters()]
    sets = len(BRANCHES) if config.independent_kv else 1

    def of_head(head: int, rows: Tensor, q: Tensor, gates: Tensor, *rest: Tensor) -> Tensor:
        at, times = stream.segments_of(rows), len(BRANCHES) // sets
        keys = dict(zip(BRANCHES, [*rest[:sets]] * times, strict=True))
        values = dict(zip(BRANCHES, [*rest[sets : 2 * sets]] * times, strict=True))
        weights, half = rest[2 * sets :], len(names)
        k_cmp, v_cmp = (
            exact.compress(
                *(x, stream.block_rows, config.compress_block, config.compress),
                dict(zip(names, of_x, strict=True)),
            )
            for x, of_x in (
                (keys["compressed"], weights[:half]),
                (values["compressed"], weights[half:]),
            )
        )
        block_rows, block_lengths = stream.pool
        k, v = keys["selected"], values["selected"]
        outputs = [
            exact.compressed_attention(q, k_cmp, v_cmp, at, **stream.band)[0],
            exact.selected_attention(
                *(q, k, v, k[:0], v[:0], chosen[:, head : head + 1]),
                *(block_rows[:1], block_lengths, at),
                select_block=config.select_block,
                scale=config.softmax_scale,
            )[0],
            stream.slide(exact, q, keys["window"], values["window"], at),
        ]
        return exact.combine(outputs, gates)

    return of_head


def dense_of_head(stream: Stream, _: Tensor | None) -> OfHead:
    """Dense causal attention of each document at sampled rows."""
    scale = stream.config.softmax_scale

    def of_head(_: int, rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def some(rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start = rows // stream.size * stream.size
            keys = torch.arange(len(k), device=rows.device)
            mask = (keys >= start[:, None]) & (keys <= rows[:, None])
            return weighted_values(masked_softmax(q, k, mask, scale)[0], v)

        at_once = max(1, DENSE_ELEMENTS // (q.shape[1] * len(k)))
        # What a few rows need is computed again for their gradients.
        return torch.cat(
            [
                torch.utils.checkpoint.checkpoint(some, at, x, k, v, use_reentrant=False)
                for at, x in zip(rows.split(at_once), q.split(at_once), strict=True)
            ]
        )

    return of_head


class Shares:
    """This rank's shares of what a stream draws. A whole tensor is there while it is drawn."""

    def __init__(self, stream: Stream, sharding: Sharding) -> None:
        self._stream, self._sharding = stream, sharding
        self._kept: dict[str, Tensor] = {}

    def of(self, whole: Tensor) -> Tensor:
        """A leaf with gradient."""
        return local_inputs([whole], self._sharding, 1)[0]

    def kept(self, name: str) -> Tensor:
        """That of the stream's q, k, v or gates, which several attentions share."""
        if name not in self._kept:
            self._kept[name] = self.of(getattr(self._stream, name))
            delattr(self._stream, name)
        return self._kept[name].detach().requires_grad_()

    def of_nsa(self) -> list[Tensor]:
        """Queries, gates, keys and values by branch (or shared), weights of the compressors."""
        stream, config = self._stream, self._stream.config
        sets = len(BRANCHES) if config.independent_kv else 1
        shape = (stream.length, config.num_kv_heads, config.value_dim)
        inputs = [self.kept("q"), self.kept("gates")]
        inputs += [self.of(stream.draw_keys()) for _ in range(sets)]
        inputs += [self.of(stream.draw(*shape)) for _ in range(sets)]
        return inputs + [p for of_kv in stream.compressors for p in of_kv.parameters()]


def local_inputs(inputs: Sequence[Tensor], sharding: Sharding, by_token: int) -> list[Tensor]:
    """This rank's shards of the first ``by_token`` inputs, as leaves, and the others."""
    shards = [sharding.shard(x.detach()[None])[0].requires_grad_() for x in inputs[:by_token]]
    return [*shards, *inputs[by_token:]]

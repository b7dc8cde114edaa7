"""One step over a cache: which rows its new tokens read, and which blocks they complete.

Tables are made once a forward, on the host, from lengths alone; all layers share them. Those of a
step whose lengths the device alone knows are in ``static``.

Letters: B rows of a batch, N new tokens without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.attention.call import Call
from nsa_dist.attention.flow import attend_branches
from nsa_dist.attention.selectors import CompressedSelector
from nsa_dist.comm import CommunicationCounter, Work
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.group import ContextGroup
from nsa_dist.config import NSAConfig
from nsa_dist.decoding.cache import LayerCache
from nsa_dist.nn.compressor import apply_compressor
from nsa_dist.plan import BlockOwnership, Halo, Plan
from nsa_dist.plan.grid import num_blocks
from nsa_kernels import Backend, QuerySegments
from nsa_kernels.backend import attend_few

FEW_TOKENS = 16
"""New tokens of a row, at most, that kernels for few queries are used for."""


@dataclass(frozen=True, eq=False)
class Step:
    """Positions of the new tokens and of the blocks of a batch with a cache.

    Rows of keys are numbered b * capacity + column, compressed tokens b * block_capacity + block.

    Attributes:
        past: cached tokens of each row, with padding.
        starts: column of the first token of each row.
        capacity, block_capacity: tokens and compressed tokens of a row that there is room for.
        most_new: new tokens of the row that has most, without padding.
        new_slots: int64 [new blocks], where the compressed tokens of blocks that become complete
            are stored.
        plan: segments of the N queries, and the blocks: ``compressed`` has those that become
            complete, ``selected`` all.
        column: int64 [1], the column of the new tokens if only the device is to know it.
    """

    past: int
    starts: tuple[int, ...]
    capacity: int
    block_capacity: int
    most_new: int
    new_slots: Tensor
    plan: Plan
    column: Tensor | None = None


def plan_step(
    config: NSAConfig,
    starts: tuple[int, ...],
    past: int,
    new: int,
    capacity: int,
    device: torch.device,
) -> Step:
    """The tables of ``new`` tokens a row behind ``past`` cached ones.

    Columns before a row's start are no queries; columns behind its tokens, if it has padding there,
    are treated as tokens, which causality hides from earlier ones.

    Args:
        capacity: tokens of a row that the caches have room for, at least past + new.
    """
    length, batch, block_capacity = past + new, len(starts), num_blocks(capacity, config)
    stride, select = config.compress_stride, config.select_block
    longest = length - min(starts, default=length)
    most = -(-longest // select)  # selection blocks of a row
    segments, new_rows, new_slots = [], [], []
    queries = 0
    for b, start in enumerate(starts):
        first, base = max(start, past), b * capacity + start
        made = range(num_blocks(past - start, config), num_blocks(length - start, config))
        new_rows += [base + i * stride for i in made]
        new_slots += [b * block_capacity + i for i in made]
        if first < length:
            count = length - first
            segments.append((queries, count, first - start, b * block_capacity, b * most, base))
            queries += count

    rows, lengths = selection_blocks(starts, length, most, capacity, select)
    on_host = QuerySegments.from_rows(segments)
    table, rows, lengths, made_rows, slots = to_device(
        (
            on_host.host,
            rows,
            lengths,
            torch.tensor(new_rows, dtype=torch.int64),
            torch.tensor(new_slots, dtype=torch.int64),
        ),
        device,
    )
    of_queries = QuerySegments(on_host.host, table, queries)
    plan = plan_of(config, of_queries, longest, batch * capacity, made_rows, rows, lengths)
    most_new = max((count for _, count, *_ in segments), default=0)
    return Step(past, starts, capacity, block_capacity, most_new, slots, plan)


def selection_blocks(
    starts: tuple[int, ...], length: int, most: int, capacity: int, select: int
) -> tuple[Tensor, Tensor]:
    """Where ``most`` blocks of each row's document start, -1 behind its end, and their tokens.

    Returns:
        Both int64 [B * most], on the CPU.
    """
    start_B1 = torch.tensor(starts, dtype=torch.int64)[:, None]
    offset = torch.arange(most) * select
    lengths = (length - start_B1 - offset).clamp(0, select)
    rows = torch.arange(len(starts))[:, None] * capacity + start_B1 + offset
    return rows.where(lengths > 0, -1).flatten(), lengths.flatten()


def plan_of(
    config: NSAConfig,
    segments: QuerySegments,
    longest: int,
    num_rows: int,
    made_rows: Tensor,
    rows: Tensor,
    lengths: Tensor,
) -> Plan:
    """The plan of a step, which one rank makes over ``num_rows`` rows of its cache.

    Args:
        longest: tokens of the longest document.
        made_rows: where the compression blocks start that become complete.
        rows, lengths: of all selection blocks.
    """
    none = rows[:0]
    # The rows of the cache are the extended buffer already.
    halo = Halo(num_rows, none, none, (0,), none, (0,), is_local=True, is_identity=True)
    sets = dict.fromkeys(("compressed", "selected", "window"), halo)
    return Plan(
        config=config,
        rank=0,
        size=1,
        batch=1,
        local_length=segments.num_queries,
        longest=longest,
        segments=segments,
        positions=segments.positions,
        documents=none,
        halos={name: x for name, x in sets.items() if name in config.key_branches},
        grids={
            "compressed": _own(made_rows, none),
            "selected": _own(rows, lengths),
        },
    )


def to_device(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tables of int64 in one copy, for which the host does not wait."""
    if device.type == "cpu":
        return list(tables)
    flat = torch.cat([x.flatten() for x in tables]).to(device, non_blocking=True)
    parts = flat.split([x.numel() for x in tables])
    return [part.view(x.shape) for part, x in zip(parts, tables, strict=True)]


def _own(rows: Tensor, lengths: Tensor) -> BlockOwnership:
    """Blocks of one rank, of which one reads rows and lengths only."""
    none = rows[:0]
    return BlockOwnership((len(rows),), none, none, none, lengths, none, none, rows, none)


@dataclass(frozen=True, eq=False)
class CachedCompression(CompressedSelector):
    """NSA's own selector, which compresses the blocks that become complete and keeps the others."""

    cache: LayerCache | None = None
    step: Step | None = None

    def begin(
        self, call: Call, extended: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Work[tuple[Tensor, Tensor]]:
        """All compressed tokens: K [B * block_capacity, G, Dk], V with Dv (or 0) likewise."""
        assert self.cache is not None and self.step is not None and self.k_compressor is not None
        block, rows = call.config.compress_block, call.plan.grids["compressed"].own_rows
        keys, values = extended["compressed"]
        if len(rows):
            k = apply_compressor(self.k_compressor, keys, rows, block, call.backend)
            v = k[..., :0]
            if self.v_compressor is not None:
                v = apply_compressor(self.v_compressor, values, rows, block, call.backend)
        else:
            k, v = keys[:0], (keys[:0, :, :0] if self.v_compressor is None else values[:0])
        return Work.done(self.cache.store_compressed(k, v, self.step))


def attend_cached(
    config: NSAConfig,
    backend: Backend,
    context: ContextGroup,
    counter: CommunicationCounter,
    step: Step,
    q_NHD: Tensor,
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    gates_NHb: Tensor,
    selector: CachedCompression,
    few_kernels: bool = True,
) -> Tensor:
    """The attention [N, H, Dv] of new tokens over the rows of a cache that holds them.

    A backend that has kernels for few queries computes up to FEW_TOKENS of a row with these, where
    no gradients are needed; else the steps, and the bits, are those of training.

    Args:
        context: a group of one rank.
        keys, values: rows of the cache by branch, from ``LayerCache.append``.
        selector: a ``CachedCompression`` of that cache.
        few_kernels: whether kernels for few queries may be used.
    """
    assert context.size == 1, context.size
    call = Call(config, backend, step.plan, Channel(context, counter, step.plan))
    few = attend_few(backend)
    takes_few = (
        few is not None
        and few_kernels
        and step.most_new <= FEW_TOKENS
        and {"selected", "window"} <= set(config.branches)
        and not torch.is_grad_enabled()
    )
    assert takes_few or step.column is None, "the operators read positions on the host"
    if few is not None and takes_few:
        extended = {name: (k, values.get(name, k)) for name, k in keys.items()}
        k_CGD, v_CGD = selector.begin(call, extended).finish()
        out_NHD, _ = few(
            q_NHD,
            {**keys, "compressed": k_CGD},
            {**values, "compressed": v_CGD},
            gates_NHb,
            step.plan.segments,
            step.plan.grids["selected"].own_rows,
            branches=config.branches,
            block=config.compress_block,
            stride=config.compress_stride,
            select_block=config.select_block,
            num_selected=config.num_selected,
            num_init_blocks=config.num_init_blocks,
            num_local_blocks=config.num_local_blocks,
            window=config.window,
            scale=config.softmax_scale,
        )
        return out_NHD
    return attend_branches(call, q_NHD, keys, values, gates_NHb, selector).out_NHD

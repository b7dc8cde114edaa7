"""The tables of a plan.

Letters: N local tokens, P ranks, C compressed tokens of the whole stream, B selection blocks of
the whole stream, E rows of a halo-extended buffer. A *stream coordinate* counts the tokens of the
whole batch, row after row. The rank that holds the first token of a block owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.plan.parts import InParts, Parts, Reads
from nsa_dist.plan.statement import Statement
from nsa_kernels import QuerySegments


@dataclass(frozen=True, eq=False)
class Halo:
    """One exchange of the tokens around local runs, and the buffer that it fills.

    Attributes:
        num_rows: E.
        own_rows: int64 [N], row of each local token in the extended buffer.
        send_rows: int64 [sum(send_counts)], local tokens to send, by receiving rank.
        send_counts: tokens for each rank.
        recv_rows: int64 [sum(recv_counts)], buffer rows of received tokens, by sending rank.
        recv_counts: tokens from each rank.
        is_local: whether no rank needs tokens of another.
        is_identity: whether also the extended buffer equals the local tensor.
    """

    num_rows: int
    own_rows: Tensor
    send_rows: Tensor
    send_counts: tuple[int, ...]
    recv_rows: Tensor
    recv_counts: tuple[int, ...]
    is_local: bool
    is_identity: bool


@dataclass(frozen=True, eq=False)
class BlockOwnership:
    """All blocks of one ``Grid`` over the whole stream, and their owners.

    Blocks are numbered through the stream, document after document.

    Attributes:
        counts: number of blocks of each rank.
        owner: int64 [blocks].
        by_rank: int64 [blocks], block ids ordered by owner, then id.
        gathered_rows: int64 [blocks], row of each block in a gather of runs padded to max(counts).
        lengths: int64 [blocks], tokens of each; a document's last selection block may be short.
        own_ids: int64 [counts[rank]].
        own_index: int64 [counts[rank]], index of each own block within its document.
        own_rows: int64 [counts[rank]], start row of each own block in the extended buffer.
        bases: int64 [N], id of block 0 of each local token's document.
    """

    counts: tuple[int, ...]
    owner: Tensor
    by_rank: Tensor
    gathered_rows: Tensor
    lengths: Tensor
    own_ids: Tensor
    own_index: Tensor
    own_rows: Tensor
    bases: Tensor

    @property
    def total(self) -> int:
        """Number of blocks of the whole stream."""
        return sum(self.counts)


@dataclass(frozen=True, eq=False)
class VisibleBlocks:
    """The selection blocks of other ranks that each rank's queries may choose.

    Attributes:
        by_reader: bool [P, blocks], by reading rank; columns ordered by owner, then id.
        send_tokens, recv_tokens: tokens of those that each rank reads of this one, and this one of
            each rank.
        send_blocks: blocks that each rank reads of this one.
    """

    by_reader: Tensor
    send_tokens: tuple[int, ...]
    recv_tokens: tuple[int, ...]
    send_blocks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that one rank's forward and backward need to know about the split.

    Attributes:
        config, rank, size: what the plan was made for.
        batch, local_length: rows, and tokens per row on this rank; N is their product.
        longest: tokens of the longest document.
        segments: runs of local queries at consecutive positions (see ``nsa_kernels``).
        positions: int64 [N], position of each local token in its document.
        documents: int64 [N], index of its document.
        halos: by set of keys and values; a single object for all sets if K, V is shared.
        grids: blocks by grid name: ``selected`` if that branch is used, and the selector's grids
            (NSA: ``compressed``).
        visible: selection blocks by the ranks that may choose them; None for one rank, and without
            the selected branch.
        parts: the order of sums over queries with ``exact_gradients``, else None.
        statement: the values that all ranks must agree on, as text.
    """

    config: NSAConfig
    rank: int
    size: int
    batch: int
    local_length: int
    longest: int
    segments: QuerySegments
    positions: Tensor
    documents: Tensor
    halos: Mapping[str, Halo]
    grids: Mapping[str, BlockOwnership]
    visible: VisibleBlocks | None = None
    parts: Parts | None = None
    statement: Statement = field(default_factory=lambda: Statement({}))

    def __str__(self) -> str:
        """The call and the batch, for errors."""
        return str(self.statement)

    def to(self, device: torch.device) -> Plan:
        """The same plan with its index tensors on ``device``."""
        plan: Plan = _changed(self, lambda x: x.to(device), {})
        return plan

    def tensors(self) -> list[Tensor]:
        """The tensors of the plan on its device, each once."""
        found: list[Tensor] = []

        def note(x: Tensor | QuerySegments) -> Tensor | QuerySegments:
            found.append(x.table if isinstance(x, QuerySegments) else x)
            return x

        _changed(self, note, {})
        return found


def _changed(
    value: Any,
    change: Callable[[Tensor | QuerySegments], Tensor | QuerySegments],
    memo: dict[int, Any],
) -> Any:
    """Change every tensor of a nested plan once; shared objects stay shared."""
    if id(value) in memo:
        return memo[id(value)]
    new: Any
    if isinstance(value, (Tensor, QuerySegments)):
        new = change(value)
    elif isinstance(value, Mapping):
        new = {k: _changed(v, change, memo) for k, v in value.items()}
    elif isinstance(value, tuple) and value and isinstance(value[0], QuerySegments):
        new = tuple(_changed(x, change, memo) for x in value)
    elif isinstance(value, (Plan, Halo, BlockOwnership, VisibleBlocks, Parts, InParts, Reads)):
        new = replace(
            value, **{f.name: _changed(getattr(value, f.name), change, memo) for f in fields(value)}
        )
    else:
        return value
    memo[id(value)] = new
    return new

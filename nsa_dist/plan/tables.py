"""What a plan says: who holds what, as tables that every rank works out alike.

Letters: N local tokens, P ranks, C compressed tokens of the whole stream, B selection blocks of
the whole stream, E rows of a halo-extended buffer. A *stream coordinate* counts the tokens of the
whole batch, row after row. A block belongs to the rank that holds its first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.plan.statement import Statement
from nsa_kernels import QuerySegments


@dataclass(frozen=True, eq=False)
class Halo:
    """One exchange of the tokens around local runs, and the buffer that it fills.

    Attributes:
        num_rows: E.
        own_rows: int64 [N], row of the extended buffer at which each local token stands.
        send_rows: int64 [sum(send_counts)], local tokens to send, by receiving rank.
        send_counts: tokens for each rank.
        recv_rows: int64 [sum(recv_counts)], rows at which received tokens stand, by sending rank.
        recv_counts: tokens from each rank.
        is_local: no rank needs any token of another.
        is_identity: and the extended buffer is the local tensor as it stands.
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
        counts: blocks of each rank.
        owner: int64 [blocks].
        by_rank: int64 [blocks], block ids ordered by owner, then id.
        gathered_rows: int64 [blocks], where each stands in a gather of runs padded to max(counts).
        lengths: int64 [blocks], tokens of each; a document's last selection block may be short.
        own_ids: int64 [counts[rank]].
        own_index: int64 [counts[rank]], number of each own block within its document.
        own_rows: int64 [counts[rank]], row of the extended buffer at which each own block starts.
        bases: int64 [N], number of block 0 of each local token's document.
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
        """Blocks of the whole stream."""
        return sum(self.counts)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that one rank's forward and backward need to know about the split.

    Attributes:
        config, rank, size: what it was made for.
        batch, local_length: rows and tokens a row that this rank holds; N is their product.
        longest: tokens of the longest document.
        segments: runs of local queries at consecutive positions (see ``nsa_kernels``).
        positions: int64 [N], position of each local token in its document.
        documents: int64 [N], number of its document.
        halos: by set of keys and values; the same object for all where K, V is shared.
        grids: the blocks of each grid by its name: ``selected`` where that branch is used, and what
            the selector declares (NSA: ``compressed``).
        statement: everything that all ranks must agree on, printed.
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
    statement: Statement = field(default_factory=lambda: Statement({}))

    def __str__(self) -> str:
        """The call and the batch, as errors name them."""
        return str(self.statement)

    def to(self, device: torch.device) -> Plan:
        """The same plan with its index tensors on ``device``."""
        memo: dict[int, Any] = {}
        return _move(self, device, memo)


def _move(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    """Move every tensor of a nested plan, once for each object that is shared."""
    if id(value) in memo:
        return memo[id(value)]
    moved: Any
    if isinstance(value, (Tensor, QuerySegments)):
        moved = value.to(device)
    elif isinstance(value, Mapping):
        moved = {k: _move(v, device, memo) for k, v in value.items()}
    elif isinstance(value, (Plan, Halo, BlockOwnership)):
        moved = replace(
            value, **{f.name: _move(getattr(value, f.name), device, memo) for f in fields(value)}
        )
    else:
        return value
    memo[id(value)] = moved
    return moved

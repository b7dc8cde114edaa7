"""The collectives that the attention uses, counted, and the fixed-order sum of their returns.

Neighbour exchanges are all-to-alls whose splits are zero except for the neighbours: NCCL sends
only what is not empty, as grouped point-to-point transfers, while every rank still takes part, so
that a rank without a neighbour can neither skip nor hang the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.group import ContextGroup

# torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_to_all_rows(
    rows: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: ContextGroup,
    counter: CommunicationCounter,
    kind: str,
) -> Tensor:
    """Send consecutive runs of rows to the ranks of the group, and receive theirs.

    Args:
        rows: [sum(send_counts), width], run p goes to rank p.
        send_counts, recv_counts: rows for and from each rank.

    Returns:
        [sum(recv_counts), width], ordered by sender.
    """
    if group.size == 1:
        return rows
    received = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
    dist.all_to_all_single(
        received,
        rows.contiguous(),
        output_split_sizes=list(recv_counts),
        input_split_sizes=list(send_counts),
        group=group.process_group,
    )
    row_bytes = rows.element_size() * rows[:1].numel() if len(rows) else 0
    if len(received):
        row_bytes = received.element_size() * received[:1].numel()
    counter.add(
        kind,
        sent=row_bytes * (sum(send_counts) - send_counts[group.rank]),
        received=row_bytes * (sum(recv_counts) - recv_counts[group.rank]),
    )
    return received


def all_gather_rows(
    rows: Tensor, group: ContextGroup, counter: CommunicationCounter, kind: str
) -> Tensor:
    """Concatenate equally many rows of every rank: [M, width] -> [P*M, width]."""
    if group.size == 1:
        return rows
    gathered = rows.new_empty((group.size * rows.shape[0], *rows.shape[1:]))
    _all_gather(gathered, rows.contiguous(), group=group.process_group)
    own_bytes = rows.numel() * rows.element_size()
    counter.add(kind, sent=own_bytes * (group.size - 1), received=own_bytes * (group.size - 1))
    return gathered


def all_reduce_max(
    values: Tensor, group: ContextGroup, counter: CommunicationCounter, kind: str
) -> Tensor:
    """The largest of all ranks' values, by element; counted as sent whole to every rank."""
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.process_group)
    own_bytes = values.numel() * values.element_size()
    counter.add(kind, sent=own_bytes * (group.size - 1), received=own_bytes * (group.size - 1))
    return largest


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of several ranks are summed."""
    return torch.promote_types(dtype, torch.float32)


def add_returned_rows(own: Tensor, returned: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Add gradients that came back from other ranks to this rank's own, in rank order.

    A rank asks for a row at most once a transfer, so the rows of one run are distinct and each
    element is added to once a run: the order of additions is that of the ranks, on every device.

    Args:
        own: [E, ...] this rank's gradient.
        returned: [sum(counts), ...] from the ranks in order.
        rows: int64 [sum(counts)], the row of ``own`` that each belongs to.

    Returns:
        [E, ...] in the accumulation dtype.
    """
    total = own.to(accumulation_dtype(own.dtype), copy=True)
    start = 0
    for count in counts:
        run = slice(start, start + count)
        if count:
            total.index_add_(0, rows[run], returned[run].to(total.dtype))
        start += count
    return total

"""Collectives that count bytes and explain failures, and the sum of returned gradients.

Exchanges between neighbours are all-to-alls whose other splits are empty. NCCL then only sends to
the neighbours, as grouped point-to-point transfers, but every rank still takes part, so a rank
without neighbours cannot make the others hang.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.comm.work import Work

MARK = "nsa_dist."
"""What the names of messages begin with in a trace; their kind follows."""

# torch 2.13 renamed it and deprecated the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def begin_all_to_all(
    rows: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    channel: Channel,
    kind: str,
    *,
    into: Tensor | None = None,
) -> Work[Tensor]:
    """Send consecutive runs of rows to the ranks of the group, and receive theirs.

    Args:
        rows: [sum(send_counts), ...], run p goes to rank p.
        send_counts, recv_counts: rows for and from each rank.
        kind: name for the counter and for errors.
        into: [sum(recv_counts), ...], contiguous, the buffer to receive in; None for a new one.

    Returns:
        A ``Work`` with [sum(recv_counts), ...], ordered by sender.
    """
    group = channel.group
    if group.size == 1:
        return Work.done(rows)
    received = rows.new_empty((sum(recv_counts), *rows.shape[1:])) if into is None else into
    rows = rows.contiguous()
    with name_failures(kind, group, channel.about), _marked(kind):
        handle = dist.all_to_all_single(
            received,
            rows,
            output_split_sizes=list(recv_counts),
            input_split_sizes=list(send_counts),
            group=group.process_group,
            async_op=True,
        )
    row_bytes = rows.element_size() * rows[:1].numel() if len(rows) else 0
    if len(received):
        row_bytes = received.element_size() * received[:1].numel()
    channel.counter.add(
        kind,
        sent=row_bytes * (sum(send_counts) - send_counts[group.rank]),
        received=row_bytes * (sum(recv_counts) - recv_counts[group.rank]),
    )
    if channel.nodes is not None:
        far = [p for p in range(group.size) if not channel.nodes.together(p, group.rank)]
        channel.counter.add_between_nodes(
            kind,
            sent=row_bytes * sum(send_counts[p] for p in far),
            received=row_bytes * sum(recv_counts[p] for p in far),
        )
    return _under_way(handle, (rows, received), channel, kind)


def begin_all_gather(rows: Tensor, channel: Channel, kind: str) -> Work[Tensor]:
    """Begin to concatenate the rows [M, ...] of every rank to [P*M, ...]; M is equal on all."""
    group = channel.group
    if group.size == 1:
        return Work.done(rows)
    gathered = rows.new_empty((group.size * rows.shape[0], *rows.shape[1:]))
    rows = rows.contiguous()
    with name_failures(kind, group, channel.about), _marked(kind):
        handle = _all_gather(gathered, rows, group=group.process_group, async_op=True)
    own_bytes = rows.numel() * rows.element_size()
    others = group.size - 1
    channel.counter.add(kind, sent=own_bytes * others, received=own_bytes * others)
    if channel.nodes is not None:
        far_bytes = own_bytes * (group.size - len(channel.nodes.mates(group.rank)))
        channel.counter.add_between_nodes(kind, sent=far_bytes, received=far_bytes)
    return _under_way(handle, (rows, gathered), channel, kind)


def _under_way(
    handle: dist.Work, buffers: tuple[Tensor, Tensor], channel: Channel, kind: str
) -> Work[Tensor]:
    """A ``Work`` for a collective, which keeps its (sent, received) ``buffers`` alive."""

    def wait() -> Tensor:
        with name_failures(kind, channel.group, channel.about), _marked(kind):
            handle.wait()
        return buffers[1]

    return Work(wait)


def all_reduce_max(
    values: list[int], group: ContextGroup, counter: CommunicationCounter, kind: str, about: object
) -> list[int]:
    """Elementwise maximum of all ranks' 64-bit values, counted as sent from each rank to all."""
    device = group.device
    on_gpu = device.type == "cuda"
    with torch.cuda.stream(_side_stream(device) if on_gpu else None):
        largest = torch.tensor(values, device=device)
        with name_failures(kind, group, about), _marked(kind):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.process_group)
        with name_failures(kind, group, about), _marked(kind):
            if on_gpu:
                _wait_for_stream(group)
        result: list[int] = largest.tolist()
    own_bytes = largest.nbytes
    counter.add(kind, sent=own_bytes * (group.size - 1), received=own_bytes * (group.size - 1))
    return result


def values_on_host(x: Tensor, channel: Channel, kind: str) -> list[Any]:
    """The values of an integer tensor of the current stream; the host waits for that stream alone.

    Raises:
        RuntimeError: if the message before it does not arrive within the group's timeout.
    """
    if x.device.type != "cuda":
        values: list[Any] = x.tolist()
        return values
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    with name_failures(kind, channel.group, channel.about):
        _wait_for_stream(channel.group)
    values = copy.tolist()
    return values


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for messages that do not depend on computation and should not wait for it."""
    return torch.cuda.Stream(device)


def _wait_for_stream(group: ContextGroup) -> None:
    """Wait for the current stream until shortly before the group's timeout.

    At the timeout NCCL's watchdog ends the process without a Python exception.

    Raises:
        RuntimeError: if the wait takes too long.
    """
    assert group.process_group is not None
    timeout = group.process_group._get_backend(group.device).options._timeout.total_seconds()
    done = torch.cuda.Event()
    done.record()
    start = time.monotonic()
    while not done.query():
        waited = time.monotonic() - start
        if waited > timeout - min(1.0, timeout / 10):
            raise RuntimeError(f"timed out after {waited:.1f} s, with a timeout of {timeout:g} s")
        time.sleep(0.0 if waited < 0.001 else 0.0001)


def _marked(kind: str) -> AbstractContextManager[object]:
    """Names a message in the traces of torch's profiler."""
    if not torch._C._autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(MARK + kind)


@contextmanager
def name_failures(kind: str, group: ContextGroup, about: object) -> Iterator[None]:
    """Explain the failure of a collective, such as a timeout or a lost rank.

    Args:
        kind: kind of message.
        about: describes what this rank was doing.

    Raises:
        RuntimeError: or the subclass that torch.distributed raised, chained to the original.
    """
    start = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        waited = time.monotonic() - start
        raised = type(error) if isinstance(error, dist.DistError) else RuntimeError
        assert group.process_group is not None
        members = dist.get_process_group_ranks(group.process_group)
        raise raised(
            f"{kind}: failed after {waited:.1f} s on rank {group.rank} of the group of global "
            f"ranks {members}, in the {about}: {error}. If it timed out or lost a connection, "
            "another rank ended, raised an error of its own (see its output), made another call, "
            "or was slower than the group's timeout (docs/training.md, 'When ranks wait for each "
            "other')"
        ) from error


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums of gradients from several ranks."""
    return torch.promote_types(dtype, torch.float32)


def add_returned_rows(own: Tensor, returned: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Add gradients from other ranks to this rank's own, in rank order.

    A rank requests a row at most once per transfer, so the rows of a run are distinct, and each run
    adds to an element at most once. The order of additions is therefore fixed on every device.

    Args:
        own: [E, ...], this rank's gradient.
        returned: [sum(counts), ...], from the ranks in order.
        rows: int64 [sum(counts)], the row of ``own`` for each returned row.

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


def add_returned(
    own: tuple[Tensor, Tensor], returned: Tensor, rows: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``add_returned_rows`` for K and V, whose gradients share a message; rounds once."""
    k_part, v_part = returned.split((own[0].shape[-1], own[1].shape[-1]), dim=-1)
    k, v = own
    return (
        add_returned_rows(k, k_part, rows, counts).to(k.dtype),
        add_returned_rows(v, v_part, rows, counts).to(v.dtype),
    )

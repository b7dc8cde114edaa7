"""The attention's collectives, counted and named where they fail, and the sum of their returns.

Neighbour exchanges are all-to-alls whose splits are zero except for the neighbours: NCCL sends
only what is not empty, as grouped point-to-point transfers, while every rank still takes part, so
that a rank without a neighbour can neither skip nor hang the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.comm.channel import Channel
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup
from nsa_dist.comm.work import Work

# torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def begin_all_to_all(
    rows: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    channel: Channel,
    kind: str,
) -> Work[Tensor]:
    """Send consecutive runs of rows to the ranks of the group, and receive theirs.

    Args:
        rows: [sum(send_counts), ...], run p goes to rank p.
        send_counts, recv_counts: rows for and from each rank.
        kind: what it is counted as, and called in errors.

    Returns:
        The work of [sum(recv_counts), ...], ordered by sender.
    """
    group = channel.group
    if group.size == 1:
        return Work.done(rows)
    received = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
    rows = rows.contiguous()
    with name_failures(kind, group, channel.about):
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
    return _under_way(handle, (rows, received), channel, kind)


def begin_all_gather(rows: Tensor, channel: Channel, kind: str) -> Work[Tensor]:
    """Concatenate equally many rows of every rank: the work of [M, ...] -> [P*M, ...]."""
    group = channel.group
    if group.size == 1:
        return Work.done(rows)
    gathered = rows.new_empty((group.size * rows.shape[0], *rows.shape[1:]))
    rows = rows.contiguous()
    with name_failures(kind, group, channel.about):
        handle = _all_gather(gathered, rows, group=group.process_group, async_op=True)
    own_bytes = rows.numel() * rows.element_size()
    others = group.size - 1
    channel.counter.add(kind, sent=own_bytes * others, received=own_bytes * others)
    return _under_way(handle, (rows, gathered), channel, kind)


def _under_way(
    handle: dist.Work, buffers: tuple[Tensor, Tensor], channel: Channel, kind: str
) -> Work[Tensor]:
    """The work of a collective; ``buffers``, what is sent and received, live until it ends."""

    def wait() -> Tensor:
        with name_failures(kind, channel.group, channel.about):
            handle.wait()
        return buffers[1]

    return Work(wait)


def all_reduce_max(
    values: list[int], group: ContextGroup, counter: CommunicationCounter, kind: str, about: object
) -> list[int]:
    """The largest of all ranks' 64-bit values, by place; counted as sent whole to every rank."""
    device = group.device
    on_gpu = device.type == "cuda"
    with torch.cuda.stream(_side_stream(device) if on_gpu else None):
        largest = torch.tensor(values, device=device)
        with name_failures(kind, group, about):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.process_group)
            if on_gpu:
                _wait_for_stream(group)
        result: list[int] = largest.tolist()
    own_bytes = largest.nbytes
    counter.add(kind, sent=own_bytes * (group.size - 1), received=own_bytes * (group.size - 1))
    return result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of messages that need nothing of what is computed, so that none waits for it."""
    return torch.cuda.Stream(device)


def _wait_for_stream(group: ContextGroup) -> None:
    """Wait for the current stream, but not for ever.

    NCCL's own watchdog ends the process at the group's timeout, without a word to Python: the wait
    gives up a little before it.

    Raises:
        RuntimeError: when it gives up.
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


@contextmanager
def name_failures(kind: str, group: ContextGroup, about: object) -> Iterator[None]:
    """Give a collective that timed out, or lost a rank, the words to look for the reason with.

    Args:
        kind: of message.
        about: printed; what this rank was doing.

    Raises:
        RuntimeError: or the subclass that torch.distributed raised, from it.
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

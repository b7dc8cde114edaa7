"""A run's batches: which streams each rank takes, cut for it, and made ahead of the steps.

Batches are addressed by (seed, step), so a loader has no state to save, and one that makes them
ahead gives the same bits as none. It is a thread of the run's process, not torch's worker
processes: those would need the corpus, its memory maps and the context parallel group each. The
thread reads, cuts and pins while the main thread launches a step, and most of what it calls lets
the main thread run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.data.streams import Stream, Streams, join
from launch.processes.ranks import Ranks
from launch.settings import Settings
from nsa_dist import ShardedBatch, shard_batch


def cut_stream(stream: Stream, settings: Settings, ranks: Ranks) -> ShardedBatch:
    """A whole stream's part of this context-parallel rank, on the host; pinned for a GPU."""
    tokens, cu_seqlens, labels = stream.tokens, stream.cu_seqlens, stream.tokens
    if settings.parallel.sequence_parallel:
        # Tensor parallel ranks share each rank's tokens: one more document fills up, without
        # targets. Others are filled up by the layout, zigzag_per_document.
        lengths = -(-cu_seqlens.diff() // (2 * ranks.cp)) * 2 * ranks.cp
        fill = -int(lengths.sum()) % (2 * ranks.cp * ranks.tp)
        if fill:
            tokens = F.pad(tokens, (0, fill))
            labels = F.pad(labels, (0, fill), value=-100)
            cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + fill))
    batch = shard_batch(
        tokens,
        cu_seqlens=cu_seqlens,
        labels=labels,
        layout=settings.parallel.layout,
        group=ranks.cp_mesh,
        exact_gradients=settings.parallel.exact_gradients,
    )
    return _moved(batch, Tensor.pin_memory) if ranks.device.type == "cuda" else batch


def to_device(batch: ShardedBatch, device: torch.device) -> ShardedBatch:
    """A batch on the device; the host does not wait for copies of pinned memory."""
    return _moved(batch, partial(Tensor.to, device=device, non_blocking=True))


def _moved(batch: ShardedBatch, move: Callable[[Tensor], Tensor]) -> ShardedBatch:
    return replace(
        batch,
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        position_ids=move(batch.position_ids),
    )


def shard_stream(stream: Stream, settings: Settings, ranks: Ranks) -> ShardedBatch:
    """A whole stream's part of this context-parallel rank, on its device."""
    return to_device(cut_stream(stream, settings, ranks), ranks.device)


def micro_batches(
    settings: Settings, streams: Streams, step: int, ranks: Ranks
) -> Iterator[Stream]:
    """This replica's micro-batches of one step, whole.

    The global batch of step s is streams s * global_batch and on; replicas take equal runs of it.
    """
    share = settings.data.global_batch // ranks.dp
    first = step * settings.data.global_batch + ranks.dp_rank * share
    micro = settings.data.micro_batch
    for index in range(first, first + share, micro):
        yield join([streams[i] for i in range(index, index + micro)])


def step_batches(
    settings: Settings, streams: Streams, step: int, ranks: Ranks
) -> Iterator[ShardedBatch]:
    """This rank's shards of ``micro_batches``, on its device."""
    for stream in micro_batches(settings, streams, step, ranks):
        yield shard_stream(stream, settings, ranks)


def host_data(
    settings: Settings,
    streams: Streams,
    step: int,
    ranks: Ranks,
    count: Callable[[Sequence[Tensor]], float],
) -> StepData:
    """What this rank's step reads, on the host.

    Args:
        count: ``cu_seqlens`` of whole micro-batches -> operations.
    """
    whole = list(micro_batches(settings, streams, step, ranks))
    flops = count([stream.cu_seqlens for stream in whole])
    return StepData([cut_stream(stream, settings, ranks) for stream in whole], flops)


@dataclass(frozen=True, eq=False)
class StepData:
    """What a rank's step reads.

    Args:
        batches: this rank's shards of its replica's micro-batches.
        flops: operations of the replica's streams, by ``reporting.flops``.
    """

    batches: Sequence[ShardedBatch]
    flops: float


class Loader:
    """What a run's steps read, each step once and in order.

    Args:
        make: step -> its data, with batches on the host. Called by one thread at a time.
        steps: which steps there are.
        ahead: steps whose batches are made before they are asked for; 0: made when asked for.
        device: where batches are needed.
    """

    def __init__(
        self,
        make: Callable[[int], StepData],
        steps: range,
        ahead: int,
        device: torch.device,
    ) -> None:
        self._make, self._device = make, device
        self._left = iter(steps)
        self._made: deque[Future[StepData]] = deque()
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "batches", self._enter) if ahead else None

    def __enter__(self) -> Loader:
        for _ in range(self._ahead):
            self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __next__(self) -> StepData:
        """The next step's data, with batches on the device; raises what reading it raised."""
        if self._thread is None:
            made = self._make(next(self._left))
        else:
            self._begin()
            made = self._made.popleft().result()
        batches = [to_device(batch, self._device) for batch in made.batches]
        return replace(made, batches=batches)

    def _begin(self) -> None:
        """Have the next step's batches made, if there is one."""
        step = next(self._left, None)
        if self._thread is not None and step is not None:
            self._made.append(self._thread.submit(self._make, step))

    def _enter(self) -> None:
        # Threads of a large operation would take the main thread's cores.
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

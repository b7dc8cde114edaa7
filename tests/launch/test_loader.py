"""Batches made ahead of the steps: the same bits, in order, without a wait of the host."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.data.corpus import load_corpus
from launch.data.loader import (
    Loader,
    StepData,
    cut_stream,
    host_data,
    step_batches,
    to_device,
)
from launch.processes.ranks import start_ranks
from launch.processes.stopping import Stopping
from launch.settings import DataSettings, Settings
from launch.storage.folder import run_folder
from launch.train import Run, read_corpus
from nsa_dist import ShardedBatch
from tests.distributed.ranks import RankError, Ranks
from tests.launch.common import replaced, run_training, tiny
from tests.launch.megatron import use_gpus

RanksOf = Callable[[int], Ranks]
CPU = torch.device("cpu")


def values(batch: ShardedBatch) -> tuple[Any, ...]:
    """All that a step reads of a batch."""
    assert batch.cu_seqlens is not None
    tensors = (batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens)
    return (*(x.tolist() for x in tensors), batch.num_targets)


def loaded(settings: Settings, steps: int, ahead: int) -> list[list[tuple[Any, ...]]]:
    """The values of all batches of some steps."""
    ranks = start_ranks(settings)
    streams = load_corpus(settings.data).training.streams(settings.data.length, 0)

    def make(step: int) -> StepData:
        return host_data(settings, streams, step, ranks, len)

    with Loader(make, range(3, 3 + steps), ahead, ranks.device) as loader:
        found = [[values(batch) for batch in next(loader).batches] for _ in range(steps)]
    plain = [
        [values(batch) for batch in step_batches(settings, streams, step, ranks)]
        for step in range(3, 3 + steps)
    ]
    assert found == plain
    # Several epochs, and packings of their own.
    assert (3 + steps) * settings.data.global_batch > 2 * streams.per_epoch
    assert len({tuple(batch[3]) for batches in found for batch in batches}) > steps / 2
    return found


@pytest.mark.parametrize(
    "size, layout",
    [
        (2, "zigzag_per_document"),
        pytest.param(1, "zigzag", marks=pytest.mark.slow),
        *(pytest.param(2, name, marks=pytest.mark.slow) for name in ("zigzag", "contiguous")),
    ],
)
def test_batches_are_the_same_with_and_without(
    ranks_of: RanksOf, root: Path, size: int, layout: str
) -> None:
    settings = tiny(root, parallel={"cp": size, "layout": layout}, data={"micro_batch": 2})
    for without, ahead in zip(
        ranks_of(size).run(loaded, settings, 30, 0),
        ranks_of(size).run(loaded, settings, 30, 3),
        strict=True,
    ):
        assert without == ahead


def test_a_run_is_the_same_with_and_without(ranks_of: RanksOf, root: Path) -> None:
    found = []
    for prefetch in (0, 3):
        run = {"steps": 6, "folder": str(root / f"prefetch-{prefetch}")}
        settings = tiny(root, data={"prefetch": prefetch}, parallel={"cp": 2}, run=run)
        result, _ = ranks_of(2).run(run_training, settings)
        found.append((result.losses, result.grad_norms, result.validation_loss))
    assert found[0] == found[1]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Maker:
    """Makes no batches, and keeps what it was asked for."""

    def __init__(self, fails_at: int = -1) -> None:
        self.steps: list[int] = []
        self.threads: set[int] = set()
        self.fails_at = fails_at

    def __call__(self, step: int) -> StepData:
        self.steps.append(step)
        self.threads.add(threading.get_ident())
        if step == self.fails_at:
            raise ValueError("data.path must hold tokens")
        return StepData([], 0.0)


def test_steps_are_made_ahead_in_order_by_a_thread() -> None:
    make = Maker()
    with Loader(make, range(5, 9), 2, CPU) as loader:
        wait_for(lambda: make.steps == [5, 6])
        next(loader)
        wait_for(lambda: make.steps == [5, 6, 7])
        for _ in range(3):
            next(loader)
    assert make.steps == [5, 6, 7, 8]
    assert len(make.threads) == 1 and threading.get_ident() not in make.threads


def test_without_prefetch_nothing_is_made_ahead() -> None:
    make = Maker()
    with Loader(make, range(2), 0, CPU) as loader:
        assert make.steps == []
        next(loader)
        assert make.steps == [0]
    assert make.threads == {threading.get_ident()}


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_cannot_be_read_ends_the_step_that_needs_it(ahead: int) -> None:
    with Loader(Maker(fails_at=1), range(5), ahead, CPU) as loader:
        next(loader)
        with pytest.raises(ValueError, match=r"^data\.path must hold tokens$"):
            next(loader)


def run_with_bad_step(settings: Settings) -> None:
    def fail(settings: Settings, streams: Any, step: int, *rest: Any) -> StepData:
        if step == 2:
            raise ValueError("data.path must hold tokens")
        return host_data(settings, streams, step, *rest)

    with mock.patch("launch.train.host_data", fail):
        run_training(settings)


def test_a_run_that_cannot_read_on_ends_with_its_error(ranks_of: RanksOf, root: Path) -> None:
    settings = tiny(root, run={"steps": 4, "folder": str(root / "unreadable")})
    with pytest.raises(RankError, match=r"data\.path must hold tokens"):
        ranks_of(1).run(run_with_bad_step, settings)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.prefetch must be at least 0, got -1$"):
        DataSettings(prefetch=-1)


class Waits(TorchDispatchMode):
    """Counts, in this thread, calls for which the host would wait for a GPU, by who called."""

    KINDS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.KINDS:
            files = [frame.filename for frame in traceback.extract_stack()]
            ours = [name for name in files if "nsa_" in name or "/launch/" in name]
            self.found[f"{func} by {ours[-2] if ours else files[-2]}"] += 1
        return func(*args, **(kwargs or {}))


def waits_in_steps(settings: Settings) -> dict[str, int]:
    """Who waits in two steps in the middle of a run."""
    ranks = start_ranks(settings)
    with run_folder(settings, ranks) as folder:
        run = Run(settings, ranks, read_corpus(settings, ranks), folder, Stopping())
        with run.report, run.loader:
            run.step()
            with Waits() as waits:
                run.step()
                run.step()
    return dict(waits.found)


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_does_not_wait(ranks_of: RanksOf, root: Path, size: int) -> None:
    """Apart from the PyTorch backend, which reads what was chosen, and is not that of GPUs."""
    run = {"steps": 5, "folder": str(root / f"waits-{size}"), "dtype": "float32"}
    settings = tiny(root, data={"global_batch": 4}, parallel={"cp": size}, run=run)
    for found in ranks_of(size).run(waits_in_steps, settings):
        assert any("nsa_kernels/pytorch" in who for who in found), "nothing was counted"
        assert [who for who in found if "nsa_kernels/pytorch" not in who] == []


def move_without_waits(settings: Settings) -> None:
    """Move a batch and some numbers to a GPU where each wait of the host is an error."""
    use_gpus()
    ranks = start_ranks(settings)
    stream = load_corpus(settings.data).training.streams(150, 0)[0]
    batch = cut_stream(stream, settings, ranks)
    assert all(x.is_pinned() for x in (batch.tokens, batch.labels, batch.position_ids))
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved, numbers = to_device(batch, ranks.device), ranks.put([1.0, 2.0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values(moved) == values(batch)
    assert moved.tokens.is_cuda and numbers.tolist() == [1.0, 2.0]


@pytest.mark.gpu
def test_copies_to_a_gpu_are_pinned_and_not_waited_for(ranks_of: RanksOf, root: Path) -> None:
    ranks_of(1).run(move_without_waits, replaced(tiny(root), "run", device="cuda"))

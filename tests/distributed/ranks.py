"""Processes that stand for ranks: started once a world size, given one function after another."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.interpreter import quicken

GROUP_TIMEOUT = timedelta(seconds=60)
ANSWER_SECONDS = 150
# DeepSpeed keeps the groups of a run, whose threads poll, until its process ends.
DEEPSPEED_RUNS = 6
# The second brings torch's inductor, and takes most of the time that the first run does.
DEEPSPEED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "nsa_dist.adapters.deepspeed",
)
# Four of five seconds of a rank's first run.
MEGATRON = (
    "megatron.core",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "nsa_dist.adapters.megatron",
)
# What a layer needs, torch's compiler included, and what files of tests import.
_preloaded = ["torch", "nsa_dist.block", "nsa_dist.sharding", "pytest"]


def preload(*modules: str) -> None:
    """Let ranks start with these imported: once for all, not once a rank. Before any has started.

    Not where there is a GPU: what looks for it cannot be forked.
    """
    if not torch.cuda.is_available():
        _preloaded.extend(x for x in modules if x not in _preloaded)


class RankError(AssertionError):
    """A function failed on some rank."""


class Ranks:
    """``size`` processes that run functions together.

    Args:
        size: number of ranks.
        timeout: of the process group.
        backend: "gloo", or "nccl" with a GPU a rank.
        ends_groups: after each function, end the groups that it made and left.
        preloaded: begin with what ``preload`` names, else with nothing imported.
    """

    def __init__(
        self,
        size: int,
        timeout: timedelta = GROUP_TIMEOUT,
        backend: str = "gloo",
        *,
        ends_groups: bool = False,
        preloaded: bool = True,
    ) -> None:
        self.size = size
        self.runs = 0
        self.closed = False
        context = multiprocessing.get_context("forkserver" if preloaded else "spawn")
        if preloaded:
            context.set_forkserver_preload(_preloaded)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, self._folder.name, timeout, backend, ends_groups, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank; its results in rank order.

        The function must be importable and its arguments and result picklable.

        Raises:
            RankError: with every failing rank's traceback.
        """
        answers = self.try_run(function, *args)
        failed = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failed:
            raise RankError("\n".join(failed))
        return [result for _, result in answers]

    def try_run(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """As ``run``, but each rank's (True, result) or (False, traceback)."""
        self.runs += 1
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        try:
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(ANSWER_SECONDS):
                    raise RankError(f"rank {rank} of {self.size} gave no answer: a hang")
                answers.append(pipe.recv())
        except BaseException:  # A test's time limit too: an answer that comes later is to no other.
            self.close()
            raise
        return answers

    def close(self) -> None:
        """End the processes."""
        self.closed = True
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


@contextmanager
def rank_pool(
    most_runs: float = math.inf, *, ends_groups: bool = False, preloaded: bool = True
) -> Iterator[Callable[[int], Ranks]]:
    """get(P): P gloo processes, started at the first request and ended with the context.

    Groups that tests make in them and never end keep threads that poll, unless the pool ends them.

    Args:
        most_runs: of functions, after which the next request starts new processes.
        ends_groups: as of ``Ranks``.
        preloaded: as of ``Ranks``.
    """
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        # One hang closes its ranks, and fails no test but its own.
        if size in started and (started[size].closed or started[size].runs >= most_runs):
            started.pop(size).close()
        if size not in started:
            started[size] = Ranks(size, ends_groups=ends_groups, preloaded=preloaded)
        return started[size]

    try:
        yield get
    finally:
        for ranks in started.values():
            ranks.close()


def _serve(
    rank: int,
    size: int,
    folder: str,
    timeout: timedelta,
    backend: str,
    ends_groups: bool,
    pipe: Connection,
) -> None:
    gc.freeze()  # What was imported before the fork would be copied as it is looked through.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    quicken()
    store = dist.FileStore(str(Path(folder) / "store"), size)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if backend == "nccl":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # What repeatable gradients ask for.
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    frozen = False
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        if ends_groups:
            _end_groups()
        if not frozen:  # What was imported stays, and need not be looked through again.
            gc.collect()
            gc.freeze()
            frozen = True
        pipe.send(answer)


def _end_groups() -> None:
    """End all groups but that of all ranks: the threads of one poll for as long as it lives."""
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None:  # Its module holds dozens, ended or not.
        megatron.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for _ in range(2):  # Engines are cycles, and hold groups: what goes first held others.
        gc.collect()

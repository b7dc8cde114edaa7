"""Processes that work on the shards of a folder, or one process alone.

They end with the program, however that ends, and leave what they do when it is to stop.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

NEWS = 1 << 18
"""Bytes of text after which a process says how far it is."""

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Processes that work on items, or this one alone."""

    def __init__(self, processes: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        context = multiprocessing.get_context("spawn")
        self._state = State(context.Value("q", 0), context.Event())
        if processes > 1:
            self._pool = ProcessPoolExecutor(processes, context, _enter, (self._state,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._state.stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The result for each item."""
        if self._pool is None or len(items) < 2:
            return [work(item) for item in items]
        with _named_end():
            return list(self._pool.map(work, items))

    def each(
        self, work: Callable[[T], R], items: Sequence[T], tick: Callable[[int], None]
    ) -> Iterator[R]:
        """Results as they come.

        Args:
            tick: called every now and then with the bytes that are done.
        """
        if self._pool is None or len(items) < 2:
            self._state.tick = tick
            _enter(self._state, is_alone=True)
            for item in items:
                yield work(item)
            return
        waiting: set[Future[R]] = {self._pool.submit(work, item) for item in items}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            tick(self._state.counter.value)
            with _named_end():
                for future in done:
                    yield future.result()


@contextmanager
def _named_end() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ValueError(
            "--processes must be a number that fits into memory, got a process that was ended from "
            "outside (finished shards are kept, the same line goes on)"
        ) from None


@dataclass
class State:
    """What a process knows of all of them.

    Args:
        counter: bytes of text that are done.
        stop: that shards are left as they are.
    """

    counter: Any
    stop: Any
    tick: Callable[[int], None] | None = None
    waiting: int = 0

    def add(self, size: int, at_once: bool = False) -> None:
        """Count bytes, many together; leaves the shard where the work was stopped."""
        self.waiting += size
        if self.waiting < NEWS and not at_once:
            return
        with self.counter.get_lock():
            self.counter.value += self.waiting
        self.waiting = 0
        if self.tick is not None:
            self.tick(self.counter.value)
        elif self.stop.is_set():
            raise Stopped


class Stopped(Exception):
    """Another process failed, or the program is to end."""


_own: list[State] = []
"""Of this process, which is the program's own."""


def own_state() -> State:
    """What this process knows, once it works."""
    return _own[0]


def _enter(state: State, is_alone: bool = False) -> None:
    """Make this process one that works."""
    _own[:] = [state]
    if is_alone:
        return
    # A terminal's ^C goes to every process; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

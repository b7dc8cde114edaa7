"""Runs by Megatron on the CPU: for processes that answer for its GPUs, and for no others."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

from ranks import start_ranks
from settings import Settings
from tests.adapters.megatron import shim
from train import Result, train


@contextmanager
def _own_processes() -> Iterator[None]:
    """Lets a rank, which is a daemon, start the processes from which Megatron writes."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process = multiprocessing.current_process()
    process._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        process._config["daemon"] = True  # type: ignore[attr-defined]
        filesystem_async._results_queue = None  # Ends the process that served it.


def run_megatron(settings: Settings) -> Result:
    """A whole run."""
    shim.install()
    with _own_processes():
        return train(settings, start_ranks(settings))

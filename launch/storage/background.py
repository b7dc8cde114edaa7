"""Checkpoints that are written while the run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from threading import Thread
from types import TracebackType

import torch.distributed as dist

from launch.storage.manifest import CheckpointError, messages_over


class BackgroundSaver:
    """Writes one checkpoint at a time on a thread of its own. Every method is collective.

    Its messages go over a process group of its own, on CPUs: the order in which they meet those of
    the steps is not the same on all ranks. As a context it ends when what it writes is written,
    also where the run failed: the state was sound when it was copied.

    Args:
        seconds: that its ranks wait for each other.
    """

    def __init__(self, seconds: float) -> None:
        self._timeout = timedelta(seconds=seconds)
        self._group: dist.ProcessGroup | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except CheckpointError as problem:
            if error is None:
                raise
            print(problem, file=sys.stderr, flush=True)

    @property
    def failed(self) -> bool:
        """Whether the last one is known, on this rank, not to have been written."""
        return self._error is not None

    def start(self, save: Callable[[], object]) -> None:
        """Begin ``save``, when what was begun before is finished; raises what that raised."""
        self.finish()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        arguments = (self._group, save)
        self._thread = Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait for what was begun.

        Returns:
            Whether something was begun since the last call, and was written.

        Raises:
            CheckpointError: on every rank, if it could not be written.
        """
        begun = self._thread is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return begun

    def _run(self, group: dist.ProcessGroup, save: Callable[[], object]) -> None:
        try:
            with messages_over(group):
                save()
        except BaseException as error:  # Raised where the run waits for it.
            self._error = error

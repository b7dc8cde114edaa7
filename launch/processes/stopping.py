"""Stopping in time: a signal ends the step, the state is saved, and the exit status says so.

Signals are read by a thread of their own, from Python's wakeup descriptor: it sees them at once,
also while the main thread waits in a collective. On which step all ranks stop they agree in the
numbers of each step (``train.train_step``); a signal to one of them is enough.

A rank also stops when torchrun, its parent, is gone: killed, torchrun ends no rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType

STOPPED = 75
"""Status of a run that was stopped before its end and lost nothing: EX_TEMPFAIL, "try again"."""
INTERRUPTED = 130
"""Status after a second SIGINT: ended at once, as a shell shows it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What stops a run; SIGHUP unless it was ignored from the start, as by nohup."""
START_SECONDS = 10.0
"""Seconds until a process that was asked to stop before its first step is ended."""
ORPHAN_SECONDS = 300.0
"""Seconds until a rank whose torchrun is gone, and which cannot save, is ended."""


class Stopping:
    """Whether this process was asked to stop.

    It handles the signals while it is used as a context. Until ``steps_begin`` there is nothing to
    save, and a signal ends the process by SystemExit in the main thread.

    Attributes:
        asked: whether a signal came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._has_state = self._interrupted = False
        self._taken: list[int] = []
        self._ended = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def __enter__(self) -> Stopping:
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._in_main_thread)
                self._taken.append(number)
                # Library calls must not be interrupted by a signal.
                signal.siginterrupt(number, False)
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        # Children of other parents, such as a shell with nohup, may outlive them.
        if "TORCHELASTIC_RUN_ID" in os.environ:
            parent = os.getppid()
            watch = threading.Thread(target=self._watch, args=(parent,), name="parent", daemon=True)
            watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._taken)
        if isinstance(error, SystemExit) and error.code == STOPPED and not self._has_state:
            # Process groups may hang in their destructors while other ranks still wait.
            with contextlib.suppress(OSError):
                print("stopped before the first step", file=sys.stderr, flush=True)
            os._exit(STOPPED)

    def steps_begin(self) -> None:
        """From here on a signal only sets ``asked``.

        torchrun, a shell and SLURM also send it to all children of the process, and a kernel
        compiler that it killed would abort the step. So this thread blocks signals, which children
        inherit; the thread that reads them was started before and blocks none.
        """
        self._has_state = True
        signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if not self._has_state:
            raise SystemExit(STOPPED)

    def _read(self) -> None:
        while True:
            for number in self._reader.recv(64):
                if number in SIGNALS:
                    self._ask(number)

    def _ask(self, number: int) -> None:
        if self._interrupted and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        self.asked = True
        self._interrupted |= number == signal.SIGINT
        if not self._has_state:
            timer = threading.Timer(START_SECONDS, self._end_start)
            timer.daemon = True
            timer.start()

    def _end_start(self) -> None:
        if not self._has_state:
            os._exit(STOPPED)

    def _watch(self, parent: int) -> None:
        while not self._ended.wait(1.0):
            if os.getppid() != parent:
                with contextlib.suppress(OSError):
                    print("torchrun is gone: this rank stops", file=sys.stderr, flush=True)
                if self._interrupted:
                    # A second SIGINT ended torchrun before it could pass it on.
                    os._exit(INTERRUPTED)
                os.kill(os.getpid(), signal.SIGTERM)
                self._ended.wait(ORPHAN_SECONDS)
                os._exit(1)

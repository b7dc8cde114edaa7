"""The files and the console that a run logs to. They are exact after a resume and never end a run.

A resumed run repeats the steps after its checkpoint, so their log lines are removed first. A full
disk is reported once, and the run continues.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

HELD_LINES = 10_000
"""Lines of metrics.jsonl that are held while its disk is full; older ones are lost."""

Warn = Callable[[str], None]


class MetricsFile:
    """A file of JSON lines, each with its ``step``.

    Args:
        first_step: steps that are done; lines of later ones are cut off.
        warn: called once, when a line cannot be written.

    Attributes:
        validated: steps of kept lines with a ``validation_loss``.
    """

    def __init__(self, path: Path, first_step: int, warn: Warn) -> None:
        self.validated: set[int] = set()
        self._path, self._warn, self._warned = path, warn, False
        self._held: deque[bytes] = deque(maxlen=HELD_LINES)
        self._file = -1
        try:
            self._cut(first_step)
            # Opening a pipe must not wait for its reader.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            self._file = os.open(path, flags, 0o644)
        except OSError as error:
            # Steps after the checkpoint would be logged twice.
            self._tell(error, "nothing is written to it")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line, and those that could not be written before."""
        if self._file < 0:
            return
        self._held.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        data = memoryview(b"".join(self._held))
        size = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._tell(error, f"the latest {HELD_LINES} lines are held until it can be written")
            self._undo(size)
            return
        self._held.clear()

    def sync(self) -> None:
        """Sync the file to the disk."""
        if self._file >= 0:
            try:
                os.fsync(self._file)
            except OSError as error:
                self._tell(error, "it may lose lines if this machine fails")

    def close(self) -> None:
        """Close the file. Lines that still cannot be written are lost."""
        if self._file >= 0:
            try:
                os.close(self._file)
            except OSError as error:
                self._tell(error, "its last lines may be lost")
            self._file = -1

    def _cut(self, first_step: int) -> None:
        """Keep the whole lines of steps that are done. A kill may have cut the last line."""
        if not self._path.is_file():
            return
        lines = self._path.read_bytes().splitlines()
        kept = []
        for line in lines:
            step, validated = _step_of(line)
            if step is not None and step <= first_step:
                kept.append(line)
                self.validated |= {step} if validated else set()
        text = b"".join(line + b"\n" for line in kept)
        if text != self._path.read_bytes():
            new = self._path.with_name(f"{self._path.name}.new")
            with new.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)

    def _undo(self, size: int) -> None:
        """Remove the part of a line that was written."""
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            self._tell(error, "it may hold part of a line")

    def _tell(self, error: OSError, then: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: {self._path}: {error.strerror}; {then}")


def _step_of(line: bytes) -> tuple[int | None, bool]:
    """The step of a line, None without one, and whether it is of a validation."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None, False
    return record["step"], "validation_loss" in record


class Board:
    """TensorBoard's event files in a folder. After an error, which is told once, events are lost
    until ``flush`` can begin another file."""

    def __init__(self, folder: Path, first_step: int, warn: Warn) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "run.tensorboard must be False where tensorboard is not installed "
                "(pip install tensorboard), got True"
            ) from None
        self._folder, self._warn, self._warned = folder, warn, False
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None
        # Readers drop events of that step and later ones from the files before.
        self._try(lambda: self._open(first_step + 1))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a value by each name."""
        for name, value in values.items():
            if self._writer is not None:
                self._try(partial(self._writer.add_scalar, name, value, step))

    def flush(self) -> None:
        """Write all events to their file, which would otherwise take two minutes."""
        self._try(self._open if self._writer is None else self._writer.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _open(self, purge_step: int | None = None) -> None:
        self._writer = self._make(str(self._folder), purge_step=purge_step)

    def _try(self, act: Callable[[], None]) -> None:
        # Errors of the writer's own thread are raised here, by its next call.
        try:
            act()
        except OSError as error:
            self._writer = None
            if not self._warned:
                self._warned = True
                then = "events are lost until a checkpoint finds that it can be written"
                self._warn(f"warning: {self._folder}: {error.strerror}; {then}")


class Screen(Console):
    """A console that goes quiet when it cannot print any more: a closed pipe, a full disk."""

    def say(self, *text: RenderableType, **how: Any) -> None:
        """Print."""
        try:
            self.print(*text, **how)
        except OSError as error:
            self._silence(error.strerror or str(error))

    def on_broken_pipe(self) -> None:
        self._silence("nobody reads it any more")

    def _silence(self, why: str) -> None:
        self.quiet = True
        # The stream's buffer would be written again, and fail, when the process ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        # Standard error may be closed too.
        with suppress(OSError):
            print(f"warning: standard output: {why}; the run goes on", file=sys.stderr, flush=True)

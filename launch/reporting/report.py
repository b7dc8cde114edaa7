"""What a run reports: a progress line, TensorBoard scalars, ``metrics.jsonl`` and a summary."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.reporting.logs import Board, MetricsFile, Screen
from launch.settings import Settings


class Report:
    """Rank 0 writes; on other ranks every method does nothing.

    On a terminal one live line shows the latest step; otherwise each logged step prints a line.
    """

    def __init__(self, settings: Settings, folder: Path, *, active: bool, first_step: int) -> None:
        self.active = active
        self.unit = "token"
        self.console = Screen(highlight=False)
        if not active:
            return
        board = settings.run.tensorboard
        self._board = Board(folder / "tensorboard", first_step, self.line) if board else None
        self._metrics = MetricsFile(folder / "metrics.jsonl", first_step, self.line)
        self._live = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            # Drawing takes time from the run where cores are few.
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )
        self._task = self._live.add_task("", total=settings.run.steps, completed=first_step)

    def __enter__(self) -> Report:
        if self.active:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.active:
            self._live.stop()
            self._metrics.close()
            if self._board is not None:
                self._board.close()

    def line(self, text: str) -> None:
        """Print a line above the live one."""
        if self.active:
            self.console.say(text, markup=False, soft_wrap=True)

    def step(
        self, values: Mapping[str, float], received: Mapping[str, int], slowest_host: str = ""
    ) -> None:
        """Log one optimizer step.

        Args:
            values: ``step``, ``mean_loss`` (since the last call), ``grad_norm``,
                ``tokens_per_second``, ``throughput(tps)``, and whatever else is a number.
            received: bytes moved in the step, over all layers and ranks, by kind.
            slowest_host: the machine of the rank that computes longest, if that is known.
        """
        if not self.active:
            return
        host = {"own_time/slowest_host": slowest_host} if slowest_host else {}
        self._write({**values, **host, "bytes": dict(received)})
        step = int(values["step"])
        self._scalars(step, {k: v for k, v in values.items() if k != "step"})
        self._scalars(step, {f"bytes/{kind}": size for kind, size in received.items()})
        share = f"  MFU {values['mfu(%)']:.1f}%" if "mfu(%)" in values else ""
        text = (
            f"loss {values['mean_loss']:.4f}  norm {values['grad_norm']:.2f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s "
            f"({values['throughput(tps)']:,.0f} a rank)  {values['tflops']:,.3g} TFLOP/s{share}  "
            f"{show_bytes(sum(received.values()))}"
        )
        self._live.update(self._task, completed=step, description=text)
        if not self.console.is_terminal:
            self.line(f"step {step:>6}  {text}")

    def skipped(self, step: int, why: str, in_a_row: int) -> None:
        """Log a step without an update."""
        if self.active:
            self._write({"step": step, "skipped": why, "in_a_row": in_a_row})
            self._scalars(step, {"skipped_in_a_row": in_a_row})
            self.line(f"step {step:>6}  update skipped: {why} ({in_a_row} in a row)")

    def not_saved(self, step: int, why: str, again: int) -> None:
        """Log that a checkpoint could not be written.

        Args:
            again: the step after which it is tried again.
        """
        if self.active:
            self._write({"step": step, "not_saved": why})
            self.line(f"step {step:>6}  warning: {why}; it is tried again after step {again}")

    def slow_rank(self, step: int, rank: int, host: str, seconds: float, median: float) -> None:
        """Log that a rank computes slower than the others, which wait for it.

        Args:
            seconds, median: its own and the median rank's, a step in the parts that are timed.
        """
        if self.active:
            times = seconds / median
            self._write({"step": step, "slow_rank": rank, "host": host, "times": times})
            self.line(
                f"step {step:>6}  warning: rank {rank} on {host} computes {times:.2f} times as "
                f"long as the median rank ({1e3 * seconds:.2f} ms a step beside "
                f"{1e3 * median:.2f} in the parts that are timed); all ranks wait for it"
            )

    def validation(self, step: int, loss: float, unigram: float) -> None:
        """Log a validation; one that was logged before it was resumed is only printed."""
        if self.active:
            if not self.has_validation(step):
                self._write({"step": step, "validation_loss": loss, "unigram_loss": unigram})
                self._scalars(step, {"validation_loss": loss})
                self.sync()
            self.line(
                f"step {step:>6}  validation {loss:.4f} nats/{self.unit}  (unigram {unigram:.4f})"
            )

    def has_validation(self, step: int) -> bool:
        """Whether the validation of a step was logged before this run resumed; on rank 0."""
        return self.active and step in self._metrics.validated

    def sync(self) -> None:
        """Sync all logs to the disk, as before a checkpoint: a run that resumes from it does not
        log those steps again."""
        if self.active:
            self._metrics.sync()
            if self._board is not None:
                self._board.flush()

    def summary(self, rows: Mapping[str, str]) -> None:
        """Print the table that ends a run."""
        if self.active:
            table = Table(show_header=False, box=None, pad_edge=False)
            for name, value in rows.items():
                table.add_row(name, value)
            self.console.say(table)

    def _write(self, record: dict[str, Any]) -> None:
        # JSON has no number that is not finite.
        plain = {key: None if _is_odd(value) else value for key, value in record.items()}
        self._metrics.write({**plain, "time": time.time()})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            self._board.scalars(step, {k: v for k, v in values.items() if not _is_odd(v)})


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def show_bytes(size: float) -> str:
    """1536 as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

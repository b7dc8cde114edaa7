"""Turn text into a folder of tokens to train from, once for all runs.

    python launch/prepare_data.py INPUT [INPUT ...] --out FOLDER [--tokenizer tokenizer.json]

reads text, JSONL and Parquet files and folders of them, tokenises their documents in parallel and
writes FOLDER (launch/data/prepared.py says what is in it). A run reads it by
``--data.source prepared --data.path FOLDER``. The same line again goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import signal
from collections.abc import Sequence
from types import TracebackType

import tyro
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from launch.data.preparing import PrepareOptions, Progress, Result, prepare
from launch.processes.mistakes import end, read_once
from launch.processes.stopping import STOPPED
from launch.reporting.logs import Screen


class Display:
    """Shows how far a preparation is: a live line on a terminal, otherwise a line every tenth."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._screen = Screen(highlight=False)
        self._tenths, self._note = 0, ""
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._screen,
            refresh_per_second=2,
            disable=not self._screen.is_terminal,
        )
        self._task = self._bar.add_task("inputs", total=None)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Print a line above the live one."""
        self._screen.say(text, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        self.progress = progress
        if progress.note != self._note:
            self._note = progress.note
            self.line(progress.note)
        if not progress.total:
            return
        done = f"shard {progress.shards_done}/{progress.shards}"
        self._bar.update(
            self._task, description=done, total=progress.total, completed=progress.done
        )
        tenths = 10 * progress.done // progress.total
        if tenths > self._tenths and not self._screen.is_terminal:
            self._tenths = tenths
            self.line(f"{done}  {progress.done:,} of {progress.total:,} bytes of text")


def summarise(result: Result, options: PrepareOptions) -> list[str]:
    """What the folder holds, in lines."""
    metadata = result.metadata
    lines = [f"skipped: {text}" for text in result.told]
    if result.broken > len(result.told):
        lines.append(f"skipped: {result.broken - len(result.told):,} more")
    (documents, tokens), (held, held_tokens) = (
        metadata.size_of("training"),
        metadata.size_of("held_out"),
    )
    lines.append(
        f"{options.out}: {documents:,} documents to train on ({tokens:,} tokens), "
        f"{held:,} held out ({held_tokens:,} tokens); vocabulary {metadata.vocab_size:,}; "
        f"left out: {result.broken:,} broken records, {result.empty:,} empty documents; "
        f"digest {metadata.digest[:16]}"
    )
    if options.held_out and documents and not held:
        lines.append(
            f"{options.out}: no document is held out, and runs need some to validate: prepare "
            f"another folder with --held-out above {options.held_out:g}, or others for "
            "data.validation_path"
        )
    return lines


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    display = Display()
    try:
        options = read_once(lambda: tyro.cli(PrepareOptions, args=arguments))
        # As ^C: what is finished is kept.
        signal.signal(signal.SIGTERM, _stop)
        with display:
            result = prepare(options, display.show)
            for line in summarise(result, options):
                display.line(line)
    except (OSError, ValueError) as error:
        end("prepare_data.py", error)
    except KeyboardInterrupt:
        done = display.progress
        kept = f"{done.shards_done} of {done.shards} shards are finished"
        print(f"prepare_data.py: stopped; {kept}, the same line goes on", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()

"""What the programs share that time the whole attention beside dense attention."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from launch.bench.meter import Meter
from launch.bench.operators import dense_rows, line, measure, shape_of, triton_version, where
from launch.bench.options import DTYPES, Sizes
from launch.bench.problems import problems
from launch.bench.stream import Stream
from launch.bench.table import Row, write_csv, write_numbers
from launch.bench.work import Peaks

RowsOf = Callable[[Stream, Row, Peaks, Meter, list[str]], Iterator[Row]]
"""Stream, a row to fill in, peaks, clock, messages on wrong results -> rows."""


def beside_dense(
    stream: Stream, blank: Row, peaks: Peaks, meter: Meter, wrong: list[str]
) -> Iterator[Row]:
    """Dense attention by the first backend that has these shapes, and the whole attention.

    A wrong result is not timed; ``wrong`` gets a message.
    """
    yield from itertools.islice(dense_rows(stream, blank, peaks, meter), 1)
    (ours,) = problems(stream, torch.empty(0), {}, ("whole",))
    verdict = ours.verdict()
    if not verdict.right:
        what = f"{blank.shape.title()}, {stream.length} tokens"
        wrong.append(f"ours, {what}: error {verdict.error:.1e}, at most {verdict.limit:.1e}")
        return
    row = replace(blank, operator="whole", choices="random")
    row = replace(row, error=verdict.error, limit=verdict.limit)
    yield measure(row, ours.inputs, ours.run, ours.flops, peaks, meter)


def compare_streams(
    variants: Iterable[tuple[Sizes, int]], rows_of: RowsOf, meter: Meter, csv: Path | None
) -> tuple[list[Row], list[str]]:
    """All rows, and messages on wrong results. Prints each row and writes it to ``csv``.

    Args:
        variants: options and tokens of each stream, all of one dtype.
    """
    rows: list[Row] = []
    wrong: list[str] = []
    peaks: Peaks | None = None
    for options, length in variants:
        if peaks is None:
            peaks = meter.peaks(DTYPES[options.dtype])
            print(f"{meter.gpu}, torch {torch.__version__}, triton {triton_version()}")
        torch.manual_seed(0)
        stream = Stream(options, length, meter.device)
        shape = shape_of(options, meter.gpu)
        if not rows or rows[-1].shape != shape:
            print(shape.title(), flush=True)
        blank = Row("", length, "", 0.0, None, shape, **where())
        for row in rows_of(stream, blank, peaks, meter, wrong):
            rows.append(row)
            print(line(row), flush=True)
            if csv is not None:
                write_csv(csv, rows)
        del stream  # Before the next is drawn.
        torch.cuda.empty_cache()
    return rows, wrong


def run_program(
    program: str,
    options: Sizes,
    compared: Callable[[Meter], tuple[list[Row], list[str]]],
    markdown: Callable[[Sequence[Row]], str],
    docs: Path | None,
) -> None:
    """Print the tables of what was compared and put them into ``docs``.

    Exits with status 1 and one message where there is no GPU, an option is refused, or a result
    was wrong.
    """
    if not torch.cuda.is_available():
        sys.exit(f"{program}: the machine must have an NVIDIA GPU, got no CUDA device")
    try:
        rows, wrong = compared(Meter(options.repeats_ms))
    except (ValueError, ImportError) as error:
        sys.exit(f"{program}: {error}")
    if rows:
        print(f"\n{markdown(rows)}")
        if docs is not None and options.csv is not None:
            write_numbers(docs, markdown(rows), options.csv.name)
    if wrong:
        sys.exit(f"{program}: wrong results, not timed:\n  " + "\n  ".join(wrong))

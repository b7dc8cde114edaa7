"""Time the attention's operators and the whole attention on one GPU, beside dense attention.

    python launch/bench/operators.py --lengths 8192 32768 65536 --csv bench.csv --plot bench.png

Each result is checked before it is timed; a wrong one is not timed, and the program ends with
status 1. Dense attention runs in the same process on queries, keys and values of the same shapes:
cuDNN's and FlashAttention's kernels as torch has them. docs/benchmarks.md says what is counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import functools
import importlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from launch.bench.meter import Meter
from launch.bench.options import DTYPES, Options, Sizes, random_choices, recorded_choices
from launch.bench.problems import problems
from launch.bench.stream import Stream
from launch.bench.table import DENSE, R, Row, Shape, draw_plot, markdown, with_ratios, write_csv
from launch.bench.work import Flops, Peaks, fewest_bytes

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def measure(
    row: R,
    inputs: Sequence[Tensor],
    run: Callable[..., Tensor],
    flops: Flops,
    peaks: Peaks,
    meter: Meter,
) -> R:
    """The row with times, rates and memory of ``run`` on ``inputs``."""
    out = run(*inputs)
    grad = torch.randn_like(out) if out.requires_grad else None
    forward_bytes, backward_bytes = fewest_bytes(inputs, out)
    del out
    with torch.no_grad():
        forward = meter.milliseconds(lambda: run(*inputs))
    floor, bound = peaks.floor_ms(flops.forward, forward_bytes)
    row = replace(
        row,
        forward_ms=forward,
        forward_tflops=flops.forward / forward / 1e9 if flops.forward else None,
        forward_gbs=forward_bytes / forward / 1e6,
        bound=bound,
        forward_of_floor=floor / forward,
        matmul_tflops=peaks.tflops,
        copy_tbs=peaks.tbytes,
    )
    if grad is None:
        return replace(row, peak_gib=meter.memory_gib(lambda: run(*inputs)))
    peak = meter.memory_gib(lambda: torch.autograd.grad(run(*inputs), inputs, grad))
    backward = backward_ms(meter, run(*inputs), inputs, grad)
    return replace(
        row,
        backward_ms=backward,
        backward_tflops=flops.backward / backward / 1e9 if flops.backward else None,
        backward_gbs=backward_bytes / backward / 1e6,
        backward_of_floor=peaks.floor_ms(flops.backward, backward_bytes)[0] / backward,
        peak_gib=peak,
    )


def backward_ms(meter: Meter, out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> float:
    """Milliseconds of one backward from ``out`` to the inputs."""
    return meter.milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


def dense_rows(stream: Stream, blank: Row, peaks: Peaks, meter: Meter) -> Iterator[Row]:
    """Causal dense attention of each backend on the same documents, as a batch."""
    options, size = stream.options, stream.size

    def draw(heads: int, width: int) -> Tensor:
        return stream.draw(options.documents, size, heads, width)

    q = draw(options.heads, options.head_dim)
    k, v = draw(options.kv_heads, options.head_dim), draw(options.kv_heads, options.v_head_dim)
    for name, backend in BACKENDS.items():

        def run(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        row = replace(blank, operator=f"dense_{name}")
        try:
            flops = stream.flops["dense"]
            yield measure(row, (q, k, v), run, flops, peaks, meter)
        except RuntimeError as error:  # It has no kernel for these shapes, or no memory.
            reason = str(error).splitlines()[0]
            print(f"{stream.length:>8} dense {DENSE[name]}: not measured ({reason})", flush=True)


def bench(options: Options, meter: Meter) -> tuple[list[Row], list[str]]:
    """All rows, and messages on wrong results, which are not timed. Prints and writes each row."""
    # Before anything is timed, so that a file that does not match costs no time.
    recorded = {
        length: recorded_choices(options, length) if options.choices is not None else {}
        for length in options.lengths
    }
    peaks = meter.peaks(DTYPES[options.dtype])
    print(
        f"{meter.gpu}, torch {torch.__version__}, triton {triton_version()}, "
        f"commit {commit()}; {peaks.tflops:.0f} TFLOP/s of matmul, {peaks.tbytes:.2f} TB/s of copy",
        flush=True,
    )
    rows: list[Row] = []
    wrong: list[str] = []

    def keep(row: Row) -> None:
        rows.append(row)
        filled = with_ratios(rows)
        print(line(filled[-1]), flush=True)
        if options.csv is not None:
            write_csv(options.csv, filled)

    for length in options.lengths:
        stream = Stream(options, length, meter.device)
        wrong += bench_length(stream, recorded[length], peaks, meter, keep)
        del stream  # Before the next is drawn.
        torch.cuda.empty_cache()
    return with_ratios(rows), wrong


def bench_length(
    stream: Stream,
    recorded: dict[int, Tensor],
    peaks: Peaks,
    meter: Meter,
    keep: Callable[[Row], None],
) -> list[str]:
    """Calls ``keep`` with each row of one length; returns messages on wrong results."""
    options, length = stream.options, stream.length
    assert isinstance(options, Options)
    torch.manual_seed(0)
    wrong = []
    blank = Row("", length, "", 0.0, None, shape_of(options, meter.gpu), **where())
    if options.dense:
        for row in dense_rows(stream, blank, peaks, meter):
            keep(row)
    random = random_choices(length, options.config, stream.device, options.documents)
    name = options.choices.stem if options.choices is not None else ""
    labelled = {f"{name} layer {i}": x.to(stream.device) for i, x in recorded.items()}
    for problem in problems(stream, random, labelled, options.only):
        torch.cuda.empty_cache()
        verdict = problem.verdict()
        if not verdict.right:
            what = f"{problem.name} {problem.choices}".rstrip()
            error, limit = f"{verdict.error:.1e}", f"{verdict.limit:.1e}"
            wrong.append(f"{what} at {length}: error {error}, at most {limit} is right")
            print(f"{length:>8} WRONG, not timed: {wrong[-1]}", flush=True)
            continue
        row = replace(
            blank,
            operator=problem.name,
            choices=problem.choices,
            error=verdict.error,
            limit=verdict.limit,
        )
        inputs, run, flops = problem.inputs, problem.run, problem.flops
        keep(measure(row, inputs, run, flops, peaks, meter))
    return wrong


def line(row: Row) -> str:
    """The line that is printed when a row has been measured."""

    def pair(first: float | None, second: float | None, width: int, digits: int) -> str:
        texts = (
            f"{x:{width}.{digits}f}" if x is not None else " " * width for x in (first, second)
        )
        return " ".join(texts)

    parts = [
        f"{row.length:>8} {row.operator:<21} {row.choices:<24}",
        f"{pair(row.forward_ms, row.backward_ms, 9, 3)} ms",
        f"{pair(row.forward_tflops, row.backward_tflops, 5, 0)} TFLOP/s",
        f"{pair(*_percents(row), 4, 0)} % of floor ({row.bound})",
        f"{row.peak_gib:7.2f} GiB" if row.peak_gib is not None else "",
    ]
    if row.bound == "bytes":
        parts.append(f"{pair(row.forward_gbs, row.backward_gbs, 5, 0)} GB/s")
    if row.operator == "whole":
        for name, text in DENSE.items():
            ratio = (getattr(row, f"forward_over_{name}"), getattr(row, f"both_over_{name}"))
            if ratio[0] is not None:
                parts.append(f"{pair(*ratio, 5, 2)} x {text}")
    if row.error is not None:
        parts.append(f"error {row.error:.1e}")
    return "  ".join(part for part in parts if part)


def _percents(row: Row) -> tuple[float | None, float | None]:
    shares = (row.forward_of_floor, row.backward_of_floor)
    first, second = (None if x is None else 100 * x for x in shares)
    return first, second


def shape_of(options: Sizes, gpu: str) -> Shape:
    """The shape of a row; rows of equal shapes are compared."""
    names = [field.name for field in fields(Shape) if field.name != "gpu"]
    return Shape(gpu=gpu, **{name: getattr(options, name) for name in names})


def where() -> dict[str, Any]:
    """Columns that say what was measured, and when."""
    return {
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def triton_version() -> str:
    """The version of triton, or "none": the PyTorch backend does not need it."""
    if find_spec("triton") is None:
        return "none"
    return str(importlib.import_module("triton").__version__)


@functools.cache
def commit() -> str:
    """The checkout's commit, with -dirty where files differ from it, or "unknown"."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, args=arguments)
    if not torch.cuda.is_available():
        sys.exit("operators.py: the machine must have an NVIDIA GPU, got no CUDA device")
    try:
        rows, wrong = bench(options, Meter(options.repeats_ms))
    except ValueError as error:
        sys.exit(f"operators.py: {error}")
    if rows:
        print(f"\n{markdown(rows)}")
    if options.plot is not None and rows:
        draw_plot(options.plot, rows)
    if wrong:
        sys.exit("operators.py: wrong results, not timed:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()

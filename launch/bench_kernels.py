"""Time the attention's operators and the whole attention on one GPU, beside dense attention.

    python launch/bench_kernels.py --lengths 8192 32768 65536 --csv bench.csv --plot bench.png

Each result is checked before it is timed, and a wrong one is not timed. Dense attention runs in the
same process on the same queries, keys and values: cuDNN's and FlashAttention's kernels as torch has
them. A ratio is dense time over ours, so above 1 is faster than dense. TFLOP/s count useful work:
matrix products over the (query, key) pairs that the definition asks for, 2 (Dk + Dv) a pair and
head forward, 2.5 times that backward; scores 2 Dk.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench_problems import Options, Problem, problems, random_choices, recorded_choices

SAMPLED = 192
"""Queries whose results are compared with float64; gradients are those of their outputs."""
LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Norm of the difference over the norm of the float64 result."""


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds, GiB over inputs, TFLOP/s; ratio of dense over ours."""

    operator: str
    length: int
    choices: str
    forward_ms: float
    backward_ms: float
    forward_tflops: float
    backward_tflops: float
    peak_gib: float
    forward_over_cudnn: float
    both_over_cudnn: float
    error: float


def error_of(problem: Problem) -> float:
    """Largest relative error of the sampled outputs and of all gradients of their sum."""
    if problem.reference is None:
        return 0.0
    length = problem.inputs[0].shape[0]
    device = problem.inputs[0].device
    rows = torch.randperm(length, device=device)[: min(SAMPLED, length)].sort().values
    out = problem.run(*problem.inputs)
    exact_inputs = [x.detach().double().requires_grad_() for x in problem.inputs]
    exact = problem.reference(rows, *exact_inputs)
    weight = torch.randn_like(exact)
    grad = torch.zeros_like(out)
    grad[rows] = weight.to(out.dtype)
    found = [out[rows], *torch.autograd.grad(out, problem.inputs, grad)]
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, weight.to(out.dtype).double())]
    errors = [
        float((a.double() - b).detach().norm() / b.detach().norm().clamp(min=1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors)


def milliseconds(function: Callable[[], Any], repeats_ms: int) -> float:
    """Median over repeats, by device events, after warming up."""
    times = triton.testing.do_bench(function, warmup=50, rep=repeats_ms, return_mode="all")
    return statistics.median(times)


def measure(problem: Problem, options: Options) -> tuple[float, float, float]:
    """Forward ms, backward ms, and peak GiB of one forward and backward over the inputs."""
    with torch.no_grad():
        forward = milliseconds(lambda: problem.run(*problem.inputs), options.repeats_ms)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if not problem.differentiable:
        with torch.no_grad():
            problem.run(*problem.inputs)
        return forward, 0.0, (torch.cuda.max_memory_allocated() - before) / 2**30
    out = problem.run(*problem.inputs)
    grad = torch.randn_like(out)
    torch.autograd.grad(out, problem.inputs, grad, retain_graph=True)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    backward = milliseconds(
        lambda: torch.autograd.grad(out, problem.inputs, grad, retain_graph=True),
        options.repeats_ms,
    )
    return forward, backward, peak


def dense_times(options: Options, length: int, backend: SDPBackend) -> tuple[float, float]:
    """Forward and backward ms of causal dense attention on the same shapes."""
    dtype = getattr(torch, options.dtype)

    def draw(heads: int, width: int) -> Tensor:
        x = torch.randn(1, length, heads, width, dtype=dtype, device="cuda", requires_grad=True)
        return x

    q = draw(options.heads, options.head_dim)
    k, v = draw(options.kv_heads, options.head_dim), draw(options.kv_heads, options.v_head_dim)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return measure(Problem([q, k, v], run, None, 0.0), options)[:2]


def bench(options: Options) -> list[Row]:
    """All rows, printed as they come."""
    rows = []
    limit = LARGEST_ERROR[getattr(torch, options.dtype)]
    for length in options.lengths:
        dense = (0.0, 0.0)
        if options.dense:
            for name, backend in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ):
                dense = dense_times(options, length, backend)
                print(
                    f"{length:>8} dense {name:<21} {dense[0]:9.2f} {dense[1]:9.2f} ms", flush=True
                )
        choices, kind = random_choices(length, options.config, torch.device("cuda")), "random"
        if options.choices is not None:
            device = torch.device("cuda")
            choices, kind = recorded_choices(options, length, device), options.choices.name
        for name, problem in problems(options, length, choices):
            if options.only and name not in options.only:
                continue
            error = error_of(problem)
            if not error < limit:
                sys.exit(f"{name} at {length}: relative error {error:.1e} passes {limit:.0e}")
            forward, backward, peak = measure(problem, options)
            row = Row(
                name,
                length,
                kind if name == "selected_attention" else "",
                forward,
                backward,
                problem.flops / forward / 1e9,
                2.5 * problem.flops / backward / 1e9 if backward else 0.0,
                peak,
                dense[0] / forward,
                sum(dense) / (forward + backward),
                error,
            )
            rows.append(row)
            print(
                f"{length:>8} {name:<22} {kind if row.choices else '':<8} "
                f"{forward:9.2f} {backward:9.2f} ms {row.forward_tflops:6.0f} "
                f"{row.backward_tflops:6.0f} TFLOP/s {peak:6.2f} GiB "
                f"{row.forward_over_cudnn:6.2f}x {row.both_over_cudnn:6.2f}x  {error:.1e}",
                flush=True,
            )
            torch.cuda.empty_cache()
    return rows


def commit() -> str:
    """The checkout's commit, or "unknown"."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_csv(path: Path, rows: list[Row]) -> None:
    """The table with where it was measured."""
    where = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *where])
        writer.writeheader()
        writer.writerows(asdict(row) | where for row in rows)


def draw_plot(path: Path, rows: list[Row]) -> None:
    """Forward and backward time of the whole attention against length, beside dense."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    whole = [row for row in rows if row.operator == "whole"]
    lengths = [row.length for row in whole]
    both = [row.forward_ms + row.backward_ms for row in whole]
    axes.plot(lengths, [row.forward_ms for row in whole], "o-", label="forward")
    axes.plot(lengths, both, "o-", label="forward + backward")
    dense = [row.both_over_cudnn * ms for row, ms in zip(whole, both, strict=True)]
    axes.plot(lengths, dense, "s--", label="dense (cuDNN), forward + backward")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    options = tyro.cli(Options)
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py: needs a CUDA device")
    rows = bench(options)
    if options.csv is not None and rows:
        write_csv(options.csv, rows)
    if options.plot is not None and rows:
        draw_plot(options.plot, rows)


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa_dist import BRANCHES, BlockCompressor, NSAConfig, native_sparse_attention
from nsa_kernels import QuerySegments, get_backend

SAMPLED = 192
"""Queries whose results are compared with float64; gradients are those of their outputs."""
LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Norm of the difference over the norm of the float64 result."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        lengths: tokens of the one document.
        heads, kv_heads, head_dim, v_head_dim: H, G, Dk, Dv.
        compress_block, compress_stride, select_block, num_selected, window: as of NSAConfig.
        dtype: bfloat16, float16 or float32.
        backend: as of the layers.
        only: operators to run, by name; all when empty.
        choices: npz file with `selected` [layer, group, token, n]; random choices when None.
        layer: layer of that file.
        dense: time dense attention too.
        repeats_ms: time spent on each measurement.
        csv: file to write the table to.
        plot: file to draw time against length to.
    """

    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128
    v_head_dim: int = 128
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    window: int = 512
    dtype: str = "bfloat16"
    backend: str = "triton"
    only: tuple[str, ...] = ()
    choices: Path | None = None
    layer: int = 0
    dense: bool = True
    repeats_ms: int = 200
    csv: Path | None = None
    plot: Path | None = None

    @property
    def config(self) -> NSAConfig:
        return NSAConfig(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.v_head_dim,
            compress_block=self.compress_block,
            compress_stride=self.compress_stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            window=self.window,
        )


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


@dataclass
class Problem:
    """One operator on one length.

    Args:
        inputs: what gradients are taken of, in the order of ``run``'s arguments.
        run: inputs -> output [S, H, Dv] (or any tensor).
        reference: float64 inputs and rows -> output of those rows; None where it is not checked.
        flops: useful, forward.
    """

    inputs: list[Tensor]
    run: Callable[..., Any]
    reference: Callable[..., Tensor] | None
    flops: float
    differentiable: bool = True


def random_choices(length: int, config: NSAConfig, device: torch.device) -> Tensor:
    """Forced blocks and others at random, int32 [S, G, n], as ``select_blocks`` gives them."""
    blocks = -(-length // config.select_block)
    index = torch.arange(blocks, device=device)
    out = torch.empty(
        length, config.num_kv_heads, config.num_selected, dtype=torch.int32, device=device
    )
    for start in range(0, length, 4096):
        t = torch.arange(start, min(start + 4096, length), device=device)
        own = (t // config.select_block)[:, None, None]
        score = torch.rand(len(t), config.num_kv_heads, blocks, device=device)
        forced = (index < config.num_init_blocks) | (index > own - config.num_local_blocks)
        score = score.masked_fill(forced, 2.0).masked_fill(index > own, -1.0)
        value, best = score.topk(min(config.num_selected, blocks), dim=-1)
        best = best.masked_fill(value < 0, blocks).sort(-1).values
        best = best.masked_fill(best == blocks, -1)
        out[start : start + len(t)] = torch.nn.functional.pad(
            best, (0, config.num_selected - best.shape[-1]), value=-1
        )
    return out


def recorded_choices(options: Options, length: int, device: torch.device) -> Tensor:
    """Choices of a trained model, from ``options.choices``.

    Raises:
        ValueError: where the file's tokens, groups or n are not the run's.
    """
    import numpy

    assert options.choices is not None
    selected = torch.from_numpy(numpy.load(options.choices)["selected"][options.layer].copy())
    config = options.config
    expected = (config.num_kv_heads, length, config.num_selected)
    if tuple(selected.shape) != expected:
        raise ValueError(
            f"choices: found [group, token, n] = {list(selected.shape)} in {options.choices}; "
            f"{list(expected)} (kv_heads, lengths, num_selected of the run) works"
        )
    return selected.to(device, torch.int32).transpose(0, 1).contiguous()


def problems(options: Options, length: int, choices: Tensor) -> Iterator[tuple[str, Problem]]:
    """Every operator on one document of ``length`` tokens."""
    config, device = options.config, torch.device("cuda")
    dtype = getattr(torch, options.dtype)
    ops, exact = get_backend(options.backend), get_backend("pytorch")
    heads, groups, dk, dv = options.heads, options.kv_heads, options.head_dim, options.v_head_dim
    scale = config.softmax_scale
    block, stride, select = config.compress_block, config.compress_stride, config.select_block

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    segments = QuerySegments.from_rows([(0, length, 0, 0, 0, 0)], device)
    q, k, v = draw(length, heads, dk), draw(length, groups, dk), draw(length, groups, dv)
    blocks = max(0, (length - block) // stride + 1)
    k_cmp, v_cmp = draw(blocks, groups, dk), draw(blocks, groups, dv)
    t = torch.arange(length, dtype=torch.float64)
    seen = ((t - block + 1).div(stride, rounding_mode="floor") + 1).clamp(min=0).sum().item()
    in_window = (t + 1).clamp(max=config.window).sum().item()
    tokens = torch.arange(length, device=device)[:, None, None]
    in_blocks = (tokens + 1 - choices * select).clamp(0, select) * (choices >= 0)
    chosen = in_blocks.sum().item() / groups
    pair = 2.0 * heads * (dk + dv)

    band: dict[str, Any] = {"block": block, "stride": stride, "scale": scale}
    yield (
        "compressed_attention",
        Problem(
            [q, k_cmp, v_cmp],
            lambda q, k, v: ops.compressed_attention(q, k, v, segments, **band)[0],
            lambda rows, q, k, v: exact.compressed_attention(
                q[rows], k, v, _segments_of(rows, device), **band
            )[0],
            seen * pair,
        ),
    )
    with torch.no_grad():
        lse = ops.compressed_attention(q, k_cmp, v_cmp, segments, **band)[1]
    yield (
        "block_selection",
        Problem(
            [q, k_cmp],
            lambda q, k: ops.select_blocks(
                q,
                k,
                lse,
                segments,
                **band,
                select_block=select,
                num_selected=config.num_selected,
                num_init_blocks=config.num_init_blocks,
                num_local_blocks=config.num_local_blocks,
            ),
            None,
            seen * 2.0 * heads * dk,
            differentiable=False,
        ),
    )
    starts = torch.arange(0, length, select, device=device)
    lengths = (length - starts).clamp(max=select)
    table = starts.expand(groups, -1).contiguous()
    yield (
        "selected_attention",
        Problem(
            [q, k, v],
            lambda q, k, v: ops.selected_attention(
                q,
                k,
                v,
                k[:0],
                v[:0],
                choices,
                table,
                lengths,
                segments,
                select_block=select,
                scale=scale,
            )[0],
            lambda rows, q, k, v: exact.selected_attention(
                q[rows],
                k,
                v,
                k[:0],
                v[:0],
                choices[rows],
                table,
                lengths,
                _segments_of(rows, device),
                select_block=select,
                scale=scale,
            )[0],
            chosen * pair,
        ),
    )
    yield (
        "window_attention",
        Problem(
            [q, k, v],
            lambda q, k, v: ops.window_attention(
                q, k, v, segments, window=config.window, scale=scale
            )[0],
            lambda rows, q, k, v: exact.window_attention(
                q[rows], k, v, _segments_of(rows, device), window=config.window, scale=scale
            )[0],
            in_window * pair,
        ),
    )
    rows_of_blocks = torch.arange(blocks, device=device) * stride
    compressor = BlockCompressor(config, dk, device=device, dtype=torch.float32)
    weights = {name: p.detach() for name, p in compressor.named_parameters()}
    hidden = config.compress_hidden or 2 * dk
    yield (
        "compression",
        Problem(
            [k],
            lambda k: ops.compress(k, rows_of_blocks, block, config.compress, weights),
            None,
            2.0 * blocks * groups * hidden * (block + 1) * dk,
        ),
    )
    gates = torch.rand(length, heads, 3, device=device, requires_grad=True)
    outputs = [draw(length, heads, dv) for _ in range(3)]
    yield (
        "combine",
        Problem(
            [*outputs, gates],
            lambda a, b, c, gates: ops.combine([a, b, c], gates),
            lambda rows, a, b, c, gates: exact.combine([x[rows] for x in (a, b, c)], gates[rows]),
            0.0,
        ),
    )
    compressors = [BlockCompressor(config, width, device=device, dtype=dtype) for width in (dk, dv)]
    keys = {b: draw(1, length, groups, dk) for b in BRANCHES}
    values = {b: draw(1, length, groups, dv) for b in BRANCHES}
    yield (
        "whole",
        Problem(
            [q, gates, *keys.values(), *values.values()],
            lambda q, gates, *kv: native_sparse_attention(
                q[None],
                dict(zip(BRANCHES, kv[:3], strict=True)),
                dict(zip(BRANCHES, kv[3:], strict=True)),
                gates[None],
                *compressors,
                config=config,
                backend=options.backend,
            ),
            None,
            (seen + chosen + in_window) * pair + seen * 2.0 * heads * dk,
        ),
    )


def _segments_of(rows: Tensor, device: torch.device) -> QuerySegments:
    """One segment a sampled row of the document."""
    return QuerySegments.from_rows(
        [(i, 1, t, 0, 0, 0) for i, t in enumerate(rows.tolist())], device
    )


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
        float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
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

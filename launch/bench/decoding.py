"""Time the attention of a step of decoding beside dense attention, in one process.

    python launch/bench/decoding.py --lengths 65536 131072 --batches 1 16 64 --csv decoding.csv

Each row of the batch has one new token behind a cache of the given length; the new token's keys are
in it, and no block becomes complete. Timed are the kernels for few queries (``few``), the operators
of training over the same cache (``operators``), and dense attention over keys and values of the
same size: torch's FlashAttention with a query a head (``dense``) and with the heads of a group as
queries (``dense_grouped``), and flash-attn's for caches where that package is installed
(``dense_flash_attn``). Unless told otherwise calls are replayed from CUDA graphs, so that the host
does not count.

Results are checked first, ours by the 2x rule against float64 and given its own choice of blocks,
dense ones by the same rule; what is wrong is not timed, and the program ends with status 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.bench.meter import Meter
from launch.bench.operators import triton_version
from launch.bench.options import DTYPES, Sizes, check_docs
from launch.bench.table import number, table, write_fields, write_numbers
from nsa_dist.attention.selectors import choose_by_compressed
from nsa_dist.checks import check
from nsa_dist.decoding.step import plan_step
from nsa_dist.plan.grid import num_blocks
from nsa_kernels import get_backend
from nsa_kernels.backend import attend_few
from nsa_kernels.reference import masked_softmax, weighted_values

CHECKED_ROWS = 2
"""Rows of a batch that are checked, the first ones: the dense code in float64 takes long."""


DENSE = ("dense", "dense_grouped", "dense_flash_attn")
NAMES = {
    "dense": "FlashAttention",
    "dense_grouped": "FlashAttention, heads as queries",
    "dense_flash_attn": "flash-attn",
    "few": "kernels for few queries",
    "operators": "training's operators",
}


@dataclass(frozen=True)
class DecodingOptions(Sizes):
    """Time the attention of a step of decoding beside dense attention.

    Args:
        lengths: tokens of each row's cache, with the new one.
        batches: rows of the batch, a run for each.
        graphs: replay calls from CUDA graphs.
        docs: document that gets the table, between its marks for the file of ``csv``.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    lengths: tuple[int, ...] = (8192, 32768, 65536, 131072)
    batches: tuple[int, ...] = (1, 16, 64)
    independent_kv: bool = False
    graphs: bool = True
    docs: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.batches), "batches", self.batches, "one batch size or more")
        for batch in self.batches:
            check(batch > 0, "batches", batch, "at least 1")
        check(self.documents == 1, "documents", self.documents, "1: a document for each row")
        check(not self.independent_kv, "independent_kv", True, "False: one cache, as dense has")
        check(self.compress == "mlp", "compress", self.compress, "left out: nothing is compressed")
        check(self.data == "random", "data", self.data, "random")
        check_docs(self.docs, self.csv)


@dataclass(frozen=True)
class Row:
    """One measurement: method, milliseconds of a call, the error and what it may be."""

    method: str
    length: int
    batch: int
    heads: int
    kv_heads: int
    dtype: str
    graph: bool
    milliseconds: float
    error: float
    limit: float
    gpu: str


class Problem:
    """A cache with rows of equal length, and the queries of one step."""

    def __init__(self, options: DecodingOptions, length: int, batch: int, device: Any) -> None:
        self.options, self.length, self.batch = options, length, batch
        self.config = config = options.config
        dtype, groups = DTYPES[options.dtype], config.num_kv_heads
        generator = torch.Generator(device).manual_seed(length + batch)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.q = normal(batch, config.num_heads, config.head_dim)
        self.k = normal(batch, length, groups, config.head_dim)
        self.v = normal(batch, length, groups, config.value_dim)
        blocks = num_blocks(length, config)
        self.k_cmp = normal(batch, blocks, groups, config.head_dim)
        self.v_cmp = normal(batch, blocks, groups, config.value_dim)
        self.gates = torch.rand(batch, config.num_heads, 3, generator=generator, device=device).to(
            dtype
        )
        self.step = plan_step(config, (0,) * batch, length - 1, 1, length, torch.device(device))
        self.ops = get_backend(options.backend, device)

    def few(self) -> tuple[Tensor, Tensor]:
        """Out [B, H, Dv] and the chosen blocks, of the kernels for few queries.

        Raises:
            ValueError: if the backend has none.
        """
        run, c = attend_few(self.ops), self.config
        if run is None:
            raise ValueError(
                f"backend must be one with kernels for few queries, got {self.ops.name}"
            )
        k, v = self.k.flatten(0, 1), self.v.flatten(0, 1)
        return run(
            self.q,
            {"compressed": self.k_cmp.flatten(0, 1), "selected": k, "window": k},
            {"compressed": self.v_cmp.flatten(0, 1), "selected": v, "window": v},
            self.gates,
            self.step.plan.segments,
            self.step.plan.grids["selected"].own_rows,
            branches=c.branches,
            block=c.compress_block,
            stride=c.compress_stride,
            select_block=c.select_block,
            num_selected=c.num_selected,
            num_init_blocks=c.num_init_blocks,
            num_local_blocks=c.num_local_blocks,
            window=c.window,
            scale=c.softmax_scale,
        )

    def operators(self) -> tuple[Tensor, Tensor]:
        """As ``few``, by the operators of training."""
        ops, c, plan = self.ops, self.config, self.step.plan
        k, v = self.k.flatten(0, 1), self.v.flatten(0, 1)
        compressed = (self.k_cmp.flatten(0, 1), self.v_cmp.flatten(0, 1))
        chosen = choose_by_compressed(ops, c, plan.segments, self.q, *compressed)
        assert chosen.blocks is not None and chosen.output is not None
        blocks, rows = plan.grids["selected"], plan.grids["selected"].own_rows
        selected, _ = ops.selected_attention(
            self.q,
            k,
            v,
            k[:0],
            v[:0],
            chosen.blocks,
            rows.expand(c.num_kv_heads, -1),
            blocks.lengths,
            plan.segments,
            select_block=c.select_block,
            scale=c.softmax_scale,
        )
        window, _ = ops.window_attention(
            self.q, k, v, plan.segments, window=c.window, scale=c.softmax_scale
        )
        return ops.combine([chosen.output, selected, window], self.gates), chosen.blocks

    def dense(self, backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Tensor:
        """Dense attention [B, H, Dv] to the whole cache."""
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                self.q.unsqueeze(2), k, v, scale=self.config.softmax_scale, enable_gqa=True
            ).squeeze(2)

    def dense_grouped(self, backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Tensor:
        """As ``dense``, the heads of a group being queries, which a kernel loads keys for once."""
        q = self.q.unflatten(1, (self.config.num_kv_heads, -1))
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, scale=self.config.softmax_scale)
        return out.flatten(1, 2)

    def dense_flash_attn(self) -> Tensor:
        """As ``dense``, by the package flash-attn, which splits keys over programs."""
        package, scale = importlib.import_module("flash_attn"), self.config.softmax_scale
        out: Tensor = package.flash_attn_with_kvcache(
            self.q.unsqueeze(1), self.k, self.v, softmax_scale=scale
        )
        return out.squeeze(1)

    def exact(self, row: int, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
        """One row's attention [1, H, Dv] by dense code in a dtype.

        Args:
            blocks: the chosen ones, int [G, n]; None for dense attention.
        """
        c, t = self.config, self.length - 1
        q = self.q[row : row + 1].to(dtype)
        key = torch.arange(self.length, device=q.device)
        everything = torch.ones_like(key, dtype=torch.bool)
        keys = [(self.k, self.v, everything)]
        if blocks is not None:
            chosen = (key // c.select_block == blocks.unsqueeze(-1)).any(1)
            ends = torch.arange(self.k_cmp.shape[1], device=q.device) * c.compress_stride
            keys = [
                (self.k_cmp, self.v_cmp, ends + c.compress_block - 1 <= t),
                (self.k, self.v, chosen),
                (self.k, self.v, key > t - c.window),
            ]
        total = torch.zeros_like(q[..., :1])
        for i, (k, v, mask) in enumerate(keys):
            probs, _ = masked_softmax(q, k[row].to(dtype), mask[None], c.softmax_scale)
            out = weighted_values(probs, v[row].to(dtype))
            total = total + (out if blocks is None else self.gates[row, :, i, None].to(dtype) * out)
        return total

    def error(self, out: Tensor, blocks: Tensor | None) -> tuple[float, float]:
        """The largest error of the rows that are checked, and what it may be."""
        error = plain_error = largest = 0.0
        dtype = out.dtype
        for row in range(min(self.batch, CHECKED_ROWS)):
            of_row = None if blocks is None else blocks[row]
            exact = self.exact(row, of_row, torch.float64)
            plain = self.exact(row, of_row, dtype)
            error = max(error, float((out[row].double() - exact).abs().max()))
            plain_error = max(plain_error, float((plain.double() - exact).abs().max()))
            largest = max(largest, float(exact.abs().max()))
        units = 2.0 if dtype == torch.float32 else 0.5
        return error, 2 * plain_error + units * torch.finfo(dtype).eps * largest


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of the function, which has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def methods(problem: Problem) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; dense ones first, which others are compared with."""
    found: dict[str, Callable[[], Any]] = {
        "dense": problem.dense,
        "dense_grouped": problem.dense_grouped,
    }
    if find_spec("flash_attn") is not None:
        found["dense_flash_attn"] = problem.dense_flash_attn
    return found | {"few": problem.few, "operators": problem.operators}


@torch.no_grad()
def rows_of(problem: Problem, meter: Meter, wrong: list[str]) -> Iterator[Row]:
    """A row for each method that is right; adds messages to ``wrong``."""
    options, config = problem.options, problem.config
    for name, function in methods(problem).items():
        found = function()
        out, blocks = found if isinstance(found, tuple) else (found, None)
        error, limit = problem.error(out, blocks)
        if not error <= limit:
            what = f"{problem.length} tokens, batch {problem.batch}"
            wrong.append(f"{name}, {what}: error {error:.1e}, at most {limit:.1e}")
            continue
        milliseconds = meter.milliseconds(captured(function) if options.graphs else function)
        yield Row(
            name,
            problem.length,
            problem.batch,
            config.num_heads,
            config.num_kv_heads,
            options.dtype,
            options.graphs,
            milliseconds,
            error,
            limit,
            meter.gpu,
        )


def compare(options: DecodingOptions, meter: Meter) -> tuple[list[Row], list[str]]:
    """All rows, and messages on wrong results. Prints and writes each row."""
    print(f"{meter.gpu}, torch {torch.__version__}, triton {triton_version()}", flush=True)
    rows: list[Row] = []
    wrong: list[str] = []
    for length in options.lengths:
        for batch in options.batches:
            problem = Problem(options, length, batch, meter.device)
            for row in rows_of(problem, meter, wrong):
                rows.append(row)
                times = best_dense(rows, row) / row.milliseconds
                note = "" if row.method in DENSE else f" ({times:.2f} x dense's)"
                print(f"{length} x {batch} {row.method}: {row.milliseconds:.3f} ms{note}")
            if options.csv is not None:
                write_fields(options.csv, rows)
            del problem  # Before the next is drawn.
            if meter.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows, wrong


def markdown(rows: Sequence[Row]) -> str:
    """Milliseconds of each method by cache and batch; of ours also how much faster than dense."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = []
    for length, batch in dict.fromkeys((row.length, row.batch) for row in rows):
        own = {row.method: row for row in rows if (row.length, row.batch) == (length, batch)}
        lines.append([f"{length:,}", str(batch), *(_cell(rows, own.get(x)) for x in methods)])
    first = rows[0]
    how = "replayed from CUDA graphs" if first.graph else "called by the host"
    text = f"{first.gpu}: {first.heads} heads in {first.kv_heads} groups, {first.dtype}, {how}; ms"
    return f"{text}\n\n{table(['tokens', 'rows', *(NAMES[x] for x in methods)], lines)}\n"


def _cell(rows: Sequence[Row], row: Row | None) -> str:
    if row is None:
        return ""
    time = number(row.milliseconds)
    if row.method in DENSE:
        return time
    return f"{time} ({number(best_dense(rows, row) / row.milliseconds)} x)"


def best_dense(rows: Sequence[Row], of: Row) -> float:
    """Milliseconds of the fastest dense attention on the same cache; NaN before there is one."""
    times = [
        row.milliseconds
        for row in rows
        if row.method in DENSE and (row.length, row.batch) == (of.length, of.batch)
    ]
    return min(times, default=float("nan"))


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(DecodingOptions, args=arguments)
    if not torch.cuda.is_available():
        sys.exit("decoding.py: the machine must have an NVIDIA GPU, got no CUDA device")
    try:
        rows, wrong = compare(options, Meter(options.repeats_ms))
    except ValueError as error:
        sys.exit(f"decoding.py: {error}")
    if rows:
        print(f"\n{markdown(rows)}")
        if options.docs is not None and options.csv is not None:
            write_numbers(options.docs, markdown(rows), options.csv.name)
    if wrong:
        sys.exit("decoding.py: wrong results, not timed:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()

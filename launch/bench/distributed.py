"""Time Native Sparse Attention over ranks beside dense ring attention over the same ranks.

    torchrun --nproc-per-node=2 launch/bench/distributed.py --lengths 65536 131072 --csv bench.csv

Both are one layer's attention at equal heads, widths, tokens, ranks and layout, from queries, keys
and values on, forward and backward, each rank holding its shard. Each result is checked at rows of
all ranks before it is timed; a wrong one is not timed, and the program ends with status 1.
docs/benchmarks.md says what is counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from launch.bench import balance
from launch.bench.exposed import record
from launch.bench.meter import Meter
from launch.bench.operators import measure, shape_of, where
from launch.bench.options import Sizes, check_docs
from launch.bench.over_ranks import Candidate, Shares, dense_of_head, sparse_of_head
from launch.bench.stream import Stream
from launch.bench.table import Row, described, number, pair, table, write_csv, write_numbers
from launch.bench.work import Flops
from launch.processes.mistakes import end, read_once
from launch.settings import FETCH_AGAIN
from nsa_dist import (
    BRANCHES,
    CommunicationCounter,
    get_plan,
    make_sharding,
    native_sparse_attention,
)
from nsa_dist.adapters.ring import dense_attention, get_dense_plan
from nsa_dist.checks import check
from nsa_dist.comm.counter import KINDS
from nsa_dist.comm.group import ContextGroup, context_group
from nsa_dist.config import exact_gradients_problem
from nsa_dist.plan.layout import make_layout


@dataclass(frozen=True)
class DistributedOptions(Sizes):
    """Time Native Sparse Attention over ranks beside dense ring attention over the same ranks.

    Args:
        layout: auto: zigzag, with several documents zigzag_per_document; or one by name.
        docs: document that gets the tables, between its marks for the file of ``csv``.
        trace: folder that gets a trace of rank 0 for each length: one forward and backward of
            nsa, to open in https://ui.perfetto.dev. Times of its messages by kind, and of those
            times what nothing hides, are printed, the largest of any rank.
        fetch_again: whether backward fetches blocks again: auto, always or never.
        recompute: branches that backward computes again.
        fetch: which selected blocks of other ranks are fetched: chosen, or full.
        ranks_per_node: consecutive ranks that share a node, where blocks are fetched once a node;
            0: those of each host. To try it on one machine, start each half of its ranks with
            another NCCL_HOSTID: messages between the halves then go by NCCL's network.
        dense: time dense ring attention too.
        balance: print the time and the work of each operator of nsa on each rank.
        exact_gradients: time nsa with this value of the option too, as nsa_exact, and print what
            that costs; 0: without only.
    """

    lengths: tuple[int, ...] = (65536, 131072)
    layout: Literal["auto", "contiguous", "zigzag", "zigzag_per_document"] = "auto"
    docs: Path | None = None
    trace: Path | None = None
    fetch_again: Literal["auto", "always", "never"] = "auto"
    recompute: tuple[str, ...] = ()
    fetch: Literal["chosen", "full"] = "chosen"
    ranks_per_node: int = 0
    dense: bool = True
    balance: bool = False
    exact_gradients: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_docs(self.docs, self.csv)
        must = "None or an existing folder"
        there = self.trace is None or self.trace.is_dir()
        check(there, "trace", None if self.trace is None else str(self.trace), must)
        known = all(branch in BRANCHES for branch in self.recompute)
        check(known, "recompute", self.recompute, f"a choice from {BRANCHES}")
        problem = exact_gradients_problem(self.exact_gradients, 1)
        if problem is not None:
            raise ValueError(problem)
        check(self.ranks_per_node >= 0, "ranks_per_node", self.ranks_per_node, "at least 0")

    @property
    def layout_name(self) -> str:
        """The layout, with "auto" resolved."""
        if self.layout != "auto":
            return self.layout
        return "zigzag" if self.documents == 1 else "zigzag_per_document"


@dataclass(frozen=True)
class DistributedRow(Row):
    """One measurement: times, memory and bytes are the largest of any rank.

    Args:
        operator: nsa, nsa_exact or dense_ring.
        ranks, layout: how the stream is split.
        forward_mib, backward_mib: what a rank receives.
        forward_over_ring, both_over_ring: time of dense ring attention over this one's, forward,
            and forward and backward.
    """

    ranks: int = 1
    layout: str = ""
    forward_mib: float | None = None
    backward_mib: float | None = None
    forward_over_ring: float | None = None
    both_over_ring: float | None = None


class RanksMeter(Meter):
    """A meter on every rank of a group, which all measure the same."""

    def __init__(self, budget_ms: float, context: ContextGroup) -> None:
        super().__init__(budget_ms)
        self.context = context

    def of_all(self, measured: float) -> float:
        return largest(measured, self.context)


def largest(value: float, context: ContextGroup) -> float:
    """The largest of all ranks' values; a collective."""
    found = torch.tensor([value], dtype=torch.float64, device=context.device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=context.process_group)
    return float(found)


def candidates(
    stream: Stream, layout: str, context: ContextGroup, **options_of_nsa: Any
) -> list[Callable[[], Candidate]]:
    """Dense ring attention and Native Sparse Attention on the stream, built when called.

    Args:
        options_of_nsa: ``fetch_again``, ``recompute_branches``, ``fetch`` and ``ranks_per_node``
            of the latter.
    """
    config, options, length = stream.config, stream.options, stream.length
    assert isinstance(options, DistributedOptions)
    bounds = stream.boundaries(layout)
    sharding = make_sharding(length, cu_seqlens=bounds, layout=layout, group=context)
    if sharding.padded_length != length:
        cut = make_layout(layout, context.size)
        multiple = cut.multiple * (options.documents if cut.per_document else 1)
        must = f"multiples of {multiple} with layout {layout!r} on these ranks"
        raise ValueError(f"lengths must be {must}, got {length}")
    batch: dict[str, Any] = {
        "batch": 1,
        "local_length": length // context.size,
        "cu_seqlens": bounds,
        "dtype": stream.dtype,
        "device": stream.device,
    }

    shares = Shares(stream, sharding)

    def nsa(name: str = "nsa", exact_gradients: int = 0) -> Candidate:
        counter = CommunicationCounter()
        plan = get_plan(config, layout, context, **batch, exact_gradients=exact_gradients)
        sets = len(BRANCHES) if config.independent_kv else 1

        def run(q: Tensor, gates: Tensor, *rest: Tensor, **more: Any) -> Any:
            k, v = (
                {b: x[None] for b, x in zip(BRANCHES, given, strict=True)}
                if sets > 1
                else given[0][None]
                for given in (rest[:sets], rest[sets : 2 * sets])
            )
            call: Any = native_sparse_attention  # One of two overloads, by ``more``.
            return call(
                *(q[None], k, v, gates[None], *stream.compressors),
                config=config,
                group=context,
                backend=stream.ops.name,
                plan=plan,
                communication=counter,
                exact_gradients=exact_gradients,
                **options_of_nsa,
                **more,
            )

        def attend(*inputs: Tensor) -> Tensor:
            out: Tensor = run(*inputs)
            return out[0]

        def choose(*inputs: Tensor) -> Tensor:
            chosen: Tensor = run(*inputs, return_details=True)[1].selected[0]
            return chosen

        return Candidate(
            *(name, attend, shares.of_nsa(), sharding, 2, 2 + 2 * sets),
            of_head=partial(sparse_of_head, stream),
            operators=3,  # Compression, attention and the gated sum, one after another.
            counter=counter,
            flops=stream.flops["whole"],
            stream=stream,
            choose=choose,
        )

    def dense() -> Candidate:
        counter = CommunicationCounter()
        plan = get_dense_plan(layout, context, **batch)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense_attention(
                *(q[None], k[None], v[None]), group=context, plan=plan, communication=counter
            )[0]

        return Candidate(
            *("dense_ring", attend, [shares.kept(name) for name in "qkv"], sharding, 1, 3),
            of_head=partial(dense_of_head, stream),
            operators=1,
            counter=counter,
            flops=stream.flops["dense"],
            stream=stream,
        )

    built: list[Callable[[], Candidate]] = [dense, nsa] if options.dense else [nsa]
    if options.exact_gradients:
        built.append(lambda: nsa("nsa_exact", options.exact_gradients))
    return built


def bench(
    options: DistributedOptions, context: ContextGroup, meter: Meter
) -> tuple[list[DistributedRow], list[str]]:
    """All rows, and messages on wrong results, which are not timed. Rank 0 prints and writes rows.

    Collective: every rank draws the same streams, and judges its share of the results.
    """
    rows: list[DistributedRow] = []
    wrong: list[str] = []
    is_main, layout = context.rank == 0, options.layout_name
    torch.manual_seed(0)
    peaks = meter.peaks(getattr(torch, options.dtype))
    blank = DistributedRow(
        *("", 0, "", 0.0, None),
        shape=shape_of(options, meter.gpu),
        ranks=context.size,
        layout=layout,
        **where(),
    )
    for length in options.lengths:
        torch.manual_seed(0)
        stream = Stream(options, length, meter.device)
        options_of_nsa = {
            "fetch_again": FETCH_AGAIN[options.fetch_again],
            "recompute_branches": options.recompute,
            "fetch": options.fetch,
            "ranks_per_node": options.ranks_per_node or None,
        }
        for build in candidates(stream, layout, context, **options_of_nsa):
            candidate = build()
            verdict = candidate.verdict()
            found = f"{candidate.name} at {length}: error {verdict.error:.1e}"
            if not verdict.right:
                wrong.append(f"{found}, at most {verdict.limit:.1e} is right")
                if is_main:
                    print(f"WRONG, not timed: {wrong[-1]}", flush=True)
                continue
            received = candidate.received_mib()
            row = replace(
                blank,
                operator=candidate.name,
                length=length,
                error=verdict.error,
                limit=verdict.limit,
                forward_mib=largest(received[0], context),
                backward_mib=largest(received[1], context),
            )
            share = 1 / context.size
            flops = Flops(candidate.flops.forward * share, candidate.flops.backward * share)
            rows.append(measure(row, candidate.local, candidate.attend, flops, peaks, meter))
            rows = with_ring_ratios(rows)
            if is_main:
                print(line(rows[-1]), flush=True)
                if row.operator == "nsa_exact":
                    print(cost_line(rows), flush=True)
                if options.csv is not None:
                    write_csv(options.csv, rows)
            if options.balance and row.operator == "nsa":
                print_balance(candidate, stream, layout, context, **options_of_nsa)
            if options.trace is not None and row.operator == "nsa":
                print_trace(candidate, options.trace / f"nsa-{length}.json", context)
            del candidate
            if meter.device.type == "cuda":
                torch.cuda.empty_cache()
        del stream
    return rows, wrong


def print_balance(
    candidate: Candidate, stream: Stream, layout: str, context: ContextGroup, **options: Any
) -> None:
    """Time each operator of one forward and backward; rank 0 prints. A collective."""
    found = balance.of_ranks(candidate.local, stream, layout, context, **options)
    if context.rank == 0:
        print(balance.markdown(found), flush=True)


def print_trace(candidate: Candidate, path: Path, context: ContextGroup) -> None:
    """Trace one forward and backward; rank 0 prints and writes. A collective."""

    def run() -> None:
        candidate.attend(*candidate.local).sum().backward(inputs=candidate.local)
        for x in candidate.local:
            x.grad = None

    found = record(run, path if context.rank == 0 else None)
    lines = [
        [
            kind,
            f"{largest(found.running.get(kind, 0.0), context):.3f}",
            f"{largest(found.exposed.get(kind, 0.0), context):.3f}",
        ]
        for kind in (*KINDS, "other")
    ]
    total, idle = largest(found.total, context), largest(found.idle, context)
    all_exposed = largest(sum(found.exposed.values()), context)
    if context.rank == 0:
        print(
            f"one forward and backward: {total:.2f} ms, exposed messages {all_exposed:.3f} ms "
            f"({all_exposed / total:.1%}), nothing runs {idle:.3f} ms, {found.launches} launches; "
            f"trace in {path}\n{table(['messages', 'ms', 'ms exposed'], lines)}",
            flush=True,
        )


def with_ring_ratios(rows: Sequence[DistributedRow]) -> list[DistributedRow]:
    """The rows with ratios: the time of dense ring attention over theirs."""
    rings = {
        (row.length, row.shape, row.ranks, row.layout): row
        for row in rows
        if row.operator == "dense_ring"
    }
    filled = []
    for row in rows:
        ring = rings.get((row.length, row.shape, row.ranks, row.layout))
        if ring is not None and row.operator != "dense_ring":
            row = replace(
                row,
                forward_over_ring=ring.forward_ms / row.forward_ms,
                both_over_ring=ring.both_ms / row.both_ms,
            )
        filled.append(row)
    return filled


def line(row: DistributedRow) -> str:
    """The line that is printed when a row has been measured."""
    ratio = pair(row.forward_over_ring, row.both_over_ring)
    return (
        f"{row.length:>8} {row.operator:<11} {pair(row.forward_ms, row.backward_ms)} ms, "
        f"{pair(row.forward_mib, row.backward_mib)} MiB received, {number(row.peak_gib)} GiB, "
        f"error {row.error:.1e}" + (f", {ratio} x dense ring" if ratio else "")
    )


def cost_line(rows: Sequence[DistributedRow]) -> str:
    """What the last row, nsa_exact, takes over nsa of the same length."""
    exact = rows[-1]
    for row in reversed(rows):
        if (row.operator, row.length) == ("nsa", exact.length):
            forward = exact.forward_ms / row.forward_ms - 1
            both = exact.both_ms / row.both_ms - 1
            return (
                f"{exact.length:>8} exact gradients cost {forward:+.1%} forward, {both:+.1%} both"
            )
    return f"{exact.length:>8} exact gradients: nsa was not timed"


def markdown(rows: Sequence[DistributedRow]) -> str:
    """A table for each shape, number of ranks and layout."""
    parts = []
    head = ["tokens, attention", "ms", "ratio", "MiB received", "GiB", "TFLOP/s a rank"]
    for kind in dict.fromkeys((row.shape, row.ranks, row.layout) for row in rows):
        own = [row for row in rows if (row.shape, row.ranks, row.layout) == kind]
        lines = [
            [
                f"{row.length:,}, {row.operator.replace('_', ' ')}",
                pair(row.forward_ms, row.backward_ms),
                pair(row.forward_over_ring, row.both_over_ring),
                pair(row.forward_mib, row.backward_mib),
                number(row.peak_gib),
                pair(row.forward_tflops, row.backward_tflops),
            ]
            for row in own
        ]
        title = f"### {kind[1]} ranks, {kind[2]}, {kind[0].title()}"
        parts.append(f"{title}\n\n{described(own)}\n\n{table(head, lines)}")
    return "\n\n".join(parts) + "\n"


def join_ranks() -> ContextGroup:
    """The group of all processes of torchrun, one per GPU.

    Raises:
        ValueError: without torchrun, or with more processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if "RANK" not in os.environ:
        raise ValueError("ranks must be started by torchrun --nproc-per-node=GPUS, got none")
    if not gpus:
        raise ValueError("machines must have NVIDIA GPUs, got no CUDA device")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > gpus:
        raise ValueError(f"ranks must be one a GPU, got {here} on {gpus} GPUs")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl", device_id=device)
    return context_group(dist.group.WORLD)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_once(lambda: tyro.cli(DistributedOptions, args=arguments))
    try:
        context = join_ranks()
        rows, wrong = bench(options, context, RanksMeter(options.repeats_ms, context))
    except ValueError as error:
        end("distributed.py", error)
    if rows and context.rank == 0:
        print(f"\n{markdown(rows)}")
        if options.docs is not None and options.csv is not None:
            write_numbers(options.docs, markdown(rows), options.csv.name)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit("distributed.py: wrong results, not timed:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()

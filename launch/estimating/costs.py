"""Memory and time of one attention call and of a step, by formulas over measured rates.

Letters: S tokens of the stream, P ranks, N = S / P local tokens, H query heads, G KV heads, Dk and
Dv widths, C compressed tokens, e bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.bench.options import OPERATORS
from launch.bench.table import Row, read_rows
from launch.bench.work import Flops, Pairs, pairs_at
from launch.estimating.traffic import BACKWARD, FORWARD, Traffic
from nsa_dist import NSAConfig
from nsa_dist.checks import check
from nsa_dist.plan import Plan

WORKSPACE = 256 << 20
"""What kernels may take beside their results (docs/performance.md)."""
BYTES_A_HEAD = 5.4 * 1024 / 64
"""Tables, log-sum-exps and gates' gradients of a token, for each of its query heads (there)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one attention call on one rank, over its inputs.

    Attributes:
        kept: until backward, the output included.
        peak: the most at one time, in backward.
        buffers: part of both: keys and values with halos, all compressed tokens, and fetched
            blocks of all KV heads.
    """

    kept: float
    peak: float
    buffers: float


def attention_memory(
    config: NSAConfig, plan: Plan, fetched: float, element_size: int, *, hopper: bool = False
) -> Memory:
    """Memory of a call of the Triton kernels.

    Args:
        fetched: tokens that the rank fetches, added over KV heads.
        hopper: whether the kernels for Hopper run, whose backward was measured to take one output
            more (docs/benchmarks/h200_peers.csv).
    """
    tokens = plan.batch * plan.local_length
    output = tokens * config.num_heads * config.value_dim * element_size
    width = (config.head_dim + config.value_dim) * element_size
    buffers = 0.0
    if plan.size > 1:
        for name in plan.halos if config.independent_kv else [*plan.halos][:1]:
            buffers += plan.halos[name].num_rows * config.num_kv_heads * width
        buffers += fetched * width
    compressed = 0.0
    if config.uses_compression:
        compressed = plan.grids["compressed"].total * config.num_kv_heads * width
        buffers += compressed * (plan.size > 1)
    branches = len(config.branches)
    lines = tokens * config.num_heads * 4 * branches
    chosen = 0.0
    if "selected" in config.branches:
        chosen = tokens * config.num_kv_heads * config.num_selected * 4
    # o of each branch and their sum; in backward dq beside them, and gradients of the buffers.
    kept = (branches + 1) * output + lines + chosen + buffers + compressed * (plan.size == 1)
    query = tokens * config.num_heads * config.head_dim * element_size
    tables = tokens * config.num_heads * BYTES_A_HEAD
    peak = (branches + 1 + hopper) * output + query + WORKSPACE + tables + 2 * buffers
    return Memory(kept, peak, buffers)


def has_hopper_kernels(config: NSAConfig, gpu: str, element_size: int) -> bool:
    """Whether the kernels for Hopper run on a GPU of that name (docs/performance.md)."""
    widths = {config.head_dim, config.value_dim}
    return element_size == 2 and widths <= {64, 128} and ("H100" in gpu or "H200" in gpu)


def call_flops(config: NSAConfig, pairs: Pairs, tokens: int) -> dict[str, Flops]:
    """Useful operations of one rank's call, by operator; ``combine`` has bytes instead."""
    dk, dv, heads = config.head_dim, config.value_dim, float(config.num_heads)

    def attention(count: int) -> Flops:
        return Flops(2 * (dk + dv) * heads * count, 2 * (3 * dk + 2 * dv) * heads * count)

    made = tokens / config.compress_stride * config.num_kv_heads
    compress = 0.0
    if config.compress in ("mlp", "linear"):
        for width in (dk, dv):
            hidden = (config.compress_hidden or 2 * width) if config.compress == "mlp" else 0
            rows = config.compress_block * width
            compress += 2 * made * (hidden * (rows + width) if hidden else rows * width)
    flops = {
        "compression": Flops(compress, 2 * compress),
        "compressed_attention": attention(pairs.compressed),
        "block_selection": Flops(2 * dk * heads * pairs.compressed, 0.0),
        "selected_attention": attention(pairs.selected),
        "window_attention": attention(pairs.window),
    }
    nothing = Flops(0.0, 0.0)
    if "window" not in config.branches:
        flops["window_attention"] = nothing
    if "selected" not in config.branches:
        flops["selected_attention"] = flops["block_selection"] = nothing
    if "compressed" not in config.branches:
        flops["compressed_attention"] = nothing
    if not config.uses_compression:
        flops["compression"] = nothing
    return flops


@dataclass(frozen=True)
class Rates:
    """Measured rates of one GPU.

    Attributes:
        gpu: its name.
        tflops: by operator, at each length (forward, backward), TFLOP/s of useful products.
        copy: TB/s.
        matmul: TFLOP/s of a large product.
    """

    gpu: str
    tflops: dict[str, dict[int, tuple[float, float]]]
    copy: float
    matmul: float

    def at(self, operator: str, length: int) -> tuple[float, float]:
        """Rates at a length: between two measured ones linear in its logarithm; beyond the ends
        those of the ends."""
        known = self.tflops[operator]
        lengths = sorted(known)
        if length <= lengths[0] or length >= lengths[-1]:
            return known[lengths[0] if length <= lengths[0] else lengths[-1]]
        above = next(at for at in lengths if at >= length)
        below = lengths[lengths.index(above) - 1]
        part = math.log(length / below) / math.log(above / below)
        low, high = known[below], known[above]
        forward, backward = (a + part * (b - a) for a, b in zip(low, high, strict=True))
        return forward, backward


def read_rates(path: Path, config: NSAConfig) -> Rates:
    """Rates of a CSV of ``launch/bench/operators.py``: of its rows in 16 bits whose heads a group
    and widths are nearest to the config's.

    Raises:
        ValueError: if the file is not there or has no such rows.
    """
    check(path.is_file(), "estimate.rates", str(path), "a CSV of launch/bench/operators.py")
    wanted = (config.heads_per_group, config.head_dim, config.num_heads)
    rows = [
        row
        for row in read_rows(path, Row)
        if row.operator in OPERATORS
        and row.operator != "whole"
        and row.choices in ("", "random")
        and row.shape.documents == 1
    ]
    check(bool(rows), "estimate.rates", str(path), "a CSV with operators of one document")

    def distance(row: Row) -> tuple[float, ...]:
        shape = row.shape
        found = (shape.heads // shape.kv_heads, shape.head_dim, shape.heads)
        return tuple(abs(math.log(a / b)) for a, b in zip(found, wanted, strict=True))

    shape = min(rows, key=distance).shape
    rows = [row for row in rows if row.shape == shape]
    tflops: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        if row.forward_tflops:
            rates = (row.forward_tflops, row.backward_tflops or row.forward_tflops)
            tflops.setdefault(row.operator, {})[row.length] = rates
    missing = sorted({*OPERATORS} - {"whole", "combine"} - {*tflops})
    check(not missing, "estimate.rates", str(path), f"a CSV with rates of {', '.join(missing)}")
    last = rows[-1]
    check(bool(last.copy_tbs and last.matmul_tflops), "estimate.rates", str(path), "with peaks")
    assert last.copy_tbs is not None and last.matmul_tflops is not None
    return Rates(shape.gpu, tflops, last.copy_tbs, last.matmul_tflops)


@dataclass(frozen=True)
class Links:
    """How fast a rank receives.

    Attributes:
        fast: GB/s from ranks of its node.
        slow: GB/s from ranks of other nodes, the rank's share of its node's link.
        node: neighbouring ranks of a node.
        latency: ms that a message takes whatever its size.
    """

    fast: float
    slow: float
    node: int
    latency: float

    def ms(self, traffic: Traffic, kind: str) -> Tensor:
        """float64 [P], of the messages of one kind; both links work at once."""
        far = traffic.across(kind, self.node)
        near = traffic.of_rank(kind) - far
        return torch.maximum(near / self.fast, far / self.slow) / 1e6


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one forward or backward of an attention call, of the slowest rank.

    Attributes:
        compute: of kernels.
        host: launches and waits of the host that a call over ranks adds.
        messages: of all messages, one after another.
        exposed: of messages that the schedule of ``hidden_ms`` leaves in the open.
    """

    compute: float
    host: float
    messages: float
    exposed: float

    def total(self, *, overlaps: bool) -> float:
        """With messages behind compute, or all in the open."""
        return self.compute + self.host + (self.exposed if overlaps else self.messages)


HOST_MS = (4.6, 3.5)
"""What a forward and a backward over two ranks took beyond compute and messages on H200s, at 65,536
and at 131,072 tokens alike (docs/benchmarks/h200_ring.csv beside h200.csv)."""

FEWEST_MS = (2.6, 4.7)
"""What the host takes to launch a forward and a backward (docs/performance.md)."""


def compute_ms(
    config: NSAConfig, plan: Plan, rates: Rates, length: int, element_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of one rank's kernels by operator, forward and backward."""
    tokens = plan.batch * plan.local_length
    flops = call_flops(config, pairs_at(config, plan.positions.cpu()), tokens)
    forward, backward = {}, {}
    for name, count in flops.items():
        rate = rates.at(name, length)
        forward[name] = count.forward / rate[0] / 1e9
        backward[name] = count.backward / rate[1] / 1e9
    # Reads each branch's output, writes the sum.
    output = tokens * config.num_heads * config.value_dim * element_size
    forward["combine"] = (len(config.branches) + 1) * output / rates.copy / 1e9
    backward["combine"] = forward["combine"]
    return forward, backward


def compute_of_ranks(
    config: NSAConfig, plans: Sequence[Plan], rates: Rates, length: int, element_size: int
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """``compute_ms`` of every rank."""
    return [compute_ms(config, plan, rates, length, element_size) for plan in plans]


def pass_ms(
    config: NSAConfig,
    plans: Sequence[Plan],
    traffic: Traffic,
    rates: Rates,
    links: Links,
    length: int,
    element_size: int,
) -> tuple[Pass, Pass]:
    """Forward and backward of one call: of each part the slowest rank's."""
    by_rank = compute_of_ranks(config, plans, rates, length, element_size)
    passes = []
    for at, kinds in enumerate((FORWARD, BACKWARD)):
        compute = max(FEWEST_MS[at], *(sum(times[at].values()) for times in by_rank))
        if len(plans) == 1:
            passes.append(Pass(compute, 0.0, 0.0, 0.0))
            continue
        count = dict.fromkeys(kinds, 1)
        halo, fetch = kinds[1], kinds[-1]
        count[halo] = len(plans[0].halos) if config.independent_kv else 1
        count[fetch] = config.num_kv_heads
        ms = {
            kind: float(links.ms(traffic, kind).max())
            + links.latency * count[kind] * (traffic.received[kind].sum() > 0).item()
            for kind in kinds
        }
        slowest = max(by_rank, key=lambda times: sum(times[at].values()))[at]
        exposed = hidden_ms(ms, kinds, slowest, config.num_kv_heads)
        passes.append(Pass(compute, HOST_MS[at], sum(ms.values()), exposed))
    return passes[0], passes[1]


def hidden_ms(
    ms: dict[str, float], kinds: Sequence[str], compute: dict[str, float], heads: int
) -> float:
    """What stays in the open if the gather runs behind the window branch, and the fetch of a KV
    head behind the attention of the head before it: the others, the first head's fetch, and what
    is longer than what hides it. Backward is the mirror."""
    gather, fetch = kinds[2], kinds[-1]
    of_head = ms[fetch] / heads
    behind = compute["selected_attention"] / heads
    others = sum(time for kind, time in ms.items() if kind not in (gather, fetch))
    late = max(0.0, ms[gather] - compute["window_attention"])
    return others + late + of_head + (heads - 1) * max(0.0, of_head - behind)

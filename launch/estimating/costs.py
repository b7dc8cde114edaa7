"""What computation and messages take: operations of a call, measured rates of a GPU, links."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.bench.options import OPERATORS
from launch.bench.table import Row, read_rows
from launch.bench.work import Flops, Pairs
from launch.estimating.traffic import Traffic
from nsa_dist import NSAConfig
from nsa_dist.checks import check


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

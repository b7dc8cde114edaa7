"""Estimates of a run: options, one line for each split of a stream, and their table.

Bytes follow from the plan (``traffic.py``, ``choices.py``), memory from formulas (``memory.py``),
time from measured rates (``costs.py``, ``schedule.py``, ``model.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from launch.bench.options import check_folder, choices_of_file
from launch.estimating.choices import carried_tokens, fetched_tokens, full_gather_tokens
from launch.estimating.costs import Links, Rates, read_rates
from launch.estimating.memory import attention_memory
from launch.estimating.model import model_cost
from launch.estimating.schedule import compute_ms, passes
from launch.estimating.traffic import (
    BACKWARD,
    FORWARD,
    SplitOptions,
    count_traffic,
    plans_of_all,
    split_stream,
)
from launch.settings import FETCH_AGAIN, Settings
from nsa_dist.checks import as_choice, check
from nsa_dist.comm.nodes import Nodes, nodes_of_neighbours
from nsa_dist.plan import Plan
from nsa_dist.plan.layout import make_layout

RATES = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "h200.csv"
CHOICES = ("all", "random", "coherent")


@dataclass(frozen=True)
class EstimateOptions:
    """What is estimated of the run, and on which machine."""

    lengths: tuple[int, ...] = ()  # tokens of a stream; empty: those of a micro-batch of the run
    ranks: tuple[int, ...] = ()  # that share it; empty: parallel.cp
    layouts: tuple[str, ...] = ()  # empty: parallel.layout
    documents: int = 1  # of equal length, that the stream is packed of
    # how queries choose blocks: all, random, coherent, or an npz file of record_choices.py
    choices: tuple[str, ...] = ("random",)
    layer: int = 0  # of that file
    rates: str = str(RATES)  # CSV of launch/bench/operators.py, of the GPU
    link: float = 300.0  # GB/s that a rank receives from others of its node
    slow_link: float = 40.0  # GB/s from other nodes
    node: int = 8  # ranks of a node
    latency: float = 0.05  # ms of a message whatever its size
    csv: str = ""  # file to write the table to

    def __post_init__(self) -> None:
        for name in ("lengths", "ranks"):
            values = getattr(self, name)
            check(all(value >= 1 for value in values), f"estimate.{name}", values, "at least 1")
        check(bool(self.choices), "estimate.choices", self.choices, "one way or more")
        for one in self.choices:
            known = one in CHOICES or Path(one).is_file()
            check(known, "estimate.choices", one, f"one of {', '.join(CHOICES)} or an npz file")
        for layout in self.layouts:
            names = ("contiguous", "zigzag", "zigzag_per_document")
            as_choice("estimate.layouts", layout, names)
        for name in ("documents", "node"):
            value = getattr(self, name)
            check(value >= 1, f"estimate.{name}", value, "at least 1")
        for name in ("link", "slow_link"):
            value = getattr(self, name)
            check(value > 0, f"estimate.{name}", value, "a positive number of GB/s")
        check(self.latency >= 0, "estimate.latency", self.latency, "at least 0")
        check(self.layer >= 0, "estimate.layer", self.layer, "at least 0")
        check_folder("estimate.csv", Path(self.csv) if self.csv else None)


@dataclass(frozen=True)
class EstimateSettings(Settings):
    """A run, and what is estimated of it."""

    estimate: EstimateOptions = field(default_factory=EstimateOptions)


@dataclass(frozen=True)
class Estimate:
    """One line of the table. Bytes, memory and times are of the rank with the most.

    Args:
        fetch_share, fetch_share_mean: fetched tokens over those of a full gather: the largest of a
            rank, and the mean.
        far_mib: of forward and backward, from other nodes.
        kept_gib, peak_gib: of one attention call over its inputs, until backward and at most.
        forward_ms, backward_ms: of one attention call, by its schedule.
        forward_open_ms, backward_open_ms: if every message stood between kernels.
        exposed, exposed_open: the share of messages and waits that no kernel hides in these times.
        imbalance: of kernels, the slowest rank's time over the mean, less 1.
        step_ms: of a micro-batch through the whole model.
        model_gib: weights, gradients, optimizer state and activations of a rank.
    """

    length: int
    ranks: int
    layout: str
    choices: str
    halo_mib: float
    gather_mib: float
    request_mib: float
    fetch_mib: float
    forward_mib: float
    backward_mib: float
    far_mib: float
    fetch_share: float
    fetch_share_mean: float
    kept_gib: float
    peak_gib: float
    forward_ms: float
    backward_ms: float
    forward_open_ms: float
    backward_open_ms: float
    exposed: float
    exposed_open: float
    imbalance: float
    step_ms: float
    model_gib: float


def estimates(settings: EstimateSettings, vocab_size: int, element_size: int = 2) -> list[Estimate]:
    """A line for each length, number of ranks, layout and way to choose.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """
    options = settings.estimate
    exact = settings.parallel.exact_gradients
    check(exact == 0, "parallel.exact_gradients", exact, "0 (others have no estimate)")
    must = "'nsa', and model.dense_every = 0 (dense layers have no estimate)"
    check(not settings.model.has_dense, "model.attention", settings.model.attention, must)
    rates = read_rates(Path(options.rates), settings.attention)
    found = []
    for length in options.lengths or (settings.data.length * settings.data.micro_batch,):
        must = f"a multiple of estimate.documents = {options.documents}"
        check(length % options.documents == 0, "estimate.lengths", length, must)
        boundaries = torch.arange(options.documents + 1) * (length // options.documents)
        for size in options.ranks or (settings.parallel.cp,):
            for layout in options.layouts or (settings.parallel.layout,):
                try:
                    plans = plans_of_all(settings.attention, layout, size, length, boundaries.int())
                except ValueError as error:
                    raise ValueError(f"estimate.lengths: {error}") from None
                split = Split(settings, layout, plans, boundaries, rates, element_size)
                found += [split.estimate(how, vocab_size) for how in options.choices]
    return found


@dataclass(frozen=True, eq=False)
class Split:
    """One stream over one number of ranks."""

    settings: EstimateSettings
    layout: str
    plans: Sequence[Plan]
    boundaries: Tensor
    rates: Rates
    element_size: int

    def _nodes(self) -> Nodes | None:
        """Which ranks share a node, where chosen blocks are fetched once a node."""
        parallel, size = self.settings.parallel, len(self.plans)
        of_node = parallel.ranks_per_node or self.settings.estimate.node
        if parallel.fetch == "full" or size % of_node:
            return None
        return nodes_of_neighbours(of_node, size)

    def estimate(self, choices: str, vocab_size: int) -> Estimate:
        """The line for one way to choose."""
        config, options, plans = self.settings.attention, self.settings.estimate, self.plans
        length, size, parallel = int(self.boundaries[-1]), len(plans), self.settings.parallel
        how = choices if choices in CHOICES else self._recorded(Path(choices), length)
        split = SplitOptions(
            parallel.fetch, FETCH_AGAIN[parallel.fetch_again], parallel.recompute_branches
        )
        stream = split_stream(self.layout, size, length, self.boundaries.int())
        full = "all" if split.fetch == "full" else how
        fetched = fetched_tokens(config, stream, size, full)  # type: ignore[arg-type]
        nodes = self._nodes()
        carried = None if nodes is None else carried_tokens(config, stream, nodes, full)  # type: ignore[arg-type]
        traffic = count_traffic(config, plans, fetched, self.element_size, split, nodes, carried)
        arriving = (traffic.received["fetch"] + traffic.received["share"]) / (
            (config.head_dim + config.value_dim) * self.element_size
        )
        links = Links(options.link, options.slow_link, options.node, options.latency)
        times = [
            compute_ms(
                config, plan, self.rates, length, self.element_size, split.recompute_branches
            )
            for plan in plans
        ]
        halos = len(plans[0].halos) if config.independent_kv else 1
        of_passes = passes(config, times, halos, traffic, links, split)
        total = [one.total for one in of_passes]
        in_the_open = [one.in_the_open for one in of_passes]
        memory = [
            attention_memory(
                config,
                plan,
                self.element_size,
                split,
                fetched=float(arriving[plan.rank].sum()),
                sent=float(arriving[:, plan.rank].sum()),
            )
            for plan in plans
        ]
        kept, peak = max(one.kept for one in memory), max(one.peak for one in memory)
        model = model_cost(self.settings, vocab_size, plans[0], self.rates, self.element_size)
        work = [sum(sum(part.values()) for part in of_rank) for of_rank in times]
        shares = fetched.sum((1, 2)) / max(
            full_gather_tokens(stream, size) * config.num_kv_heads, 1
        )
        far = torch.stack([traffic.across(kind, options.node) for kind in (*FORWARD, *BACKWARD)])

        def mib(*kinds: str) -> float:
            return float(traffic.total(kinds).max()) / 2**20

        return Estimate(
            length=length,
            ranks=len(plans),
            layout=self.layout,
            choices=Path(choices).stem,
            halo_mib=mib("halo"),
            gather_mib=mib("gather"),
            request_mib=mib("request"),
            fetch_mib=mib("fetch"),
            forward_mib=mib(*FORWARD),
            backward_mib=mib(*BACKWARD),
            far_mib=float(far.sum(0).max()) / 2**20,
            fetch_share=float(shares.max()),
            fetch_share_mean=float(shares.mean()),
            kept_gib=kept / 2**30,
            peak_gib=peak / 2**30,
            forward_ms=total[0],
            backward_ms=total[1],
            forward_open_ms=in_the_open[0],
            backward_open_ms=in_the_open[1],
            exposed=sum(one.exposed for one in of_passes) / sum(total),
            exposed_open=sum(one.messages + one.host for one in of_passes) / sum(in_the_open),
            imbalance=max(work) * len(work) / sum(work) - 1,
            step_ms=model.step_ms(*total),
            model_gib=model.memory(kept, peak) / 2**30,
        )

    def _recorded(self, path: Path, length: int) -> Tensor:
        """Choices of one layer of a file, int [token, G, n]."""
        config, options = self.settings.attention, self.settings.estimate
        check(options.documents == 1, "estimate.documents", options.documents, "1 with a file")
        return choices_of_file(config, path, length, (options.layer,))[options.layer]


COLUMNS = {
    "tokens": lambda e: f"{e.length:,}",
    "ranks": lambda e: str(e.ranks),
    "layout": lambda e: e.layout,
    "choices": lambda e: e.choices,
    "halo, gather, request, fetch MiB": lambda e: (
        f"{e.halo_mib:.4g}, {e.gather_mib:.4g}, {e.request_mib:.3g}, {e.fetch_mib:.4g}"
    ),
    "forward / backward MiB": lambda e: f"{e.forward_mib:.4g} / {e.backward_mib:.4g}",
    "share of a gather": lambda e: f"{e.fetch_share:.2f} ({e.fetch_share_mean:.2f})",
    "kept, peak GiB": lambda e: f"{e.kept_gib:.3g}, {e.peak_gib:.3g}",
    "forward / backward ms": lambda e: f"{e.forward_ms:.4g} / {e.backward_ms:.4g}",
    "without overlap": lambda e: f"{e.forward_open_ms:.4g} / {e.backward_open_ms:.4g}",
    "exposed, without overlap": lambda e: f"{e.exposed:.1%}, {e.exposed_open:.1%}",
    "imbalance": lambda e: f"{e.imbalance:.1%}",
    "step ms": lambda e: f"{e.step_ms:.4g}",
    "rank GiB": lambda e: f"{e.model_gib:.3g}",
}
"""Head and text of each column of the printed table, in Markdown."""


def table(rows: Sequence[Estimate]) -> str:
    """A Markdown table."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[show(row) for show in COLUMNS.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_run(settings: Settings, replicas: int, vocab_size: int) -> list[str]:
    """What a step of a run costs by estimate, in lines for a reader."""
    parallel, data, run = settings.parallel, settings.data, settings.run
    # A rank of tp holds its share of heads and widths, a stage of pp its share of blocks.
    attention = replace(
        settings.attention,
        num_heads=settings.attention.num_heads // parallel.tp,
        num_kv_heads=settings.attention.num_kv_heads // parallel.tp,
    )
    model = replace(
        settings.model,
        layers=settings.model.layers // parallel.pp,
        mlp_hidden=settings.model.mlp_hidden // parallel.tp,
    )
    multiple = make_layout(parallel.layout, parallel.cp).multiple
    length = -(-data.length * data.micro_batch // multiple) * multiple  # Padded.
    own = EstimateSettings(
        attention,
        settings.rotary,
        replace(model, dense_every=0),
        data,
        settings.optimizer,
        replace(parallel, dp=replicas),
        run,
        EstimateOptions(lengths=(length,)),
    )
    sizes = {"float32": 4, "float64": 8}
    size = sizes.get(run.dtype, 2)
    (cost,) = estimates(own, vocab_size, size)
    micro_batches = data.global_batch // (replicas * data.micro_batch)
    rates = read_rates(Path(own.estimate.rates), attention)
    local, each = length // parallel.cp, f"over {parallel.cp} ranks"
    tokens = data.global_batch * data.length
    rows = {
        "layout": f"{parallel.layout}, {length:,} tokens {each}, {local:,} each",
        "imbalance of compute": f"{cost.imbalance:.1%}",
        "step": f"{tokens:,} tokens, {micro_batches} micro-batches a replica",
        "memory of a rank": f"{cost.model_gib:.3g} GiB",
        "memory of an attention call": f"{cost.peak_gib:.3g} GiB over its inputs at most, "
        f"{cost.kept_gib:.3g} GiB until backward",
        "received in an attention call": f"{cost.forward_mib:.4g} MiB forward, "
        f"{cost.backward_mib:.4g} MiB backward, of random choices",
        "time of an attention call": f"{cost.forward_ms:.3g} ms forward, "
        f"{cost.backward_ms:.3g} ms backward",
        "time of a step": f"{micro_batches * cost.step_ms:,.0f} ms",
        "rates": f"of {rates.gpu}, links of {own.estimate.link:g} GB/s; estimate.py takes others",
    }
    return [f"{name}: {value}" for name, value in rows.items()]

"""Time of one attention call: kernels, the host, and messages behind kernels.

The schedule is that of ``nsa_dist/attention/flow.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.bench.work import pairs_at
from launch.estimating.costs import Links, Rates, call_flops
from launch.estimating.traffic import BACKWARD, FORWARD, SplitOptions, Traffic
from nsa_dist import NSAConfig
from nsa_dist.plan import Plan

Times = dict[str, float]
"""Milliseconds by operator, or by kind of message."""

FEWEST_MS = (2.6, 4.7)
"""What the host takes to launch a forward and a backward on one rank (docs/performance.md)."""

HOST_MS = (4.6, 3.5)
"""What a forward and a backward over two ranks took on H200s beyond kernels and messages, when
none of them overlapped, at 65,536 and at 131,072 tokens alike (docs/benchmarks/h200_ring.csv beside
h200.csv). Taken for time of the host."""

OF_BRANCH = {
    "window": "window_attention",
    "compressed": "compressed_attention",
    "selected": "selected_attention",
}


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one forward or backward of an attention call, of the slowest rank.

    Attributes:
        compute: of kernels.
        fewest: what the host takes to launch them on one rank.
        host: launches and waits of the host that a call over ranks adds.
        messages: of all messages, one after another.
        exposed: of messages, and of the host's wait for sizes, what no kernel hides.
    """

    compute: float
    fewest: float
    host: float = 0.0
    messages: float = 0.0
    exposed: float = 0.0

    @property
    def total(self) -> float:
        """By the schedule: the host runs ahead of the kernels, except where it waits for sizes."""
        return max(self.compute + self.exposed, self.fewest + self.host)

    @property
    def in_the_open(self) -> float:
        """If every message and every wait stood between kernels."""
        return max(self.compute, self.fewest) + self.host + self.messages


def compute_ms(
    config: NSAConfig,
    plan: Plan,
    rates: Rates,
    length: int,
    element_size: int,
    recompute_branches: Sequence[str] = (),
) -> tuple[Times, Times]:
    """Milliseconds of one rank's kernels by operator, forward and backward."""
    tokens = plan.batch * plan.local_length
    flops = call_flops(config, pairs_at(config, plan.positions.cpu()), tokens)
    forward, backward = {}, {}
    for name, count in flops.items():
        rate = rates.at(name, length)
        forward[name] = count.forward / rate[0] / 1e9
        backward[name] = count.backward / rate[1] / 1e9
    for branch in recompute_branches:
        backward[OF_BRANCH[branch]] += forward[OF_BRANCH[branch]]
    # Reads each branch's output, writes the sum.
    output = tokens * config.num_heads * config.value_dim * element_size
    forward["combine"] = (len(config.branches) + 1) * output / rates.copy / 1e9
    backward["combine"] = forward["combine"]
    return forward, backward


def passes(
    config: NSAConfig,
    by_rank: Sequence[tuple[Times, Times]],
    halos: int,
    traffic: Traffic,
    links: Links,
    options: SplitOptions,
) -> tuple[Pass, Pass]:
    """Forward and backward of one call: of each part the slowest rank's.

    Args:
        by_rank: ``compute_ms`` of every rank.
        halos: sets of keys and values that have one each.
    """
    found = []
    for at, kinds in enumerate((FORWARD, BACKWARD)):
        compute = max(sum(times[at].values()) for times in by_rank)
        if len(by_rank) == 1:
            found.append(Pass(compute, FEWEST_MS[at]))
            continue
        counts = dict.fromkeys(kinds, 1)
        counts[kinds[1]] = halos
        for kind in kinds:
            if kind.startswith(("fetch", "share")):
                counts[kind] = config.num_kv_heads
        ms = {
            kind: float(links.ms(traffic, kind).max())
            + links.latency * counts[kind] * (traffic.received[kind].sum() > 0).item()
            for kind in kinds
        }
        slowest = max(by_rank, key=lambda times: sum(times[at].values()))[at]
        if at == 0:
            wait = HOST_MS[0] if options.fetch != "full" else 0.0
            exposed = exposed_in_forward(config, ms, slowest, halos, wait)
        else:
            exposed = exposed_in_backward(config, ms, slowest, halos)
        found.append(Pass(compute, FEWEST_MS[at], HOST_MS[at], sum(ms.values()), exposed))
    return found[0], found[1]


def _longer(message: float, kernels: float) -> float:
    """What of a message is left when the kernels have ended that hide it."""
    return max(0.0, message - kernels)


def exposed_in_forward(
    config: NSAConfig, ms: Times, compute: Times, halos: int, wait: float
) -> float:
    """Milliseconds of forward's messages that no kernel hides.

    Args:
        ms: of messages, by kind.
        compute: of kernels, by operator.
        halos: sets of keys and values that have one each.
        wait: how long the host waits for sizes and launches the first fetch.
    """
    heads = config.num_kv_heads
    first_halo = ms["halo"] / halos
    exposed = ms["plan"] + first_halo + _longer(ms["halo"] - first_halo, compute["compression"])
    if "selected" not in config.branches:
        return exposed + _longer(ms["gather"], compute["window_attention"])
    of_head, behind = (ms["fetch"] + ms["share"]) / heads, compute["selected_attention"] / heads
    sizes = ms["request"] + wait + of_head
    exposed += ms["gather"] + _longer(sizes, compute["window_attention"])
    return exposed + (heads - 1) * _longer(of_head, behind)


def exposed_in_backward(config: NSAConfig, ms: Times, compute: Times, halos: int) -> float:
    """Milliseconds of backward's messages that no kernel hides; ``exposed_in_forward``'s terms."""
    heads = config.num_kv_heads
    last_halo = ms["halo_grad"] / halos
    exposed = ms["plan_grad"] + ms["gather_grad"] + last_halo
    exposed += _longer(ms["halo_grad"] - last_halo, compute["compression"])
    again = (ms["fetch_again"] + ms["share_again"]) / heads
    returned = (ms["fetch_grad"] + ms["share_grad"]) / heads
    behind = compute["selected_attention"] / heads
    exposed += again  # Of the last head, which comes first.
    for g in reversed(range(heads)):
        travels = again * (g > 0) + returned * (g < heads - 1)
        exposed += _longer(travels, behind)
    others = compute["window_attention"] + compute["compressed_attention"]
    return exposed + _longer(returned, others)

"""Two levels of links on links that have two: nodes are network namespaces, joined by a slow one.

The link's rate is limited by ``tc``; ranks of a namespace reach each other over its loopback.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.namespaces import Host, two_hosts
from tests.distributed.slow_links import RANKS_PER_NODE, WAYS

ROOT = Path(__file__).resolve().parents[2]
SIZE = 2 * RANKS_PER_NODE
RATE = "20mbit"
SECONDS = 240


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts(("tbf", "rate", RATE, "burst", "64kb", "latency", "1s")) as both:
        yield both


@pytest.mark.slow
def test_time_shrinks_with_the_bytes(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    processes = []
    for rank in range(SIZE):
        host = hosts[rank // RANKS_PER_NODE]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": host.link,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        }
        words = [*host.enter, sys.executable, "-m"]
        words += ["tests.distributed.slow_links", str(rank), str(SIZE), str(tmp_path)]
        processes.append(subprocess.Popen(words, env=environment, cwd=ROOT))
    try:
        assert [process.wait(SECONDS) for process in processes] == [0] * SIZE
    finally:
        for process in processes:
            process.kill()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(SIZE)]
    seconds, moved = {}, {}
    for way in WAYS:
        # A run takes what its last rank takes; a node's link carries what its ranks get and send.
        runs = zip(*(of_rank[way] for of_rank in found), strict=True)
        seconds[way] = statistics.median(max(s for s, *_ in run) for run in runs)
        loads = []
        for first in (0, RANKS_PER_NODE):
            node = [of_rank[way][0] for of_rank in found[first : first + RANKS_PER_NODE]]
            loads += [sum(came for _, came, _ in node), sum(went for *_, went in node)]
        moved[way] = max(loads)
    print(f"seconds {seconds}, bytes between nodes {moved}")
    for way in ("full", "chosen"):
        faster, fewer = seconds[way] / seconds["two levels"], moved[way] / moved["two levels"]
        print(f"two levels beside {way}: {faster:.2f} times as fast, {fewer:.2f} times fewer bytes")
        assert fewer > 2
        assert faster >= 0.8 * fewer

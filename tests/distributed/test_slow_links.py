"""Two levels of links on links that have two: nodes are network namespaces, joined by a slow one.

The link's rate is limited by ``tc``; ranks of a namespace reach each other over its loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.slow_links import RANKS_PER_NODE, WAYS

ROOT = Path(__file__).resolve().parents[2]
SIZE = 2 * RANKS_PER_NODE
RATE = "20mbit"
SECONDS = 240


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def make_nodes(names: list[str], links: list[str]) -> None:
    """Two namespaces, joined by a link of ``RATE`` each way."""
    for name in names:
        command("ip", "netns", "add", name)
    command(
        *("ip", "link", "add", links[0], "netns", names[0]),
        *("type", "veth", "peer", "name", links[1], "netns", names[1]),
    )
    for at, (name, link) in enumerate(zip(names, links, strict=True)):
        command("ip", "-n", name, "addr", "add", f"10.77.0.{at + 1}/24", "dev", link)
        for device in ("lo", link):
            command("ip", "-n", name, "link", "set", device, "up")
        limit = ("rate", RATE, "burst", "64kb", "latency", "1s")
        command(
            "ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", "tbf", *limit
        )


@pytest.fixture
def nodes() -> Iterator[tuple[list[str], list[str]]]:
    """Names of two namespaces, and of the link's end in each."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, ip and tc, found {'no root' if not missing else 'no'} {missing}")
    names = [f"nsa-{os.getpid()}-{at}" for at in range(2)]
    links = [f"nsa{os.getpid() % 10**6}{end}" for end in "ab"]
    try:
        try:
            make_nodes(names, links)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs namespaces with limited links, got {error.stderr.strip()!r}")
        yield names, links
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_time_shrinks_with_the_bytes(nodes: tuple[list[str], list[str]], tmp_path: Path) -> None:
    names, links = nodes
    processes = []
    for rank in range(SIZE):
        at = rank // RANKS_PER_NODE
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": links[at],
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        }
        words = ["ip", "netns", "exec", names[at], sys.executable, "-m"]
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

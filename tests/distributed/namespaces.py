"""Two hosts on one machine: network namespaces that are joined by a link."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """A namespace, its end of the link, and its address there."""

    name: str
    link: str
    address: str

    @property
    def enter(self) -> list[str]:
        """What a command line begins with to run there."""
        return ["ip", "netns", "exec", self.name]


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@contextmanager
def two_hosts(limit: Sequence[str] = ()) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; skips the test where there can be none.

    Args:
        limit: a queueing discipline of ``tc`` for each end of the link, empty for none.
    """
    programs = ["ip", "unshare"] + (["tc"] if limit else [])
    missing = [name for name in programs if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(programs)}, got {missing or 'another user'}")
    hosts = tuple(
        Host(f"nsa-{os.getpid()}-{end}", f"nsa{os.getpid() % 10**6}{end}", f"10.77.0.{at + 1}")
        for at, end in enumerate("ab")
    )
    try:
        try:
            _make(hosts, limit)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces, got {error.stderr.strip()!r}")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def _make(hosts: Sequence[Host], limit: Sequence[str]) -> None:
    first, second = hosts
    for host in hosts:
        command("ip", "netns", "add", host.name)
    command(
        *("ip", "link", "add", first.link, "netns", first.name),
        *("type", "veth", "peer", "name", second.link, "netns", second.name),
    )
    for host in hosts:
        command("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
        for device in ("lo", host.link):
            command("ip", "-n", host.name, "link", "set", device, "up")
        if limit:
            command(*host.enter, "tc", "qdisc", "add", "dev", host.link, "root", *limit)

"""What ranks compare before they form a process group: options, code and each rank's own error.

A rank with another learning rate, version or grid would train on silently, or hang in the first
collective that others do not run. So all is compared before any group is made, through the store
by which ranks find each other. That needs no device and no collective.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.processes.mistakes import has_agent_store
from launch.settings import Settings

# The code whose sources are compared.
_PACKAGES = ("launch", "nsa_dist", "nsa_kernels")


def join_store(
    table: Mapping[str, str],
) -> tuple[dist.Store, int, int]:  # type: ignore[name-defined]
    """Meet the other ranks that torchrun describes, if any, and compare what each was started with.

    Args:
        table: what ``describe`` gave on this rank.

    Returns:
        The store for ``init_process_group``, this rank and the number of ranks.

    Raises:
        ValueError: on every rank, with the problem of any rank, or the options that differ.
    """
    if "RANK" not in os.environ:
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
        rank, size = 0, 1
    else:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun's store outlives a restart of its ranks and still has what they wrote: addresses
        # of dead processes, and our own entries. A store of rank 0 is new each time, and a host
        # that was replaced counts its attempts anew.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if has_agent_store():
            store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    ours = json.dumps(table)
    # Rank 0 judges for all: every rank sends and fetches one text.
    if rank == 0:
        others = [store.get(_key(other)).decode() for other in range(1, size)]
        verdict = judge([json.loads(text) for text in [ours, *others]])
        store.set(_key("verdict"), json.dumps(verdict))
    else:
        store.set(_key(rank), ours)
        verdict = json.loads(store.get(_key("verdict")))
        store.set(_key(f"told {rank}"), "yes")
    if verdict:
        # The store may live in rank 0, which must not end before all have read.
        for other in range(1, size) if rank == 0 else ():
            store.get(_key(f"told {other}"))
        raise ValueError(verdict)
    return store, rank, size


def compare_in_group(table: Mapping[str, str]) -> None:
    """As ``join_store``, in an existing process group. Collective."""
    found: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, table)
    verdict = judge(found)
    if verdict:
        raise ValueError(verdict)


def describe(settings: Settings | None, problem: str = "", device: str = "") -> dict[str, str]:
    """What is compared, by name. A rank with a problem sends only that.

    Args:
        settings: None if they could not be read.
        problem: this rank's own error, such as a missing package.
        device: the type of device that run.device selects here.
    """
    if problem or settings is None:
        return {"problem": problem}
    options = {
        f"{section.name}.{option}": repr(value)
        for section in dataclasses.fields(settings)
        for option, value in dataclasses.asdict(getattr(settings, section.name)).items()
    }
    return {"code version": code_version(), **options, "run.device, as found": device}


def judge(tables: Sequence[Mapping[str, str]]) -> str:
    """What is wrong in the ranks' tables, which are in rank order; empty if nothing is."""
    problems = {rank: t["problem"] for rank, t in enumerate(tables) if "problem" in t}
    if problems:
        texts = list(dict.fromkeys(problems.values()))
        if len(problems) == len(tables) and len(texts) == 1:
            return texts[0]
        return "; ".join(
            f"{text} (on {show_ranks([r for r, t in problems.items() if t == text])})"
            for text in texts
        )
    differing = [name for name in tables[0] if len({table[name] for table in tables}) > 1]
    return "; ".join(
        f"{name} must be the same on every rank, got {show_values([t[name] for t in tables])}"
        for name in differing
    )


def show_values(values: Sequence[str]) -> str:
    """Every rank's value, in rank order, as 'ranks 0-2: a, rank 3: b'."""
    distinct = dict.fromkeys(values)
    return ", ".join(
        f"{show_ranks([rank for rank, value in enumerate(values) if value == one])}: {one}"
        for one in distinct
    )


def show_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks as 'rank 3' or 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def code_version() -> str:
    """Versions of the package and of torch, and a digest of the sources that run here."""
    try:
        version = importlib.metadata.version("nsa-dist")
    except importlib.metadata.PackageNotFoundError:
        # A checkout.
        version = "not installed"
    folders: list[Path] = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None, name
        folders += map(Path, spec.submodule_search_locations)
    return f"nsa-dist {version}, torch {torch.__version__}, sources {source_digest(folders)[:12]}"


def source_digest(folders: Sequence[Path]) -> str:
    """SHA-256 of the Python files under folders, by name and content, wherever the folders lie."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _key(name: str | int) -> str:
    return f"nsa-dist/start/{name}"

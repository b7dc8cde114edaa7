"""The run's folder: chosen, the same on every rank, and locked for this run."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from launch.processes.ranks import Ranks
from launch.processes.startup import show_ranks
from launch.settings import RunSettings, Settings, to_toml
from launch.storage.checkpoint import found_steps
from launch.storage.lock import NAME, STALE_SECONDS, FolderLock, Owner
from launch.storage.manifest import on_main
from nsa_dist.checks import check

SHARED_SECONDS = 5.0
"""Seconds until a file written on another node must be visible; network file systems cache."""

T = TypeVar("T")


def check_folder_options(run: RunSettings) -> None:
    """Refuse options that name no folder.

    Raises:
        ValueError: naming the option.
    """
    must = "False without run.folder, the folder to continue in"
    check(bool(run.folder) or not run.resume, "run.resume", run.resume, must)
    plain = run.name.isprintable() and not set(run.name) & set("/\\")
    plain = plain and run.name not in (".", "..")
    must = "a name without slashes (run.folder takes a path)"
    check(plain or bool(run.folder), "run.name", run.name, must)


@contextmanager
def run_folder(settings: Settings, ranks: Ranks) -> Iterator[Path]:
    """The run's folder, locked for as long as the context lasts. Collective.

    Raises:
        ValueError: on every rank, if it cannot be written, is not the same folder on every rank, is
            another run's, or holds checkpoints without ``run.resume``.
    """
    folder = Path(_on_main(lambda: _make(settings.run)))
    lock = FolderLock(folder)
    try:
        _check_shared(folder, ranks)
        _take(lock, ranks)
        held = _on_main(lambda: bool(found_steps(folder)))
        must = "a folder without checkpoints, unless run.resume = true continues from them"
        check(settings.run.resume or not held, "run.folder", str(folder), must)
        yield folder
    finally:
        lock.release()


def _on_main(act: Callable[[], T]) -> T:
    """As ``manifest.on_main``, with an OSError as the folder's ValueError."""

    def named() -> T:
        try:
            return act()
        except OSError as error:
            raise ValueError(f"run.folder must be a folder to write in, got {error}") from None

    return on_main(named)


def _make(run: RunSettings) -> str:
    """Make the folder if it does not exist; without ``run.folder`` a new one."""
    if run.folder:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        return run.folder
    fresh = f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = fresh if number == 1 else f"{fresh}-{number}"
        try:
            Path(folder).mkdir(parents=True)
            break
        except FileExistsError:
            # Another run was started in the same second.
            continue
    return folder


def _check_shared(folder: Path, ranks: Ranks) -> None:
    """Refuse a folder that is not the same on every rank: checkpoints would be incomplete."""
    token = ranks.from_main(secrets.token_hex(8))
    path = folder / f"{NAME}.seen-{token}"
    _on_main(lambda: _write(path, token))
    try:
        seen: list[tuple[str, bool]] = [("", False)] * ranks.size
        dist.all_gather_object(seen, (socket.gethostname(), _reads(path, token)))
    finally:
        if ranks.is_main:
            path.unlink(missing_ok=True)
    blind = [rank for rank, (_, sees) in enumerate(seen) if not sees]
    hosts = ", ".join(dict.fromkeys(seen[rank][0] for rank in blind))
    why = f"{show_ranks(blind)} (on {hosts}) cannot see what rank 0 (on {seen[0][0]}) writes there"
    must = f"a folder that all nodes share, by its whole path ({why})"
    check(not blind, "run.folder", str(folder), must)


def _reads(path: Path, token: str) -> bool:
    end = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            # Not there, or not yet.
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _take(lock: FolderLock, ranks: Ranks) -> None:
    """Make the folder this run's, after waiting for an owner that may be dead. Collective.

    Any rank on the owner's machine knows whether the owner is alive, so a restarted run never waits
    for its own former processes.
    """
    known: dict[str, float] = {}
    beats_seen: dict[tuple[str, float], float] = {}
    while True:
        found = _on_main(lambda: _try(lock, beats_seen))
        if not found:
            return
        owner = Owner(**found["owner"])
        seen: list[bool | None] = [None] * ranks.size
        dist.all_gather_object(seen, owner.lives())
        waited = owner.token in known
        beats = known.setdefault(owner.token, found["heard"]) != found["heard"]
        lives = False not in seen and (True in seen or beats)
        must = f"a folder in which no other run trains ({owner} does)"
        check(not lives, "run.folder", str(lock.path.parent), must)
        if False in seen or found["age"] >= STALE_SECONDS:
            _on_main(partial(lock.remove, owner))
            continue
        if ranks.is_main and not waited:
            left = STALE_SECONDS - found["age"]
            print(
                f"run.folder: {lock.path.parent} was left by {owner}, {found['age']:.0f} s ago, or "
                f"is still in use; waiting for a sign of it, {left:.0f} s at most",
                flush=True,
            )
        time.sleep(1.0)


def _try(lock: FolderLock, beats: dict[tuple[str, float], float]) -> dict[str, Any]:
    """Take the lock. Returns an empty dict if it is ours, else its owner and the last heartbeat.

    Args:
        beats: when each pair of owner and heartbeat was first seen, by this process's clock: a
            wrong clock may have left a heartbeat of the future, which would never get old.
    """
    while not lock.take():
        owner, heard = lock.holder(), lock.heard()
        if owner is not None and heard is not None:
            seen = beats.setdefault((owner.token, heard), time.monotonic())
            age = max(lock.now() - heard, time.monotonic() - seen)
            return {"owner": dataclasses.asdict(owner), "heard": heard, "age": age}
    return {}


def write_settings(folder: Path, settings: Settings) -> None:
    """Write the run's ``settings.toml``, whole or not at all. Collective.

    Raises:
        ValueError: on every rank, naming the file, if it cannot be written.
    """
    path = folder / "settings.toml"

    def write() -> None:
        new = path.with_name(f"{path.name}.new")
        try:
            _write(new, to_toml(settings))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    _on_main(write)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        # On a full disk the error has no file name.
        raise OSError(error.errno, error.strerror, str(path)) from None

"""The manifest of a checkpoint: every file's size and checksum, written last, verified first.

Ranks share the reading: of P ranks, rank r reads the files r, r + P, ... and every rank gets all
results. Every rank raises what one rank finds wrong, so that no rank waits for another.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launch.engines.registry import all_specs
from launch.settings import FORMAT

MANIFEST = "manifest.json"
_PIECE = 1 << 22
"""Bytes that are read at once."""

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class NewerFormatError(ValueError):
    """A checkpoint is of a later version of this program."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Args:
        data: digest of the tokens that the run reads; empty when that is not known.
        code: of the program that wrote it.
        files: (bytes, SHA-256) by the path within the checkpoint's folder.
    """

    step: int
    engine: str
    world_size: int
    data: str
    code: str
    files: Mapping[str, tuple[int, str]]


_GROUP: ContextVar[dist.ProcessGroup | None] = ContextVar("group of checkpoints", default=None)


@contextmanager
def messages_over(group: dist.ProcessGroup) -> Iterator[None]:
    """The collective functions of checkpoints use ``group``, of all ranks, instead of the default
    one, on the thread that is in this context."""
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def message_group() -> dist.ProcessGroup | None:
    """Of ``messages_over``; None is the default group."""
    return _GROUP.get()


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank; collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=message_group())
    return found


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, on every rank; collective.

    Raises:
        ValueError, CheckpointError: on every rank: the former if that was raised, the latter for an
            OSError.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except ValueError as error:
            box[1] = ValueError(str(error))
        except (OSError, CheckpointError) as error:
            box[1] = CheckpointError(str(error))
    dist.broadcast_object_list(box, src=0, group=message_group())
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def raise_on_all(problem: str | None) -> None:
    """Raise CheckpointError on every rank if one has a problem, even an empty one; collective."""
    problems = [text for text in gather(problem) if text is not None]
    if problems:
        raise CheckpointError("; ".join(filter(None, dict.fromkeys(problems))))


@contextmanager
def shared_failure() -> Iterator[None]:
    """Turns what torch.distributed.checkpoint raises, on every rank, into CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        each = [f"rank {rank}: {found!r}" for rank, (found, _) in sorted(error.failures.items())]
        raise CheckpointError("; ".join(each)) from None


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to the disk, where the file system needs that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file and sync it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(path: Path, step: int, engine: str, data: str, code: str) -> None:
    """Write the manifest of all files in ``path`` and sync it to the disk; collective.

    Raises:
        CheckpointError: on every rank, naming the file.
    """
    # Each rank sees at least what it wrote itself, whatever the file system keeps in caches.
    own, problem = set(), None
    try:
        own = set(_files(path))
    except OSError as error:
        problem = str(error)
    raise_on_all(problem)
    names = sorted(set().union(*gather(own)))
    found = hash_files(path, names, sync=True)
    for name, result in found.items():
        if isinstance(result, str):
            raise CheckpointError(f"{name}: {result}")
    manifest = Manifest(step, engine, dist.get_world_size(), data, code, found)  # type: ignore[arg-type]

    def write() -> None:
        write_text(path / MANIFEST, _to_json(manifest))
        for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
            sync_folder(folder)

    on_main(write)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: saying what is wrong with it.
        NewerFormatError: if it is of a later version of this program.
    """
    file = path / MANIFEST
    if file.exists() and not file.is_file():
        raise ValueError(f"{MANIFEST} is not a file")  # Reading a pipe would wait.
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    number = table.get("format") if isinstance(table, dict) else None
    if type(number) is not int:
        raise ValueError(f"{MANIFEST} has no format number")
    if number < 1:
        raise ValueError(f"{MANIFEST} has the format number {number}, which is not one")
    if number > FORMAT:
        must = f"at most {FORMAT} (a later version of this program wrote it)"
        raise NewerFormatError(f"format of {file} must be {must}, got {number}")
    checksum = table.pop("sha256", None)
    if checksum != _checksum(table):
        raise ValueError(f"{MANIFEST} is not what was written: its own checksum differs")
    try:
        del table["format"]
        files = {name: (size, sha256) for name, (size, sha256) in table.pop("files").items()}
        manifest = Manifest(**table, files=files)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{MANIFEST} lacks what a manifest has") from None
    values: list[tuple[Any, type]] = [(manifest.step, int), (manifest.world_size, int)]
    values += [(text, str) for text in (manifest.engine, manifest.data, manifest.code)]
    values += [pair for size, sha256 in files.values() for pair in ((size, int), (sha256, str))]
    if not all(type(value) is kind for value, kind in values):
        raise ValueError(f"{MANIFEST} lacks what a manifest has")
    for name in files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
            raise ValueError(
                f"{MANIFEST} names {name!r}, which is not a path within the checkpoint"
            )
    return manifest


def check_sizes(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint without reading its files: some are missing, are links, have
    another size, or are not in the manifest although an engine would read them."""
    problems = []
    for name, (size, _) in manifest.files.items():
        file = path / name
        if any(p.is_symlink() for p in (file, *file.parents) if path in p.parents):
            problems.append(f"{name} is a link, or lies under one")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            found = file.stat().st_size
            problems.append(f"{name} has {found:,} bytes, {size:,} in the manifest")
    known = {*manifest.files, MANIFEST}
    suffixes = tuple({end for spec in all_specs() for end in spec.file_suffixes})
    for name in _files(path):
        if name not in known and name.endswith(suffixes):
            problems.append(f"{name} is not in the manifest")
    return problems


def check_bytes(path: Path, manifest: Manifest) -> list[str]:
    """The files whose bytes changed since they were written; collective, the same everywhere."""
    problems = []
    for name, result in hash_files(path, sorted(manifest.files)).items():
        if isinstance(result, str):
            problems.append(f"{name}: {result}")
        elif result != manifest.files[name]:
            problems.append(f"{name} is not what was written: its checksum differs")
    return problems


def hash_files(
    path: Path, names: Sequence[str], *, sync: bool = False
) -> dict[str, tuple[int, str] | str]:
    """(bytes, SHA-256) of each file, or why it cannot be read; collective, the same everywhere.

    Args:
        names: the same on every rank.
        sync: also sync the files to the disk.
    """
    own: dict[str, tuple[int, str] | str] = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        try:
            own[name] = hash_file(path / name, sync)
        except OSError as error:
            own[name] = str(error)
    found = {name: result for part in gather(own) for name, result in part.items()}
    return {name: found[name] for name in names}


def hash_file(path: Path, sync: bool = False) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, which is also synced to the disk if asked."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha256.update(piece)
            size += len(piece)
        if sync:
            os.fsync(file.fileno())
    return size, sha256.hexdigest()


def _files(path: Path) -> list[str]:
    return [p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()]


def _to_json(manifest: Manifest) -> str:
    table = {"format": FORMAT, **asdict(manifest)}
    table["files"] = {name: list(found) for name, found in manifest.files.items()}
    return json.dumps({**table, "sha256": _checksum(table)}, indent=1)


def _checksum(table: Mapping[str, Any]) -> str:
    """Checksum of a manifest's content, without the checksum itself."""
    text = json.dumps(table, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

"""Checkpoints are data: what is read here runs no code, whoever wrote it.

``.metadata`` of torch.distributed.checkpoint is read by ``dcp_metadata``, and what torch.save
wrote, byte entries too, by ``torch.load(weights_only=True)``. ``load`` reads a checkpoint so. Where
a library opens the files itself, ``check_dcp`` and ``read_file`` read them first, and
``weights_only`` holds each torch.load of the library to it.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.futures import Future

from nsa_dist.checkpoints.dcp_metadata import DCP_FORM, in_a_line, read_metadata

PLAIN_VALUES = "hold tensors and plain values only"
"""What errors say that a file must do."""


class SafeReader(FileSystemReader):
    """Reads what ``read_metadata`` has checked.

    Raises:
        ValueError: as ``read_metadata``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = read_metadata(Path(path))

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As the base class, a file at a time, so that errors name the file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            place = self.storage_data.get(item.storage_index)
            if place is None:
                key = item.storage_index.fqn
                raise ValueError(f"{self.path} must {DCP_FORM}, got no place for {key!r}")
            by_file.setdefault(place.relative_path, []).append(item)
        for name, items in by_file.items():
            with named_errors(str(Path(self.path) / name), DCP_FORM):
                super().read_data(replace(plan, items=items), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class SafePlanner(DefaultLoadPlanner):
    """Reads byte entries as tensors and plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        with weights_only():
            super().load_bytes(read_item, value)


def load(state: dict[str, Any], path: Path) -> None:
    """Fill ``state`` from a checkpoint of torch.distributed.checkpoint; collective.

    Raises:
        ValueError: on every rank, naming the file and what was found in it.
    """
    reader = on_every_rank(lambda: SafeReader(path))
    try:
        load_dcp(state, storage_reader=reader, planner=SafePlanner())
    except CheckpointException as error:
        told = [str(each) for each, _ in error.failures.values() if isinstance(each, ValueError)]
        if not told:
            raise
        named = [each if each.startswith(str(path)) else f"{path}: {each}" for each in told]
        raise ValueError("; ".join(dict.fromkeys(named))) from error


def check_dcp(path: Path, *files: str) -> None:
    """Refuse a checkpoint whose ``.metadata`` or byte entries hold more than data; collective.

    For libraries that read it themselves; rank 0 reads.

    Args:
        files: others in its folder, written by torch.save, which may hold no more either.

    Raises:
        ValueError: on every rank, naming the file and what was found in it.
    """

    def read() -> None:
        metadata = read_metadata(path)
        for index, place in metadata.storage_data.items():
            # Tensors are read by weights_only=True in any case.
            stored = metadata.state_dict_metadata.get(index.fqn)
            if not isinstance(stored, TensorStorageMetadata):
                with (path / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    data = io.BytesIO(file.read(place.length))
                with named_errors(str(path / place.relative_path), PLAIN_VALUES):
                    torch.load(data, map_location="cpu", weights_only=True)
        for name in files:
            read_file(path / name)

    on_every_rank(read if _rank() == 0 else lambda: None)


def read_file(file: Path, must: str = PLAIN_VALUES) -> Any:
    """What torch.save wrote: tensors, mapped from the file, and plain values.

    Args:
        must: what the file must do, for errors.

    Raises:
        ValueError: naming the file and what was found in it.
    """
    if not file.is_file():
        raise ValueError(f"{file} must {must}, got no file")
    with named_errors(str(file), must):
        with file.open("rb") as opened:
            # Files of old versions of torch are no archives, and cannot be mapped.
            mapped = opened.read(4) == b"PK\x03\x04"
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def weights_only(allowed: Iterable[Any] = ()) -> Iterator[None]:
    """Within it each torch.load of this process reads tensors, plain values and ``allowed``.

    Also where a library asks it for more. What torch.serialization.add_safe_globals was given
    works as ever.
    """
    known = torch.serialization.get_safe_globals()
    added = [each for each in allowed if each not in known]
    force, others = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, others)}
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals(added):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def named_errors(name: str, must: str) -> Iterator[None]:
    """Turn what reading a file raises into a ValueError that names it and what it must do."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(name):
            raise
        told = in_a_line(str(error))
        raise ValueError(f"{name} must {must}, got unreadable data ({told})") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name} must {must}, got {_unsafe(str(error))}") from error
    except Exception as error:  # A damaged file can raise any exception.
        told = f"{type(error).__name__}: {in_a_line(str(error))}"
        raise ValueError(f"{name} must {must}, got unreadable data ({told})") from error


def on_every_rank(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, or on every rank the errors of any; collective.

    Raises:
        ValueError: with the words of the ranks whose ``read`` raised one.
    """
    found, problem = None, None
    try:
        found = read()
    except ValueError as error:
        problem = str(error)
    problems = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    told = [each for each in dict.fromkeys(problems) if each is not None]
    if told:
        raise ValueError("; ".join(told))
    return found


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _unsafe(message: str) -> str:
    """What an error of torch.load(weights_only=True) is about."""
    found = re.search(r"GLOBAL (\S+) ", message)
    if found:
        return f"{in_a_line(found[1])}, which is not allowed"
    (line, *_) = re.findall(r"WeightsUnpickler error: (.*)", message) or [message]
    return in_a_line(line)

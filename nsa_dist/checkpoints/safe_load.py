"""Load checkpoints without running code that they may contain.

``dcp_metadata`` reads the ``.metadata`` of torch.distributed.checkpoint, and
``torch.load(weights_only=True)`` reads everything that torch.save wrote, byte entries included.
``load`` combines both. For a library that opens files itself, call ``check_dcp`` and ``read_file``
first, and let it load within ``weights_only``, which also restricts its own torch.load.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
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
    """A reader that checks ``.metadata`` first, and names the file in errors.

    Raises:
        ValueError: as in ``read_metadata``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = read_metadata(Path(path))

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As in the base class, but one file at a time, so that errors name the file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            part = self.storage_data.get(item.storage_index)
            if part is None:
                key = item.storage_index.fqn
                raise ValueError(f"{self.path} must {DCP_FORM}, got no file for {key!r}")
            by_file.setdefault(part.relative_path, []).append(item)
        for name, items in by_file.items():
            with named_errors(str(Path(self.path) / name), DCP_FORM):
                super().read_data(replace(plan, items=items), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class SafePlanner(DefaultLoadPlanner):
    """A planner that accepts only tensors and plain values in byte entries."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        with weights_only():
            super().load_bytes(read_item, value)


def load(state: dict[str, Any], path: Path) -> None:
    """Fill ``state`` from a checkpoint of torch.distributed.checkpoint. A collective.

    Raises:
        ValueError: on every rank, if a file is missing, damaged or contains more than data.
    """
    _load(state, path, on_every_rank(lambda: SafeReader(path)))


def read_into(tensors: dict[str, Tensor], path: Path) -> None:
    """Fill tensors on the CPU, by key, from a checkpoint of torch.distributed.checkpoint; not a
    collective.

    Raises:
        ValueError: if a file is missing, damaged or contains more than data.
    """
    with warnings.catch_warnings():
        # That this process reads alone is what was asked for.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        _load(tensors, path, SafeReader(path), no_dist=True)


def _load(state: dict[str, Any], path: Path, reader: SafeReader, no_dist: bool = False) -> None:
    try:
        load_dcp(state, storage_reader=reader, planner=SafePlanner(), no_dist=no_dist)
    except CheckpointException as error:
        messages = [
            str(each) for each, _ in error.failures.values() if isinstance(each, ValueError)
        ]
        if not messages:
            raise
        named = [each if each.startswith(str(path)) else f"{path}: {each}" for each in messages]
        raise ValueError("; ".join(dict.fromkeys(named))) from error


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint of torch.distributed.checkpoint, by key. A collective.

    Args:
        wanted: whether a key's tensor is read.

    Raises:
        ValueError: on every rank, if a file is missing, damaged or contains more than data.
    """
    sizes = on_every_rank(lambda: read_metadata(path)).state_dict_metadata
    tensors = {
        key: torch.empty(size.size, dtype=size.properties.dtype)
        for key, size in sizes.items()
        if isinstance(size, TensorStorageMetadata) and wanted(key)
    }
    load(tensors, path)
    return tensors


def check_dcp(path: Path, *files: str) -> None:
    """Check a checkpoint of torch.distributed.checkpoint on rank 0. A collective.

    Call it before a library reads the checkpoint.

    Args:
        files: names of other files in its folder that torch.save wrote, to check too.

    Raises:
        ValueError: on every rank, if ``.metadata``, a byte entry or one of ``files`` contains more
            than data.
    """

    def read() -> None:
        metadata = read_metadata(path)
        for index, part in metadata.storage_data.items():
            # Every reader loads tensors with weights_only=True.
            stored = metadata.state_dict_metadata.get(index.fqn)
            if not isinstance(stored, TensorStorageMetadata):
                with (path / part.relative_path).open("rb") as file:
                    file.seek(part.offset)
                    data = io.BytesIO(file.read(part.length))
                with named_errors(str(path / part.relative_path), PLAIN_VALUES):
                    torch.load(data, map_location="cpu", weights_only=True)
        for name in files:
            read_file(path / name)

    on_every_rank(read if _rank() == 0 else lambda: None)


def read_file(file: Path, must: str = PLAIN_VALUES) -> Any:
    """Load a file of torch.save with tensors, mapped from the file, and plain values.

    Args:
        must: what the file must do, for errors.

    Raises:
        ValueError: if the file is missing, damaged or contains more than data.
    """
    if not file.is_file():
        raise ValueError(f"{file} must {must}, got no file")
    with named_errors(str(file), must):
        with file.open("rb") as opened:
            # Only zip archives can be mapped; old versions of torch wrote another format.
            mapped = opened.read(4) == b"PK\x03\x04"
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _member(enum: Any, name: Any) -> Enum:
    """What ``getattr`` gives, of an enum and the name of one of its members alone.

    Raises:
        UnpicklingError: for anything else.
    """
    members = dict[str, Enum](enum.__members__) if type(enum) is EnumMeta else {}
    if type(name) is not str or name not in members:
        raise pickle.UnpicklingError("getattr of no member of an enum")
    return members[name]


_MEMBERS = (_member, "builtins.getattr")
"""How Python 3.11.0 to 3.11.3 pickle the members of enums; the enum itself must be allowed too."""


@contextmanager
def weights_only(allowed: Iterable[Any] = ()) -> Iterator[None]:
    """A context in which every torch.load of this process only accepts tensors, plain values and
    the classes ``allowed``, even if its caller passes weights_only=False.

    Classes from torch.serialization.add_safe_globals stay allowed.
    """
    known = torch.serialization.get_safe_globals()
    added = [each for each in (*allowed, _MEMBERS) if each not in known]
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
        reason = in_a_line(str(error))
        raise ValueError(f"{name} must {must}, got unreadable data ({reason})") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name} must {must}, got {_unsafe(str(error))}") from error
    except Exception as error:  # A damaged file can raise any exception.
        reason = f"{type(error).__name__}: {in_a_line(str(error))}"
        raise ValueError(f"{name} must {must}, got unreadable data ({reason})") from error


def on_every_rank(read: Callable[[], Any]) -> Any:
    """Return ``read()``; if it raises ValueError on any rank, raise on all. A collective.

    Raises:
        ValueError: with the messages of all ranks whose ``read`` raised one.
    """
    result, problem = None, None
    try:
        result = read()
    except ValueError as error:
        problem = str(error)
    problems = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    messages = [each for each in dict.fromkeys(problems) if each is not None]
    if messages:
        raise ValueError("; ".join(messages))
    return result


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _unsafe(message: str) -> str:
    """The content that torch.load(weights_only=True) refused, from its error message."""
    match = re.search(r"GLOBAL (\S+) ", message)
    if match:
        return f"{in_a_line(match[1])}, which is not allowed"
    (line, *_) = re.findall(r"WeightsUnpickler error:\s*(.+)", message) or [message]
    return in_a_line(line)

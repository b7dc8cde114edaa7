"""Read the ``.metadata`` of torch.distributed.checkpoint without running code from it.

The file is a pickle, and a pickle can call any function of any module. This reader only accepts an
exact list of names, builds none of their objects while it reads, and makes the result from values
whose types it checks. The files that ``.metadata`` names must be in the checkpoint's folder and
hold the bytes that it refers to.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

DCP_FORM = "be as torch.distributed.checkpoint writes it"
"""What errors say that a file must do."""

MOST_SHOWN = 300
"""Maximal number of characters of a file's contents in an error."""

_NAMES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    # Megatron stores what each rank wrote, for its next save.
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    # Python 3.11.0 to 3.11.3 pickle a member of an enum as this of the enum and its name.
    "builtins": ("getattr",),
    # The path of the checkpoint when it was written; nothing reads it.
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""Modules and names that a ``.metadata`` may contain, besides torch's dtypes."""

_CALLED = ("PosixPath", "Size", "WriteItemType", "_MEM_FORMAT_ENCODING", "_get_layout")
"""Names that the pickle calls with arguments; for the others it sets attributes."""

_ENUMS = {
    enum.__name__: {member.name: member.value for member in enum}
    for enum in (_MEM_FORMAT_ENCODING, WriteItemType)
}
"""Values by name of the enums that a ``.metadata`` may have members of."""

_LAYOUTS = {str(x): x for x in vars(torch).values() if isinstance(x, torch.layout)}
_FORMATS = {x.value: x for x in _MEM_FORMAT_ENCODING}


class _Refused(Exception):
    """Content of a file that is not allowed."""


class _Record:
    """Stands for an object in the pickle: its constructor arguments and state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds containers, dtypes and records, and refuses any other name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # New classes for each file, because a pickle can set attributes of classes that it names.
        self._kinds = {
            (module, name): type(name, (_Record,), {})
            for module, names in _NAMES.items()
            for name in names
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._kinds:
            return self._kinds[module, name]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _Refused(f"{in_a_line(f'{module}.{name}')}, which no checkpoint names")


def read_metadata(path: Path) -> Metadata:
    """Read the ``.metadata`` of a checkpoint's folder, and check the files that it names.

    Raises:
        ValueError: if a file is missing, damaged, outside of the folder, or contains more than
            data.
    """
    file = path / ".metadata"
    try:
        _inside(path, file.name)
        data = file.read_bytes()
        metadata = _metadata(_Unpickler(io.BytesIO(data)).load())
        _check_files(path, metadata.storage_data)
    except _Refused as error:
        raise ValueError(f"{file} must {DCP_FORM}, got {error}") from error
    except Exception as error:  # A damaged pickle can raise any exception.
        reason = in_a_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{file} must {DCP_FORM}, got unreadable data ({reason})") from error
    return metadata


def in_a_line(text: str) -> str:
    """Text from a file, shortened to one line without control characters."""
    line = " ".join(text[:MOST_SHOWN].split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _inside(path: Path, name: str) -> int:
    """The size in bytes of a file, which must be in the folder."""
    file = path / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise _Refused(f"the file {name!r}, which is not in the folder")
    if not file.resolve().is_relative_to(path.resolve()):
        raise _Refused(f"the file {name!r}, a link that leaves the folder")
    if not file.is_file():
        raise _Refused(f"no file {name!r}")
    return file.stat().st_size


def _check_files(path: Path, parts: dict[MetadataIndex, _StorageInfo]) -> None:
    """Refuse parts of a checkpoint that are outside of its folder or of their file."""
    sizes: dict[str, int] = {}
    for index, part in parts.items():
        name = part.relative_path
        if name not in sizes:
            sizes[name] = _inside(path, name)
        end, size = part.offset + part.length, sizes[name]
        if end > size:
            raise _Refused(f"{index.fqn!r} up to byte {end} of {name!r}, which has {size}")


# The functions below turn records into objects and check the type of each value.


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise _Refused(f"{what} in an unknown form")


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _record(x: Any, name: str) -> _Record:
    _need(isinstance(x, _Record) and type(x).__name__ == name, name)
    assert isinstance(x, _Record)
    return x


def _fields(x: Any, name: str, *needed: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """The attributes of a dataclass, which is pickled as a dict."""
    record = _record(x, name)
    state = {} if record.state is None else record.state
    _need(record.args == () and type(state) is dict, name)
    _need({*needed} <= {*state} <= {*needed, *others}, name)
    return dict(state)


def _argument(x: Any, name: str) -> Any:
    """The argument of a call with a single argument."""
    record = _record(x, name)
    _need(len(record.args) == 1 and record.state is None, name)
    return record.args[0]


def _member(x: Any, enum: str) -> Any:
    """The value of a member of an enum."""
    if type(x).__name__ != "getattr":
        return _argument(x, enum)
    record = _record(x, "getattr")
    _need(len(record.args) == 2 and record.state is None, enum)
    kind, name = record.args
    _need(isinstance(kind, type) and issubclass(kind, _Record) and kind.__name__ == enum, enum)
    _need(type(name) is str and name in _ENUMS[enum], enum)
    return _ENUMS[enum][name]


def _size(x: Any) -> torch.Size:
    values = _argument(x, "Size")
    _need(type(values) is tuple and all(map(_is_count, values)), "Size")
    return torch.Size(values)


def _properties(x: Any) -> TensorProperties:
    record = _record(x, "TensorProperties")
    state = record.state
    _need(record.args == () and type(state) is tuple and len(state) == 5, "TensorProperties")
    dtype, layout, requires_grad, memory_format, pinned = state
    layout = _argument(layout, "_get_layout")
    _need(type(layout) is str and layout in _LAYOUTS, "layout")
    memory_format = _member(memory_format, "_MEM_FORMAT_ENCODING")
    _need(type(memory_format) is int and memory_format in _FORMATS, "memory_format")
    _need(isinstance(dtype, torch.dtype), "dtype")
    _need(type(requires_grad) is bool and type(pinned) is bool, "TensorProperties")
    properties = TensorProperties(dtype)
    properties.__setstate__(
        (dtype, _LAYOUTS[layout], requires_grad, _FORMATS[memory_format], pinned)
    )
    return properties


def _stored(x: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(x).__name__ == "BytesStorageMetadata":
        _fields(x, "BytesStorageMetadata")
        return BytesStorageMetadata()
    fields = _fields(x, "TensorStorageMetadata", "properties", "size", "chunks")
    size, chunks = _size(fields["size"]), []
    _need(type(fields["chunks"]) is list, "chunks")
    for each in fields["chunks"]:
        chunk = _fields(each, "ChunkStorageMetadata", "offsets", "sizes")
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        _need(len(offsets) == len(sizes) == len(size), "ChunkStorageMetadata")
        fits = all(o + s <= most for o, s, most in zip(offsets, sizes, size, strict=True))
        _need(fits, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(_properties(fields["properties"]), size, chunks)


def _index(x: Any) -> MetadataIndex:
    fields = _fields(x, "MetadataIndex", "fqn", others=("offset", "index"))
    offset, index = fields.get("offset"), fields.get("index")
    _need(type(fields["fqn"]) is str and (index is None or _is_count(index)), "MetadataIndex")
    return MetadataIndex(fields["fqn"], None if offset is None else _size(offset), index)


def _storage_info(x: Any) -> _StorageInfo:
    fields = _fields(x, "_StorageInfo", "relative_path", "offset", "length")
    _need(type(fields["relative_path"]) is str, "relative_path")
    _need(_is_count(fields["offset"]) and _is_count(fields["length"]), "_StorageInfo")
    return _StorageInfo(**fields)


def _metadata(x: Any) -> Metadata:
    others = ("all_local_plans", "planner_data", "storage_meta", "version")
    fields = _fields(x, "Metadata", "state_dict_metadata", "storage_data", others=others)
    stored, files, names = (
        fields[name] for name in ("state_dict_metadata", "storage_data", "planner_data")
    )
    _need(type(stored) is dict and all(type(key) is str for key in stored), "state_dict_metadata")
    _need(type(files) is dict, "storage_data")
    _need(names is None or type(names) is dict, "planner_data")
    for key, parts in (names or {}).items():
        _need(type(key) is str and type(parts) is tuple, "planner_data")
        _need(all(type(part) is str or _is_count(part) for part in parts), "planner_data")
    for name in ("all_local_plans", "storage_meta"):  # Checked and dropped.
        _check_plain(fields.get(name), set())
    version = fields.get("version")
    _need(version is None or type(version) is str, "version")
    return Metadata(
        {key: _stored(value) for key, value in stored.items()},
        names,
        {_index(key): _storage_info(value) for key, value in files.items()},
        StorageMeta(),
        version,
    )


def _check_plain(x: Any, seen: set[int]) -> None:
    """Refuse anything but containers, plain values, and records of such in the usual form."""
    if id(x) in seen:
        return
    seen.add(id(x))
    parts: Sequence[Any] = ()
    if isinstance(x, _Record) and type(x).__name__ == "getattr":
        enum = getattr(x.args[0], "__name__", "") if x.args else ""
        _need(enum in _ENUMS, "getattr")
        _member(x, enum)
    elif isinstance(x, _Record):
        name = type(x).__name__
        _need((x.state is None) if name in _CALLED else (x.args == ()), name)
        parts = (x.args, x.state)
    elif type(x) in (list, tuple):
        parts = x
    elif type(x) is dict:
        parts = (*x, *x.values())
    else:
        known = x is None or isinstance(x, torch.dtype)
        _need(known or type(x) in (str, int, bool), type(x).__name__)
    for part in parts:
        _check_plain(part, seen)

"""Checkpoints that were made to run code when they are read: refused by name, and nothing ran."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save

from nsa_dist.checkpoints.dcp_metadata import read_metadata
from nsa_dist.checkpoints.safe_load import check_dcp, load, read_file, weights_only
from tests.unit.crafted import ByName, Call, by_name, mkdir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

_METADATA = "torch.distributed.checkpoint.metadata"


def named(module: str, name: str) -> bytes:
    """Opcodes that push an attribute, as of protocol 4: dots in a name go down into it."""
    parts = (b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + b"".join(parts) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def in_storage_info(metadata: Metadata, marker: Path) -> Metadata:
    info = next(iter(metadata.storage_data.values()))
    info.relative_path = mkdir(marker)
    return metadata


def in_properties(metadata: Metadata, marker: Path) -> Metadata:
    """In what the class's own __setstate__ is given."""
    metadata.state_dict_metadata["w"].properties.requires_grad = mkdir(marker)
    return metadata


def in_an_index(metadata: Metadata, marker: Path) -> Metadata:
    (index, *_) = metadata.storage_data
    object.__setattr__(index, "index", mkdir(marker))
    return metadata


PICKLED: dict[str, Callable[[Metadata, Path], Any]] = {
    "the whole": lambda _, marker: mkdir(marker),
    "a shell": lambda _, marker: Call(os.system, f"mkdir {marker}"),
    "eval": lambda _, marker: Call(eval, f"__import__('os').mkdir({str(marker)!r})"),
    "exec": lambda _, marker: Call(exec, f"import os; os.mkdir({str(marker)!r})"),
    "a dict's value": lambda _, marker: {"state_dict_metadata": mkdir(marker)},
    "planner_data": lambda m, marker: dataclasses.replace(m, planner_data=mkdir(marker)),
    "planner_data's part": lambda m, marker: dataclasses.replace(
        m, planner_data={"w": (mkdir(marker),)}
    ),
    "storage_meta": lambda m, marker: dataclasses.replace(m, storage_meta=mkdir(marker)),
    "version": lambda m, marker: dataclasses.replace(m, version=mkdir(marker)),
    "a chunk": lambda m, marker: dataclasses.replace(
        m, state_dict_metadata={**m.state_dict_metadata, "w": mkdir(marker)}
    ),
    "a key": lambda m, marker: dataclasses.replace(
        m,
        storage_data={MetadataIndex(mkdir(marker)): 0},  # type: ignore[arg-type]
    ),
    "a file's name": in_storage_info,
    "what __setstate__ gets": in_properties,
    "an index": in_an_index,
}

# Of the marker's path; each makes that folder when pickle reads it.
OPCODES: dict[str, Callable[[str], bytes]] = {
    "dotted name": lambda path: named(_METADATA, "os.mkdir") + text(path) + b"\x85R.",
    "dotted name of torch": lambda path: named("torch", "os.mkdir") + text(path) + b"\x85R.",
    "protocol 0": lambda path: f"cos\nmkdir\n(S{path!r}\ntR.".encode(),
    "INST": lambda path: f"(S{path!r}\nios\nmkdir\n.".encode(),
    "OBJ": lambda path: b"\x80\x02(cos\nmkdir\n" + text(path) + b"o.",
    "Python 2's name": lambda path: (
        b"c__builtin__\neval\n" + text(f"__import__('os').mkdir({path!r})") + b"\x85R."
    ),
    "getattr": lambda path: (
        named("builtins", "getattr")
        + named("os", "path")[2:]
        + text("os")
        + b"\x86R0"
        + named("os", "mkdir")[2:]
        + text(path)
        + b"\x85R."
    ),
}

FORMS: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(100),
    "another object": pickle.dumps({"a": 1}),
    "text": b"[checkpoint]\nstep = 3\n",
    "a persistent id": b"\x80\x04\x8c\x01xQ.",
    "a persistent id as text": b"Px\n.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a class": named(_METADATA, "Metadata") + b".",
    "an allowed class called with something": named(_METADATA, "Metadata") + b"K\x01\x85R.",
    "an attribute of a class": named(_METADATA, "Metadata.__class__") + b".",
    "a module's module": named(_METADATA, "os") + b".",
    "a function of torch": named("torch", "load") + b".",
    "a class of torch": named("torch.distributed.checkpoint.filesystem", "FileSystemReader") + b".",
    "a loader": named("torch.serialization", "load") + text("other") + b"\x85R.",
    "copyreg": named("copyreg", "_reconstructor") + b".",
    "functools": named("functools", "partial") + b".",
    "operator": named("operator", "attrgetter") + b".",
    "numpy": named("numpy", "ndarray") + b".",
    "getattr of a class": named("builtins", "getattr")
    + named(_METADATA, "Metadata")[2:]
    + text("__init__")
    + b"\x86R.",
    "odd characters": named("os\n\x1b[2J", "system") + b".",
}


def refusal(path: Path) -> str:
    """What reading the metadata of ``path`` says."""
    with pytest.raises(ValueError) as error:
        read_metadata(path)
    message = str(error.value)
    expected = f"{path / '.metadata'} must be as torch.distributed.checkpoint writes it, got "
    assert message.startswith(expected)
    assert "\n" not in message
    return message


def assert_refused(path: Path, data: bytes, marker: Path) -> None:
    (path / ".metadata").write_bytes(data)
    refusal(path)
    with pytest.raises(ValueError, match=r"\.metadata must be .*, got "):
        load({"w": torch.zeros(3, 4)}, path)
    with pytest.raises(ValueError, match=r"\.metadata must be .*, got "):
        check_dcp(path)
    assert not marker.exists()


def assert_live(data: bytes, marker: Path) -> None:
    """A test that cannot fail is a defect: read by pickle, this runs."""
    with contextlib.suppress(Exception):
        pickle.loads(data)
    assert marker.exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; tests change copies of it."""
    path = tmp_path_factory.mktemp("good") / "step"
    state = {"w": torch.arange(12.0).view(3, 4), "nested": {"step": 3, "names": ["a"], "lr": 0.5}}
    save(state, checkpoint_id=path)
    return path


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "step"))


def metadata_of(path: Path) -> Metadata:
    found = pickle.loads((path / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    return found


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("place", PICKLED)
def test_trap_metadata_that_calls_a_function(path: Path, place: str, protocol: int) -> None:
    marker = path.parent / "ran"
    data = pickle.dumps(PICKLED[place](metadata_of(path), marker), protocol)
    assert_refused(path, data, marker)
    assert_live(data, marker)


@pytest.mark.parametrize("opcodes", OPCODES)
def test_trap_metadata_of_other_opcodes_that_calls_a_function(path: Path, opcodes: str) -> None:
    marker = path.parent / "ran"
    data = OPCODES[opcodes](str(marker))
    assert_refused(path, data, marker)
    assert_live(data, marker)


@pytest.mark.parametrize("form", FORMS)
def test_metadata_of_another_form_is_refused(path: Path, form: str) -> None:
    assert_refused(path, FORMS[form], path.parent / "ran")


def test_metadata_cut_anywhere_is_refused(path: Path) -> None:
    whole = (path / ".metadata").read_bytes()
    for size in range(0, len(whole), 37):
        (path / ".metadata").write_bytes(whole[:size])
        refusal(path)


def test_reading_metadata_changes_no_class(path: Path) -> None:
    """Opcode BUILD sets attributes of what it is given, and that may be a class."""
    before = dict(vars(Metadata))
    state = b"N}" + text("version") + b"K\x07s\x86b."
    (path / ".metadata").write_bytes(named(_METADATA, "Metadata") + state)
    refusal(path)
    assert dict(vars(Metadata)) == before


def test_what_metadata_is_not_is_no_file(path: Path) -> None:
    (path / ".metadata").unlink()
    assert ", got no file '.metadata'" in refusal(path)
    os.mkfifo(path / ".metadata")
    assert ", got no file '.metadata'" in refusal(path)


def change_place(path: Path, **changes: Any) -> None:
    metadata = metadata_of(path)
    for info in metadata.storage_data.values():
        vars(info).update(changes)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "name",
    ["../other", "/etc/hostname", "a/../../other", "", ".", "none", "link", "linked/x", "\0"],
)
def test_trap_files_outside_the_folder(path: Path, name: str) -> None:
    (path.parent / "other").write_bytes(bytes(10000))
    (path.parent / "folder").mkdir()
    (path.parent / "folder" / "x").write_bytes(bytes(10000))
    (path / "a").mkdir()
    (path / "link").symlink_to(path.parent / "other")
    (path / "linked").symlink_to(path.parent / "folder")
    change_place(path, relative_path=name)
    assert "file" in refusal(path)


def test_a_link_to_the_folder_and_within_it_is_none_that_leaves(path: Path) -> None:
    (path / "inner").mkdir()
    (path / "__0_0.distcp").rename(path / "inner" / "x")
    (path / "__0_0.distcp").symlink_to("inner/x")
    (path.parent / "link").symlink_to(path)
    state = {"w": torch.zeros(3, 4)}
    load(state, path.parent / "link")
    assert state["w"].sum() == 66


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": -1},
        {"length": -1},
        {"offset": 1 << 40},
        {"length": 1 << 40},
        {"offset": True},
        {"length": 3.0},
        {"offset": "0"},
        {"relative_path": b"__0_0.distcp"},
        {"transform_descriptors": ["zstd"]},
    ],
    ids=str,
)
def test_places_that_are_none_are_refused(path: Path, changes: dict[str, Any]) -> None:
    change_place(path, **changes)
    refusal(path)


def entries(path: Path, value: Any) -> Path:
    """A checkpoint whose byte entry ``step`` is ``value``; its file."""
    shutil.rmtree(path)
    save({"w": torch.ones(3, 4), "nested": {"step": value}}, checkpoint_id=path)
    return path / "__0_0.distcp"


def test_trap_a_byte_entry_that_calls_a_function(path: Path) -> None:
    marker = path.parent / "ran"
    file = entries(path, [mkdir(marker)])
    for read in (lambda: load({"nested": {"step": 0}}, path), lambda: check_dcp(path)):
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value).startswith(f"{file} must ")
        assert str(error.value).endswith(", got posix.mkdir, which is not allowed")
    assert not marker.exists()
    with contextlib.suppress(Exception):
        load_dcp({"nested": {"step": 0}}, checkpoint_id=path)
    assert marker.exists()


def test_trap_an_entry_that_stands_in_a_tensor_s_place(path: Path) -> None:
    """One that the caller takes for a tensor's, and that the metadata calls bytes."""
    marker = path.parent / "ran"
    shutil.rmtree(path)
    save({"w": mkdir(marker)}, checkpoint_id=path)
    with pytest.raises(ValueError, match=r"__0_0\.distcp must .*, got posix\.mkdir"):
        load({"w": torch.zeros(3, 4)}, path)
    with pytest.raises(ValueError, match=r"__0_0\.distcp must .*, got posix\.mkdir"):
        check_dcp(path)
    assert not marker.exists()


def test_trap_a_tensor_s_entry_that_calls_a_function(path: Path) -> None:
    marker = path.parent / "ran"
    buffer = io.BytesIO()
    torch.save(mkdir(marker), buffer)
    (path / "__0_0.distcp").write_bytes(buffer.getvalue())
    change_place(path, offset=0, length=len(buffer.getvalue()))
    with pytest.raises(ValueError, match=r"__0_0\.distcp must .*, got posix\.mkdir"):
        load({"w": torch.zeros(3, 4)}, path)
    assert not marker.exists()


def test_what_was_written_is_read(good: Path) -> None:
    state = {"w": torch.zeros(3, 4), "nested": {"step": 0, "names": [""], "lr": 0.0}}
    load(state, good)
    assert torch.equal(state["w"], torch.arange(12.0).view(3, 4))
    assert state["nested"] == {"step": 3, "names": ["a"], "lr": 0.5}
    check_dcp(good)
    found, expected = read_metadata(good), metadata_of(good)
    assert dataclasses.replace(found, storage_meta=expected.storage_meta) == expected


def test_what_python_3_11_0_wrote_is_read(path: Path) -> None:
    """Debian 12 has 3.11.2."""
    expected = metadata_of(path)
    plan = [SavePlan([WriteItem(MetadataIndex("w"), WriteItemType.TENSOR)])]
    written = dataclasses.replace(expected)
    vars(written)["all_local_plans"] = plan  # Megatron's; not every torch has the field.
    data = by_name(written)
    assert data.count(b"getattr") == 1 and b"TORCH_CONTIGUOUS_FORMAT" in data
    (path / ".metadata").write_bytes(data)
    found = read_metadata(path)
    assert dataclasses.replace(found, storage_meta=expected.storage_meta) == expected
    state = {"w": torch.zeros(3, 4)}
    load(state, path)
    assert torch.equal(state["w"], torch.arange(12.0).view(3, 4))
    check_dcp(path)


@pytest.mark.parametrize("name", ["TENSOR", "__class__", "_member_map_", "none"])
def test_trap_other_attributes_of_an_enum_in_metadata(path: Path, name: str) -> None:
    (path / ".metadata").write_bytes(by_name(metadata_of(path), name))
    assert "_MEM_FORMAT_ENCODING in an unknown form" in refusal(path)


class Stage(Enum):
    """One that a library writes."""

    WEIGHTS = 3


def test_members_of_allowed_enums_are_read_by_name(tmp_path: Path) -> None:
    """As DeepSpeed's stage is in what Python 3.11.0 to 3.11.3 wrote."""
    by_names = SimpleNamespace(Pickler=ByName, __name__="by_names")
    file = tmp_path / "states.pt"
    torch.save({"stage": Stage.WEIGHTS}, file, pickle_module=by_names)
    with weights_only([Stage]):
        assert read_file(file) == {"stage": Stage.WEIGHTS}
    with weights_only(), pytest.raises(ValueError, match=r"Stage, which is not allowed"):
        read_file(file)
    for value in (Call(getattr, Stage, "mro"), Call(getattr, Stage.WEIGHTS, "value")):
        torch.save({"stage": value}, file)
        with weights_only([Stage]), pytest.raises(ValueError, match="getattr of no member of an"):
            read_file(file)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before archives"])
def test_trap_a_file_of_torch_save_that_calls_a_function(tmp_path: Path, archive: bool) -> None:
    marker, file = tmp_path / "ran", tmp_path / "common.pt"
    torch.save({"step": mkdir(marker)}, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError) as error:
        read_file(file)
    rule = "hold tensors and plain values only"
    assert str(error.value) == f"{file} must {rule}, got posix.mkdir, which is not allowed"
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not marker.exists()
    torch.save({"step": 3, "w": torch.ones(2)}, file, _use_new_zipfile_serialization=archive)
    assert read_file(file)["step"] == 3
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"common\.pt must .*, got unreadable data"):
        read_file(file)


def test_weights_only_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before, known = dict(os.environ), torch.serialization.get_safe_globals()
    with weights_only([Call]):
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    assert dict(os.environ) == before
    torch.serialization.add_safe_globals([Call])
    with weights_only([Call]):
        pass
    assert Call in torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)

"""Checkpoints that hold more than data: resuming and converting refuse them by name, on every rank,
and nothing of theirs runs. Their manifests are valid, as an attacker can write those too.

``tests/unit/test_safe_load.py`` has the ways in which a file can be made to run something, and
``tests/adapters/deepspeed/test_untrusted_checkpoints.py`` DeepSpeed's files.
"""

from __future__ import annotations

import io
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from launch.bench.record_choices import RecordOptions
from launch.convert import convert
from launch.settings import Settings, to_toml
from tests.distributed.ranks import Ranks
from tests.launch.checkpoints import make_old, seal
from tests.launch.common import record_choices, replaced, run_training, tiny
from tests.launch.deepspeed import needs_deepspeed
from tests.launch.megatron import needs_megatron, run_megatron
from tests.launch.processes import TRAIN, started, torchrun
from tests.unit.crafted import mkdir

RanksOf = Callable[[int], Ranks]
Craft = Callable[[Path, Path], Path]
STEP = "step_00000002"


def in_metadata(path: Path, marker: Path) -> Path:
    """Code in what ``.metadata`` says of a plan that nobody reads; the file."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = {"step": (mkdir(marker),)}
    file.write_bytes(pickle.dumps(metadata))
    return file


def in_an_entry(path: Path, marker: Path) -> Path:
    """Code in a byte entry for every key; the file."""
    file = path / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(mkdir(marker), buffer)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        place.relative_path, place.offset = file.name, file.stat().st_size
        place.length = len(buffer.getvalue())
    metadata.storage_data |= {
        MetadataIndex(index.fqn): place for index, place in metadata.storage_data.items()
    }
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with file.open("ab") as end:
        end.write(buffer.getvalue())
    return file


def outside(path: Path, marker: Path) -> Path:
    """Parts in a file beside the folder; the file that says so."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for place in metadata.storage_data.values():
        shutil.copy(path / place.relative_path, path.parent / place.relative_path)
        place.relative_path = f"../{place.relative_path}"
    file.write_bytes(pickle.dumps(metadata))
    return file


def in_common(path: Path, marker: Path) -> Path:
    """Code in what Megatron keeps beside; the file."""
    torch.save({"step": mkdir(marker)}, path / "common.pt")
    return path / "common.pt"


CRAFTED: list[Craft] = [in_metadata, in_an_entry, outside]


def expected(file: Path) -> str:
    """How the refusal begins."""
    return f"{file} must "


@pytest.fixture(scope="module")
def trained(ranks_of: RanksOf, root: Path) -> Settings:
    """A run of FSDP2 on two ranks, that can go on."""
    folder = str(root / "trusted")
    run = {"steps": 2, "dtype": "float32", "folder": folder}
    settings = tiny(root, parallel={"cp": 2}, run=run)
    ranks_of(2).run(run_training, settings)
    return replaced(settings, "run", steps=3, resume=True)


def copied(settings: Settings, folder: Path) -> tuple[Settings, Path]:
    """The run in another folder; and its checkpoint."""
    shutil.copytree(settings.run.folder, folder)
    return replaced(settings, "run", folder=str(folder)), folder / "checkpoints" / STEP


def assert_refused(ranks: Ranks, function: Callable[..., Any], *args: Any, file: Path) -> None:
    for ok, told in ranks.try_run(function, *args):
        assert not ok
        assert f"ValueError: {expected(file)}" in told, told


@pytest.mark.parametrize(
    "craft", [in_metadata, in_an_entry, pytest.param(outside, marks=pytest.mark.slow)]
)
def test_trap_resuming_from_a_checkpoint_that_runs_code(
    ranks_of: RanksOf, trained: Settings, tmp_path: Path, craft: Craft
) -> None:
    settings, path = copied(trained, tmp_path / "run")
    marker = tmp_path / "ran"
    file = craft(path, marker)
    ranks_of(1).run(seal, path)
    assert_refused(ranks_of(2), run_training, settings, file=file)
    options = RecordOptions(tmp_path / "run", text=(Path(__file__),), length=99, device="cpu")
    assert_refused(ranks_of(1), record_choices, options, file=file)
    assert_refused(ranks_of(1), convert, path, tmp_path / "other", file=file)
    make_old(path)
    assert_refused(ranks_of(1), convert, path, tmp_path / "other", file=file)
    assert not marker.exists()


@pytest.fixture(scope="module")
def converted(ranks_of: RanksOf, trained: Settings, root: Path) -> Settings:
    """The same as one of Megatron's."""
    source = Path(trained.run.folder) / "checkpoints" / STEP
    ranks_of(1).run(convert, source, root / "trusted-megatron")
    settings = replaced(trained, "run", folder=str(root / "trusted-megatron"))
    return replaced(settings, "parallel", engine="megatron", cp=1, layout="zigzag_per_document")


@pytest.mark.parametrize("craft", [*CRAFTED, in_common])
def test_trap_converting_a_checkpoint_of_megatron_that_runs_code(
    ranks_of: RanksOf, converted: Settings, tmp_path: Path, craft: Craft
) -> None:
    _, path = copied(converted, tmp_path / "run")
    marker = tmp_path / "ran"
    file = craft(path, marker)
    ranks_of(1).run(seal, path)
    assert_refused(ranks_of(1), convert, path, tmp_path / "other", file=file)
    assert not marker.exists()


@needs_megatron
@pytest.mark.parametrize(
    "craft",
    [in_metadata, *(pytest.param(x, marks=pytest.mark.slow) for x in (in_an_entry, in_common))],
)
def test_trap_megatron_resuming_from_a_checkpoint_that_runs_code(
    ranks_of: RanksOf,
    megatron_ranks: RanksOf,
    converted: Settings,
    tmp_path: Path,
    craft: Craft,
) -> None:
    settings, path = copied(converted, tmp_path / "run")
    marker = tmp_path / "ran"
    file = craft(path, marker)
    ranks_of(1).run(seal, path)
    assert_refused(megatron_ranks(2), run_megatron, settings, file=file)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("craft", [in_metadata, in_an_entry])
def test_the_commands_say_so_once_and_end(
    ranks_of: RanksOf, trained: Settings, tmp_path: Path, craft: Craft
) -> None:
    settings, path = copied(trained, tmp_path / "run")
    marker, config = tmp_path / "ran", tmp_path / "config.toml"
    config.write_text(to_toml(settings))
    file = craft(path, marker)
    ranks_of(1).run(seal, path)
    lines = {
        "train": [*torchrun(2), str(config)],
        "convert": [sys.executable, TRAIN.replace("train", "convert"), str(path), str(tmp_path)],
    }
    for name, line in lines.items():
        with started(line, tmp_path, name) as process:
            assert process.wait() == 1
            assert process.text.count(f"{name}.py: {expected(file)}") == 1
            # torchrun has a traceback of its own.
            assert f'{name}.py", line' not in process.text
    assert not marker.exists()


@needs_deepspeed
@pytest.mark.slow
def test_the_command_of_deepspeed_says_so_once_and_ends(
    ranks_of: RanksOf, root: Path, tmp_path: Path
) -> None:
    run = {"steps": 2, "dtype": "float32", "folder": str(tmp_path / "run")}
    settings = tiny(root, parallel={"engine": "deepspeed", "cp": 2}, run=run)
    marker, config = tmp_path / "ran", tmp_path / "config.toml"
    config.write_text(to_toml(settings))
    line = [*torchrun(2), str(config)]
    with started(line, tmp_path, "before", DS_ACCELERATOR="cpu") as process:
        assert process.wait() == 0, process.text
    file = tmp_path / "run" / "checkpoints" / STEP / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "more": mkdir(marker)}, file)
    ranks_of(1).run(seal, file.parent)
    line += ["--run.resume", "True", "--run.steps", "3"]
    with started(line, tmp_path, "after", DS_ACCELERATOR="cpu") as process:
        assert process.wait() == 1
        assert process.text.count(f"train.py: {expected(file)}") == 1
    assert not marker.exists()

"""Checkpoints that hold more than data: refused by name on every rank before DeepSpeed reads them.

DeepSpeed itself reads all of its files with ``weights_only=False``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.deepspeed.small_model import Run
from tests.adapters.deepspeed.test_checkpoints import SAVED, TAG, refused
from tests.distributed.ranks import Ranks
from tests.traps.mutation import Replaced, catches
from tests.unit.crafted import mkdir

pytest.importorskip("deepspeed")

GetRanks = Callable[[int], Ranks]
CASE = replace(SAVED, stage=2)


@dataclass
class Note:
    """What a user may put into the client state."""

    text: str


def save(folder: str, state: dict[str, Any]) -> None:
    Run(CASE).engine.save_checkpoint(folder, tag=TAG, client_state=state)


def loaded_note(folder: str, allowed: list[type], options: dict[str, bool]) -> str:
    """The text of the client state's note."""
    from nsa_dist.adapters.deepspeed import load_checkpoint

    run = Run(CASE)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals(allowed):
        _, state = load_checkpoint(run.engine, folder, **options)
    assert set(torch.serialization.get_safe_globals()) == before
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    return str(state["note"].text)


@pytest.fixture(scope="module")
def saved(deepspeed_ranks: GetRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrusted")
    deepspeed_ranks(2).run(save, str(folder), {})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_class_of_the_user_is_refused_allowed_or_trusted(
    deepspeed_ranks: GetRanks, tmp_path: Path
) -> None:
    ranks, folder = deepspeed_ranks(2), str(tmp_path)
    ranks.run(save, folder, {"note": Note("seven")})
    file = tmp_path / TAG / "mp_rank_00_model_states.pt"
    for message in ranks.run(refused, CASE, folder, None):
        assert message.startswith(f"{file} must hold tensors and plain values only ")
        assert message.endswith(f", got {Note.__module__}.Note, which is not allowed")
        assert "torch.serialization.add_safe_globals([it])" in message
        assert "load_checkpoint(..., trusted=True)" in message
    assert ranks.run(loaded_note, folder, [Note], {}) == ["seven"] * 2
    assert ranks.run(loaded_note, folder, [], {"trusted": True}) == ["seven"] * 2


def unchecked(load_checkpoint: Any, *args: Any, **options: Any) -> Any:
    return load_checkpoint(*args, **{**options, "trusted": True})


@catches(
    "a checkpoint that runs code when it is loaded",
    "files are left to DeepSpeed, unchecked",
    Replaced("nsa_dist.adapters.deepspeed:load_checkpoint", unchecked),
    case="mp_rank_00_model_states.pt",
)
@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",  # Read by rank 1 alone.
        "another.pt",
    ],
)
def test_trap_a_file_of_deepspeed_that_calls_a_function(
    deepspeed_ranks: GetRanks, folder: Path, name: str
) -> None:
    file, marker = folder / TAG / name, folder / "ran"
    content = torch.load(file, weights_only=False) if file.exists() else {}
    torch.save({**content, "more": mkdir(marker)}, file)
    for message in deepspeed_ranks(2).run(refused, CASE, str(folder), None):
        assert message.startswith(f"{file} must hold tensors and plain values only ")
        assert message.endswith(", got posix.mkdir, which is not allowed")
    assert not marker.exists()


@pytest.mark.parametrize("link", [False, True], ids=["", "through a link"])
def test_trap_a_universal_form_that_calls_a_function(
    deepspeed_ranks: GetRanks, folder: Path, link: bool
) -> None:
    path, marker = folder / f"{TAG}_universal", folder / "ran"
    where = folder / "elsewhere" if link else path / "zero"
    (where / "head.weight").mkdir(parents=True)
    if link:
        path.mkdir()
        (path / "zero").symlink_to(where)
    (where / "loop").symlink_to(where)
    torch.save(mkdir(marker), where / "head.weight" / "fp32.pt")
    file = path / "zero" / "head.weight" / "fp32.pt"
    for message in deepspeed_ranks(2).run(refused, CASE, str(folder), path.name, True):
        assert message.startswith(f"{file} must hold tensors and plain values only ")
        assert message.endswith(", got posix.mkdir, which is not allowed")
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["../other", "/tmp"])
def test_a_latest_that_leaves_the_folder_is_refused(
    deepspeed_ranks: GetRanks, folder: Path, tag: str
) -> None:
    (folder / "latest").write_text(tag)
    for message in deepspeed_ranks(2).run(refused, CASE, str(folder), None):
        name = f"the name of a folder in {str(folder)!r}"
        assert message == f"the tag in {folder / 'latest'} must be {name}, got {tag!r}"

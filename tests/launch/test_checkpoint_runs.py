"""Damaged checkpoints, kills and full disks, in runs of every engine and by the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.settings import Settings, to_toml
from launch.storage.checkpoint import checkpoints
from launch.train import Result
from tests.distributed.ranks import RankError, Ranks
from tests.launch.checkpoints import (
    DAMAGE,
    cut,
    find,
    flip,
    run_with_full_disk,
    shard,
    universal_is_whole,
)
from tests.launch.common import replaced, tiny
from tests.launch.deepspeed import needs_deepspeed, run_deepspeed
from tests.launch.megatron import needs_megatron, run_megatron
from tests.launch.processes import TRAIN, started, torchrun
from tests.launch.test_deepspeed_engine import by_deepspeed
from tests.launch.test_megatron_engine import TP2, by_megatron

ROOT = Path(TRAIN).parents[1]
PATHS = [str(ROOT), str(ROOT / "kernels")]
pytestmark = pytest.mark.slow
RanksOf = Callable[[int], Ranks]
THREE = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 0}
LAST = "checkpoints/step_00000003"


def config(settings: Settings, folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(to_toml(settings))
    return path


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


@pytest.fixture(scope="module")
def by_torchrun(root: Path) -> tuple[Settings, Path]:
    """A run of two ranks, as users start it, and its folder."""
    folder = root / "by-torchrun"
    (root / "by-torchrun-output").mkdir()
    run = {**THREE, "log_every": 1, "folder": str(folder)}
    settings = tiny(root, parallel={"cp": 2}, run=run)
    output = root / "by-torchrun-output"
    with started([*torchrun(2), str(config(settings, output))], output) as process:
        assert process.wait() == 0, process.text
    return settings, folder


@pytest.mark.parametrize("kind", ["empty shard", "flipped bit", "cut settings", "cut manifest"])
def test_a_command_goes_on_from_the_newest_whole_one(
    by_torchrun: tuple[Settings, Path], tmp_path: Path, kind: str
) -> None:
    settings, folder = by_torchrun
    shutil.copytree(folder, tmp_path / "run")
    damage, _ = DAMAGE[kind]
    damage(tmp_path / "run" / LAST)
    settings = replaced(settings, "run", folder=str(tmp_path / "run"), resume=True)
    with started([*torchrun(2), str(config(settings, tmp_path))], tmp_path) as process:
        assert process.wait() == 0, process.text
    assert process.text.count("step_00000003 is passed over: ") == 1
    assert losses(tmp_path / "run") == losses(folder)
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["1", "2", "3"]


def test_a_command_without_a_whole_one_says_so_once_and_ends(
    by_torchrun: tuple[Settings, Path], tmp_path: Path
) -> None:
    settings, folder = by_torchrun
    shutil.copytree(folder, tmp_path / "run")
    for step in (1, 2, 3):
        cut(shard(tmp_path / "run" / "checkpoints" / f"step_0000000{step}"))
    settings = replaced(settings, "run", folder=str(tmp_path / "run"), resume=True)
    with started([*torchrun(2), str(config(settings, tmp_path))], tmp_path) as process:
        assert process.wait() == 1
    assert process.text.count("train.py: run.resume must find a whole checkpoint in") == 1
    # torchrun has a traceback of its own.
    assert f'File "{Path(TRAIN).parent}' not in process.text


SLOW = """
import sys, time
sys.path[:0] = {paths!r}
from launch import train
from launch.storage import checkpoint
inner = checkpoint.{name}
def slow(*args, **options):
    if "step_00000002" in str(args[0]):
        print("now", flush=True)
        time.sleep(600)
    return inner(*args, **options)
checkpoint.{name} = slow
train.main()
"""


@pytest.mark.parametrize(
    "name", ["write_text", "write_manifest", "_publish", "sync_folder"], ids=lambda name: name
)
def test_a_run_that_is_killed_while_it_saves_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, name: str
) -> None:
    """After the state, after the settings, and before and after the name."""
    run = {**THREE, "log_every": 1, "folder": str(tmp_path / "run"), "resume": True}
    settings = tiny(root, run=run)
    script = tmp_path / "slow.py"
    # Only the parent's name tells the last of these apart.
    text = SLOW.format(paths=PATHS, name=name)
    if name == "sync_folder":
        text = text.replace("in str(args[0])", 'in str(list(args[0].glob("step_00000002")))')
    script.write_text(text)
    line = [sys.executable, str(script), str(config(settings, tmp_path))]
    with started(line, tmp_path, "killed") as process:
        process.wait_for("now\n")
        os.kill(process.popen.pid, signal.SIGKILL)
        process.popen.wait()
    newest = checkpoints(tmp_path / "run")[-1].name
    assert newest == ("step_00000002" if name == "sync_folder" else "step_00000001")

    for name, folder in (("again", tmp_path / "run"), ("unbroken", tmp_path / "other")):
        path = config(replaced(settings, "run", folder=str(folder)), tmp_path)
        with started([sys.executable, TRAIN, str(path)], tmp_path, name) as process:
            assert process.wait() == 0, process.text
        assert [
            path.name for path in (folder / "checkpoints").iterdir() if path.name[0] == "."
        ] == []
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


def go_through(
    ranks: Ranks, run: Callable[[Settings], Result], settings: Settings, tmp_path: Path
) -> None:
    """Damage of each file, and full disks, in a run of two ranks."""
    expected, *_ = ranks.run(run, settings)
    folder = Path(settings.run.folder)
    for at, file in enumerate(sorted(path.name for path in (folder / LAST).iterdir())):
        copy = tmp_path / str(at)
        shutil.copytree(folder, copy)
        (flip if at % 2 else cut)(copy / LAST / file)
        (name, told), (other, _) = ranks.run(find, copy)
        assert name == other == "step_00000002", file
        assert file in told[0]
    again = replaced(settings, "run", folder=str(copy), resume=True)
    result, *_ = ranks.run(run, again)
    assert result.losses == expected.losses[2:]
    assert not list((copy / "checkpoints").glob(".*"))
    more = replaced(again, "run", steps=4)
    texts = ranks.run(run_with_full_disk, run, more, 1, 2000)
    assert texts[0] == texts[1]
    assert "step_00000004: not written (" in texts[0]
    assert [path.name[-1] for path in checkpoints(copy)] == ["1", "2", "3"]


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_of_deepspeed(
    deepspeed_ranks: RanksOf, root: Path, tmp_path: Path, stage: int
) -> None:
    parallel = {"zero_stage": stage, "cp": 2}
    folder = str(tmp_path / "run")
    settings = by_deepspeed(root, "independent", parallel, **THREE, folder=folder)
    go_through(deepspeed_ranks(2), run_deepspeed, settings, tmp_path)


@needs_megatron
def test_checkpoints_of_megatron(megatron_ranks: RanksOf, root: Path, tmp_path: Path) -> None:
    settings = by_megatron(root, "independent", TP2, **THREE, folder=str(tmp_path / "run"))
    go_through(megatron_ranks(2), run_megatron, settings, tmp_path)


@needs_deepspeed
@pytest.mark.parametrize("what", ["whole", "none", "tmp", "missing", "other"])
def test_a_universal_form_that_is_not_whole_is_refused(
    deepspeed_ranks: RanksOf, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "step_00000001"
    form = tmp_path / "step_00000001_universal"
    path.mkdir()
    (path / "mp_rank_00_model_states.pt").write_text("weights")
    if what != "none":
        (form / "zero").mkdir(parents=True)
        shutil.copy(path / "mp_rank_00_model_states.pt", form)
    if what == "tmp":
        (form / "tmp").mkdir()
    if what == "missing":
        (form / "mp_rank_00_model_states.pt").unlink()
    if what == "other":
        (form / "mp_rank_00_model_states.pt").write_text("others.")
    ranks = deepspeed_ranks(1)
    if what in ("whole", "none"):
        assert ranks.run(universal_is_whole, path) == [what == "whole"]
        return
    message: Any = (
        r"run\.resume must find the whole universal form of .*, got .*step_00000001_universal'"
    )
    with pytest.raises(RankError, match=message):
        ranks.run(universal_is_whole, path)

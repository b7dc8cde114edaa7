"""Training from a prepared folder: other tokens, damage, validation, the command line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.settings import Settings, to_toml
from launch.train import Result
from tests.distributed.ranks import RankError, Ranks
from tests.launch.checkpoints import flip
from tests.launch.common import replaced, run_training, tiny
from tests.launch.prepared import prepared
from tests.launch.processes import TRAIN, started, torchrun
from tests.launch.test_preparing import line
from tests.launch.test_training import assert_close, broken_off, run

RanksOf = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    """The documents, prepared in some shards."""
    result = prepared(root / "prepared", root / "documents", shard_mib=0.001)
    assert len(result.metadata.shards) > 3
    return root / "prepared"


def from_folder(root: Path, tokens: Path, **overrides: dict[str, object]) -> Settings:
    """The tiny run on a prepared folder."""
    overrides["data"] = {
        **overrides.get("data", {}),
        "source": "prepared",
        "path": str(tokens),
        "held_out": 0.05,
    }
    return tiny(root, **overrides)


@pytest.fixture(scope="module")
def unbroken(ranks_of: RanksOf, root: Path, data: Path) -> tuple[Settings, Result]:
    """A run of two ranks with a checkpoint half way."""
    options = {"steps": 10, "checkpoint_every": 5, "keep_checkpoints": 0}
    options |= {"folder": str(root / "prepared-run")}
    settings = from_folder(root, data, parallel={"cp": 2}, run=options)
    return settings, run(ranks_of(2), settings)


@pytest.mark.slow
def test_other_tokens_are_refused_and_moved_ones_are_not(
    ranks_of: RanksOf, root: Path, data: Path, unbroken: tuple[Settings, Result], tmp_path: Path
) -> None:
    settings, expected = unbroken
    settings = broken_off(settings, root, "prepared-other")
    shutil.copytree(root / "documents", tmp_path / "documents")
    (tmp_path / "documents" / "07.txt").write_text("another text")
    prepared(tmp_path / "other", tmp_path / "documents", shard_mib=0.001)
    other = replaced(settings, "data", path=str(tmp_path / "other"))
    with pytest.raises(RankError, match=r"data\.path must give the checkpoint's tokens \(digest "):
        ranks_of(2).run(run_training, other)
    shutil.copytree(data, tmp_path / "moved")
    moved = replaced(settings, "data", path=str(tmp_path / "moved"))
    assert run(ranks_of(2), moved).losses == expected.losses[5:]


def test_a_damaged_folder_ends_all_ranks_before_the_first_step(
    ranks_of: RanksOf, root: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    flip(tmp_path / "data" / "shards" / "000001" / "training.tokens")
    settings = from_folder(root, tmp_path / "data", run={"folder": str(tmp_path / "run")})
    answers = ranks_of(2).try_run(run_training, settings)
    for ok, text in answers:
        assert not ok
        assert "data.path must be a whole prepared folder, got " in text
        assert "000001/training.tokens is not what was written: its checksum differs" in text
    assert not (tmp_path / "run").exists()


def test_validation_reads_its_own_documents(
    ranks_of: RanksOf, root: Path, data: Path, tmp_path: Path
) -> None:
    """In memory and prepared, the same loss of the same start."""
    texts = tmp_path / "validation"
    texts.mkdir()
    for at in range(4):
        (texts / f"{at}.txt").write_text(f"{at} other words " * 30)
    # Held out or not, all would be read, but not in the order of the files.
    prepared(tmp_path / "prepared", texts, held_out=0.0)
    losses = []
    for name, settings in (
        ("folder", tiny(root, data={"held_out": 0.05, "validation_path": str(texts)})),
        (
            "prepared",
            from_folder(root, data, data={"validation_path": str(tmp_path / "prepared")}),
        ),
    ):
        options = {"steps": 1, "folder": str(tmp_path / name), "validation_streams": 100}
        settings = replaced(settings, "optimizer", lr=1e-30)
        (result,) = ranks_of(1).run(run_training, replaced(settings, "run", **options))
        losses.append(result.validation_loss)
    # Weights have hardly moved, by whatever was trained on.
    assert math.isclose(*losses, rel_tol=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prepare_train_and_resume_by_the_command_line(root: Path, tmp_path: Path) -> None:
    """A folder of text, a folder of tokens, a run of two ranks, and one rank that goes on."""
    out = tmp_path / "tokens"
    options = ["--held-out", "0.2", "--shard-mib", "0.01", "--processes", "2"]
    with started(line(root / "documents", out, *options), tmp_path, "prepare") as process:
        assert process.wait(400) == 0, process.text
    assert "documents to train on" in process.text

    run = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "sample_tokens": 5, "resume": True}
    settings = from_folder(root, out, run={**run, "folder": str(tmp_path / "run")})
    config = tmp_path / "run.toml"
    config.write_text(to_toml(settings))
    first = [*torchrun(2), str(config), "--run.steps", "2", "--parallel.cp", "2"]
    with started(first, tmp_path, "first") as process:
        assert process.wait(400) == 0, process.text
    with started([sys.executable, TRAIN, str(config)], tmp_path, "second") as process:
        assert process.wait(400) == 0, process.text
    whole = [sys.executable, TRAIN, str(config), "--run.folder", str(tmp_path / "whole")]
    with started(whole, tmp_path, "whole") as process:
        assert process.wait(400) == 0, process.text

    def losses(folder: Path) -> list[float]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in lines if "loss" in record]

    assert len(losses(tmp_path / "run")) == 4
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"), 1e-9)
    shutil.rmtree(out / "shards" / "000000")
    with started([sys.executable, TRAIN, str(config)], tmp_path, "damaged") as process:
        assert process.wait(400) == 1
    assert process.text.count("train.py: data.path must be a whole prepared folder, got ") == 1

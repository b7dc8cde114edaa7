"""The programs as a person starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import local
from launch.settings import to_toml
from tests.launch.common import replaced, tiny

LAUNCH = Path(local.__file__).parent


def run(line: list[str], folder: Path, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    environment = local.environment()
    return subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )


@pytest.mark.parametrize("gpus, processes", [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_as_many_processes_as_the_machine_is_good_for(gpus: int, processes: int) -> None:
    line = local.command(["run.toml", "--run.steps", "3"], gpus)
    assert line[0] == sys.executable
    assert f"--nproc-per-node={processes}" in line
    script = line.index(str(LAUNCH / "train.py"))
    # The caller's options come last, so that they win.
    expected = ["run.toml", "--parallel.cp", str(processes), "--run.steps", "3"]
    assert line[script + 1 :] == expected


def test_a_bad_option_ends_the_program_with_its_name(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(to_toml(tiny(root)) + "[extra]\n")
    line = [sys.executable, str(LAUNCH / "train.py"), str(config)]
    done = run(line, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: a section must be one of attention, rotary")


def test_tensorboard_missing_is_refused_by_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.reporting.report import Report

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = replaced(tiny(root), "run", tensorboard=True)
    with pytest.raises(
        ValueError, match=r"run\.tensorboard must be False where .*not installed .*, got True"
    ):
        Report(settings, tmp_path, active=True, first_step=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_learns_from_the_library(tmp_path: Path) -> None:
    config = LAUNCH.parent / "configs" / "default.toml"
    line = local.command([str(config), "--run.folder", "out"], torch.cuda.device_count())
    done = run(line, tmp_path, seconds=1100)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    record = json.loads(text)
    assert record["validation_loss"] < 2.5 < 2.8 < record["unigram_loss"]

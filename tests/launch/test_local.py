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


def test_a_run_from_the_command_line(root: Path, tmp_path: Path) -> None:
    settings = tiny(root, parallel={"cp": 2}, run={"sample_tokens": 9, "tensorboard": True})
    (tmp_path / "run.toml").write_text(to_toml(settings))
    arguments = ["run.toml", "--run.steps", "6", "--run.folder", "out", "--run.log-every", "2"]
    arguments += ["--run.prompt", "def é"]
    # The tiny run asks for CPUs, whatever GPUs this machine has.
    line = local.command(arguments, gpus=0)
    done = run(["env", "PYTHONIOENCODING=ascii", *line], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out"
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 4, 6, 6]
    for number in (f"{records[0]['loss']:.4f}", f"{records[-1]['validation_loss']:.4f}"):
        assert number in done.stdout
    for word in (
        "unigram",
        "tokens/s",
        "bytes moved per step",
        "fetch_grad",
        "--- sample\ndef \\xe9",
    ):
        assert word in done.stdout
    assert "dp 1 x cp 2 on cpu" in done.stdout
    assert (folder / "checkpoints" / "step_00000006" / ".metadata").exists()
    assert list((folder / "tensorboard").glob("events.*"))


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

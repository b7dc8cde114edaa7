"""The programs run from a checkout that is not installed and that PYTHONPATH does not name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import local

ROOT = Path(local.__file__).resolve().parents[1]
PACKAGES = ("launch", "nsa_dist", "kernels/nsa_kernels")
# What is imported leaves its mark, which tells the copy from an installed package.
MARK = """
import os
with open(os.environ["IMPORTED"], "a") as file:
    file.write(f"{os.path.dirname(__file__)}\\n")
"""
TRAINS = ("--run.steps", "2", "--run.folder", "out", "--run.device", "cpu", "--data.length", "256")
SMALL = ("--data.global-batch", "2", "--run.sample-tokens", "4", "--run.validation-streams", "1")
HELP = {
    "train.py": ("configs/default.toml", "--help"),
    "convert.py": (),
    "bench/operators.py": ("--help",),
    "bench/distributed.py": ("--help",),
    "bench/record_choices.py": ("--help",),
    "bench/table.py": ("--help",),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, as a clone has them, with marks."""
    checkout = tmp_path_factory.mktemp("fresh") / "checkout"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("launch", "nsa_dist", "kernels", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=skipped)
    for package in PACKAGES:
        with (checkout / package / "__init__.py").open("a") as file:
            file.write(MARK)
    return checkout


def run(
    line: list[str], checkout: Path, folder: Path, *packages: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in ``folder``; what it and its children import must be the checkout's."""
    marks = folder / "imported"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"IMPORTED": str(marks), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=170
    )
    imported = set(marks.read_text().split()) if marks.exists() else set()
    assert imported == {str(checkout / package) for package in packages}, done.stderr
    return done


def test_training_by_local(checkout: Path, tmp_path: Path) -> None:
    """By torchrun too, which local.py starts."""
    config = str(checkout / "configs" / "default.toml")
    line = [sys.executable, str(checkout / "launch" / "local.py"), config, *TRAINS, *SMALL]
    done = run(line, checkout, tmp_path, *PACKAGES)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "checkpoints" / "step_00000002" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", HELP)
def test_every_program_starts(program: str, checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / "configs", tmp_path / "configs")
    line = [sys.executable, str(checkout / "launch" / program), *HELP[program]]
    done = run(line, checkout, tmp_path, *PACKAGES)
    assert "usage: " in done.stdout + done.stderr
    assert done.returncode == (1 if program == "convert.py" else 0)

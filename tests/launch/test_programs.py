"""The programs run from a checkout that is not installed and that PYTHONPATH does not name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import local
from launch.settings import to_toml
from tests.launch.common import tiny

ROOT = Path(local.__file__).resolve().parents[1]
PACKAGES = ("launch", "nsa_dist", "kernels/nsa_kernels")
# What is imported leaves its mark, which tells the copy from an installed package.
MARK = """
import os
with open(os.environ["IMPORTED"], "a") as file:
    file.write(f"{os.path.dirname(__file__)}\\n")
"""
HELP = {
    "train.py": ("configs/default.toml", "--help"),
    "convert.py": (),
    "inspect_attention.py": ("--help",),
    "prepare_data.py": ("--help",),
    "evaluate.py": ("--help",),
    "export.py": ("--help",),
    "generate.py": ("--help",),
    "bench/decoding.py": ("--help",),
    "bench/generation.py": ("--help",),
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
    line: list[str], checkout: Path, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in ``folder``; the packages that it and its children import must be the
    checkout's."""
    marks = folder / "imported"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"IMPORTED": str(marks), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=170
    )
    imported = set(marks.read_text().split()) if marks.exists() else set()
    assert imported == {str(checkout / package) for package in PACKAGES}, done.stderr
    return done


def test_a_run_from_the_command_line(root: Path, checkout: Path, tmp_path: Path) -> None:
    """By local.py, which starts torchrun, which starts train.py."""
    settings = tiny(root, parallel={"cp": 2}, run={"sample_tokens": 9, "tensorboard": True})
    (tmp_path / "run.toml").write_text(to_toml(settings))
    line = [sys.executable, str(checkout / "launch" / "local.py"), "run.toml"]
    line += ["--run.steps", "6", "--run.folder", "out", "--run.log-every", "2"]
    line += ["--run.prompt", "def é"]
    # The tiny run asks for CPUs, whatever GPUs this machine has.
    variables = {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "ascii"}
    done = run(line, checkout, tmp_path, **variables)
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


@pytest.mark.slow
@pytest.mark.parametrize("program", HELP)
def test_every_program_starts(program: str, checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / "configs", tmp_path / "configs")
    line = [sys.executable, str(checkout / "launch" / program), *HELP[program]]
    done = run(line, checkout, tmp_path)
    assert "usage: " in done.stdout + done.stderr
    assert done.returncode == (1 if program == "convert.py" else 0)

"""compute-sanitizer finds nothing: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.backends import DEVICE, INTERPRETED
from tests.ops.triton.every_op import EVERY, Options, case_id, run

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "tests.ops.triton.every_op"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)

# Where `keep_rows` is.
SHARED = "hopper.py"
# A race: its first access, and each other one on a line of its own.
HAZARD = re.compile(r"Race reported between .*(?:\n=+ +and .*)+")
ACCESS = re.compile(r"access at (\w+)\S* in (\S+\.py):(\d+)")


def between_partitions(hazard: str) -> bool:
    """Whether all accesses are those of Triton's own code around the parts of a kernel.

    What tells the warps of `gl.warp_specialize` which part they run passes through shared memory
    and a barrier of all warps, whose two sides racecheck does not take for one. These accesses are
    said to be at the kernel's first line and at that call, those of our code at their own lines.
    """
    lines = [_line(*access) for access in ACCESS.findall(hazard)]
    own = ("gl.warp_specialize(", "_kernel(")
    return bool(lines) and all(any(word in line for word in own) for line in lines)


def of_equal_writes(hazard: str) -> bool:
    """Whether all accesses are those of `keep_rows`, called by two warpgroups for one tile.

    Both write the same to each place, what was there or zero, and each reads its own before it
    goes on: so the order in which they write does not show.
    """
    file = ROOT / "kernels" / "nsa_kernels" / "triton" / "shared" / SHARED
    source = ast.parse(file.read_text(encoding="utf-8"))
    (function,) = [x for x in source.body if getattr(x, "name", "") == "keep_rows"]
    last = function.end_lineno or 0
    accesses = ACCESS.findall(hazard)
    return bool(accesses) and all(
        name == SHARED and function.lineno <= int(number) <= last for _, name, number in accesses
    )


def _line(kernel: str, file: str, number: str) -> str:
    """The line of a file of that name: of the one that has the kernel, if several are called so."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob(Path(file).name)]
    if len(texts) > 1:
        texts = [text for text in texts if f"def {kernel}(" in text]
    assert len(texts) == 1, (kernel, file)
    return texts[0].splitlines()[int(number) - 1]


@pytest.mark.skipif(not INTERPRETED, reason="runs there under compute-sanitizer")
@pytest.mark.parametrize(
    "options",
    [EVERY[1], *(pytest.param(x, marks=pytest.mark.slow) for x in EVERY if x != EVERY[1])],
    ids=case_id,
)
def test_the_program_runs(options: Options) -> None:
    run(options, DEVICE)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool: str) -> None:
    assert SANITIZER is not None
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": path}
    options = ["--tool", tool, "--error-exitcode", "1"]
    if tool == "memcheck":
        # What a call returns reaches its caller, and some calls of torch only ask what is there.
        options += ["--report-api-errors", "no"]
        # Every tensor is an allocation of its own, behind which memory is not ours.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    program = [sys.executable, "-m", PROGRAM]
    # Once without, so that kernels are compiled.
    subprocess.run(program, cwd=ROOT, env=environment, check=True, timeout=300)
    found = subprocess.run(
        [SANITIZER, *options, *program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    output = found.stdout + found.stderr
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", output)
    assert summary is not None, output[-6000:]
    hazards = [
        hazard
        for hazard in HAZARD.findall(output)
        if not between_partitions(hazard) and not of_equal_writes(hazard)
    ]
    assert not hazards, "\n".join(hazards)[:6000]
    if tool == "memcheck" or not HAZARD.search(output):
        assert summary[2] == "0", output[-6000:]
        assert found.returncode == 0, output[-6000:]

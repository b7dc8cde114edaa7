"""The tests of accuracy on what other processors compute with, in a process of their own each.

MKL, ATen and oneDNN choose their instructions when they are loaded, so an environment variable says
which. MKL heeds MKL_ENABLE_INSTRUCTIONS on processors by Intel alone, MKL_CBWR on all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("-m", "accuracy", "tests/ops/test_sums.py", "tests/distributed/test_layer_behaviour.py")
FULL = (
    "-m",
    "not gpu and not multi_gpu",
    "--ignore=tests/ops/test_processors.py",
    "--ignore=tests/ops/triton",
    "-k",
    "(ops or float32 or one_step) and not triton",
    "tests/ops",
    "tests/distributed/test_layer_behaviour.py",
    "tests/adapters/deepspeed/test_training.py",
)
# (variable, value): the flag of /proc/cpuinfo that it needs.
INSTRUCTIONS = {
    ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"): "sse4_2",
    ("MKL_ENABLE_INSTRUCTIONS", "AVX2"): "avx2",
    ("MKL_ENABLE_INSTRUCTIONS", "AVX512"): "avx512f",
}
OTHERS = {
    ("MKL_CBWR", "COMPATIBLE"): "sse2",
    ("ATEN_CPU_CAPABILITY", "default"): "sse2",
    ("ATEN_CPU_CAPABILITY", "avx2"): "avx2",
    ("ATEN_CPU_CAPABILITY", "avx512"): "avx512f",
    ("ONEDNN_MAX_CPU_ISA", "SSE41"): "sse4_1",
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): "avx2",
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): "avx512f",
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX"): "amx_bf16",
}
Setting = tuple[str, str]


def cpu_flags() -> frozenset[str]:
    """What this processor can do, by Linux's names; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return frozenset()
    return frozenset(next((x for x in lines if x.startswith("flags")), "").split())


def has(flag: str) -> bool:
    return flag in cpu_flags()


def start(setting: Setting | None, tests: tuple[str, ...], threads: int = 1) -> subprocess.Popen:
    """pytest on `tests` under one setting."""
    environment = os.environ | dict([setting] if setting else [])
    options = ("-q", "-p", "no:cacheprovider", f"--threads={threads}")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_passes(process: subprocess.Popen, seconds: float) -> None:
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, said[-6000:]
    assert " passed" in said, said


@pytest.fixture(scope="module")
def small_runs() -> Iterator[dict[Setting, subprocess.Popen]]:
    """Those of INSTRUCTIONS that the processor has, side by side."""
    runs = {x: start(x, SMALL) for x, flag in INSTRUCTIONS.items() if has(flag)}
    yield runs
    for run in runs.values():
        run.kill()
        run.wait()


@pytest.mark.parametrize("setting", INSTRUCTIONS, ids="=".join)
def test_accuracy(setting: Setting, small_runs: dict[Setting, subprocess.Popen]) -> None:
    if setting not in small_runs:
        pytest.skip(f"this processor has no {setting[1]}")
    assert_passes(small_runs[setting], 160)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", INSTRUCTIONS | OTHERS, ids="=".join)
def test_full_accuracy(setting: Setting) -> None:
    if not has((INSTRUCTIONS | OTHERS)[setting]):
        pytest.skip(f"this processor has no {setting[1]}")
    assert_passes(start(setting, FULL), 3500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_accuracy_on_two_threads() -> None:
    """A product may be cut, and added up, by threads."""
    assert_passes(start(None, FULL, threads=2), 3500)

"""Runs the tests in parts, side by side: what `make test` does on a machine without a GPU.

    python -m tests.in_parts [pytest's arguments] [files or folders]

Many tests compute in one process, others wait for programs and ranks that they start: three at a
time keep two cores busy. A part is one pytest process over a folder of tests, so that ranks are
started once for all its tests. What a part says is printed when it ends, and at the end the
failures of all. With files or folders among the arguments, and on a machine with a GPU, whose tests
would share it, there is one part.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The longest first. Together they have every folder, which `repository/test_in_parts.py` sees. One
# that lies in another part's folder is left to its own part.
PARTS = (
    ("tests/launch",),
    ("tests/adapters", "tests/repository"),
    ("tests/ops/triton",),
    ("tests/distributed", "tests/traps", "tests/unit"),
    ("tests/ops",),
    ("tests/launch/bench",),
)
WORKERS = 3
NOTHING_SELECTED = int(pytest.ExitCode.NO_TESTS_COLLECTED)


@dataclass
class Part:
    """A part that runs, and what it has said so far."""

    folders: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: Path
    started: float


def inside(folders: tuple[str, ...], parts: tuple[tuple[str, ...], ...]) -> list[str]:
    """Folders of other parts that lie in ``folders``."""
    others = (x for part in parts if part != folders for x in part)
    return [x for x in others if any(x.startswith(f"{folder}/") for folder in folders)]


def start(folders: tuple[str, ...], options: list[str], log: Path) -> Part:
    # pytest's own cache is for one process.
    cache = f"cache_dir=.pytest_cache/{folders[0].replace('/', '_')}"
    command = [sys.executable, "-m", "pytest", "-o", cache, *options, *folders]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    return Part(folders, process, log, time.perf_counter())


def run_parts(
    parts: tuple[tuple[str, ...], ...], options: list[str], workers: int = WORKERS
) -> tuple[int, list[str]]:
    """pytest's exit status for all parts together, and the lines that name what failed."""
    waiting, codes, failed = list(parts), [], []
    running: list[Part] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    log, part = Path(logs) / str(len(waiting)), waiting.pop(0)
                    left = [f"--ignore={folder}" for folder in inside(part, parts)]
                    running.append(start(part, [*options, *left], log))
                time.sleep(0.2)
                for ended in [x for x in running if x.process.poll() is not None]:
                    running.remove(ended)
                    codes.append(ended.process.returncode)
                    said = ended.log.read_text(encoding="utf-8", errors="replace")
                    seconds = time.perf_counter() - ended.started
                    print(f"== {' '.join(ended.folders)}: {seconds:.0f} s\n{said}", flush=True)
                    failed += [x for x in said.splitlines() if x.startswith(("FAILED", "ERROR"))]
        finally:
            for unfinished in running:
                unfinished.process.terminate()
                unfinished.process.wait()
    wrong = [code for code in codes if code not in (0, NOTHING_SELECTED)]
    if wrong:
        return max(wrong, key=abs), failed
    return (NOTHING_SELECTED if all(codes) else 0), failed


def main(arguments: list[str], has_gpu: Callable[[], bool]) -> int:
    given = [x for x in arguments if not x.startswith("-") and (ROOT / x.split("::")[0]).exists()]
    if given or has_gpu():
        return subprocess.call([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
    started = time.perf_counter()
    code, failed = run_parts(PARTS, arguments)
    print("\n".join([f"== all parts: {time.perf_counter() - started:.0f} s", *failed]), flush=True)
    return code


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the parts
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:], _has_gpu))

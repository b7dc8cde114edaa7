"""Runs the tests that need GPUs, on all GPUs of the machine: `make test-gpu`.

    python -m tests.on_gpus [--seconds N] [pytest's arguments] [files or folders]

First the tests for one GPU: processes of pytest-xdist, each with one GPU of its own. Then those for
several, in few processes that see all GPUs, since each of their ranks compiles too. Every result
has a line as it comes; after --seconds the tests that run are interrupted, and what was found is
summed up.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OK = (int(pytest.ExitCode.OK), int(pytest.ExitCode.NO_TESTS_COLLECTED))
# Most of a test is compiling, on a core; memory of one GPU is enough for so many processes.
MOST_WORKERS_A_GPU = 14
# Each starts up to four ranks, and more of them at once than there are cores come to nothing.
RANKS_OF_A_TEST = 4
MOST_GROUPS_OF_RANKS = 5
SECONDS_TO_SUM_UP = 20
# Holds the GPUs that workers share out among them.
SHARED_OUT = "TEST_GPUS_SHARED_OUT"


def take_own_gpu() -> None:
    """Leaves one GPU visible in a worker of the first half. CUDA reads that when it starts."""
    gpus, worker = os.environ.get(SHARED_OUT), os.environ.get("PYTEST_XDIST_WORKER")
    if gpus and worker:
        names = gpus.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(worker.removeprefix("gw")) % len(names)]


def halves(gpus: Sequence[str], cores: int) -> list[tuple[str, int, dict[str, str]]]:
    """Marks, number of processes, and environment of each of pytest's runs."""
    single = max(1, min(cores - 1, MOST_WORKERS_A_GPU * len(gpus)))
    runs = [("gpu and not multi_gpu", single, {SHARED_OUT: ",".join(gpus)})]
    if len(gpus) > 1:
        several = max(1, min(MOST_GROUPS_OF_RANKS, cores // RANKS_OF_A_TEST))
        runs.append(("multi_gpu", several, {}))
    return runs


def run(command: Sequence[str], environment: dict[str, str], seconds: float | None) -> int:
    """Its exit status; after `seconds` it is asked to sum up, as by Ctrl-C, and then ended."""
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"== {seconds:.0f} s are over", flush=True)
            process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_SUM_UP)
        except subprocess.TimeoutExpired:
            process.kill()
        return int(pytest.ExitCode.INTERRUPTED)


def visible_gpus() -> list[str]:
    import torch  # Starts CUDA, which the processes with the tests must do by themselves.

    named = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    return named or [str(x) for x in range(torch.cuda.device_count())]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpus", description=__doc__)
    parser.add_argument("--seconds", type=float, help="for all tests together")
    options, rest = parser.parse_known_args(arguments)
    gpus = visible_gpus()
    if not gpus:
        parser.error("must run on a machine with a GPU, got none that torch sees")
    started, codes = time.monotonic(), []
    for marks, workers, environment in halves(gpus, len(os.sched_getaffinity(0))):
        left = options.seconds and max(1.0, options.seconds - (time.monotonic() - started))
        print(f"== {marks}: {workers} processes on {len(gpus)} GPUs", flush=True)
        flags = ["-v", "-m", marks, "-n", str(workers), "--dist", "loadgroup"]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, *rest]
        codes.append(run(command, environment, left))
        print(f"== {marks}: ended with {codes[-1]}", flush=True)
    return max((code for code in codes if code not in OK), default=0)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))

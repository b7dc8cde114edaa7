"""Train on this machine: over the GPUs that it has (at most two), else over two CPU processes.

    python launch/local.py CONFIG.toml [--section.option value ...]

The sequence is split over the processes (parallel.cp) unless the options say otherwise. For more
processes or machines call torchrun with train.py directly.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import os

import torch

MOST = 2
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def command(arguments: list[str], gpus: int) -> list[str]:
    """The torchrun command line for a machine with this number of GPUs."""
    processes = min(gpus, MOST) if gpus else MOST
    config, *overrides = arguments or ["--help"]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", f"--nproc-per-node={processes}"),
        *(str(Path(__file__).with_name("train.py")), config),
        # Before the caller's own options, which override it.
        *("--parallel.cp", str(processes)),
        *overrides,
    ]


def environment() -> dict[str, str]:
    """This process's environment, with settings for torchrun."""
    # One thread per core over all processes. Without it torchrun warns and takes one per process.
    threads = str(max(1, (os.cpu_count() or 1) // MOST))
    # torchrun passes on only the signals named here; SIGUSR1 would end it without its ranks.
    # Ranks have five minutes to save before torchrun kills them. These are torchrun's own names.
    waits = {"PET_SIGNALS_TO_HANDLE": SIGNALS, "PET_SHUTDOWN_TIMEOUT": "300"}
    return {"OMP_NUM_THREADS": threads, **waits, **os.environ}


if __name__ == "__main__":
    line = command(sys.argv[1:], torch.cuda.device_count())
    # torchrun replaces this process, so that signals and kills reach it.
    os.execve(line[0], line, environment())

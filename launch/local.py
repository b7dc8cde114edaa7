"""Train on this machine: over the GPUs that it has (at most two), else over two CPU processes.

    python launch/local.py CONFIG.toml [--section.option value ...]

The sequence is split over the processes (parallel.cp) unless the options say otherwise. For more
processes or machines call torchrun with train.py directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

MOST = 2


def command(arguments: list[str], gpus: int) -> list[str]:
    """The torchrun command line for a machine with so many GPUs."""
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


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    # A checkout works without being installed.
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # One thread a core over all processes; torchrun would otherwise warn and take one.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // MOST)))
    return subprocess.call(command(sys.argv[1:], torch.cuda.device_count()), env=environment)


if __name__ == "__main__":
    sys.exit(main())

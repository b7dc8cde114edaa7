"""torchtitan's trainer on CPUs over gloo, many runs of any number of ranks in one start.

    python -m tests.adapters.torchtitan.train_on_cpus FILE

FILE is JSON: {"runs": [[name, ranks, arguments of torchtitan's program, in float64 or not], ...],
"results": a file}.
The results are {name: [[loss, gradient norm, graphs compiled so far] of each step]}, or the text of
the error that refuses the run. Importing torchtitan takes longer than training a small model, so
that it is imported once, and every rank of every run is a fork.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.adapters.torchtitan import shim

# isort: split

import torch.distributed as dist
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer

from tests.adapters.torchtitan import small  # noqa: F401

_log = MetricsProcessor.log
_steps: list[list[float]] = []


def _record(self: Any, step: int, loss: float, largest: float, norm: float, **rest: Any) -> None:
    _log(self, step, loss, largest, norm, **rest)
    _steps.append([loss, norm, counters["stats"]["unique_graphs"]])


MetricsProcessor.log = _record


def run(arguments: list[str]) -> list[list[float]] | str:
    """One run of torchtitan's program; its losses and norms, or the error that refuses it."""
    trainer: Trainer | None = None
    try:
        config = ConfigManager().parse_args(arguments)
        trainer = config.build()
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    except (NotImplementedError, Unsupported, ValueError) as error:
        if dist.is_initialized():
            dist.barrier()  # A rank that ends early takes the others' rendezvous with it.
        return str(error)
    finally:
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return _steps


def on_ranks(
    ranks: int, arguments: list[str], in_float64: bool, result: Path
) -> list[list[float]] | str:
    """The run on forks of this process; what the last rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            os.environ |= {name: str(value) for name, value in places.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if in_float64:
                shim.compute_in_float64()
            found = run(arguments)
            if rank == ranks - 1:
                result.write_text(json.dumps(found), encoding="utf-8")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        return f"failed with {statuses}"
    found_by_last: list[list[float]] | str = json.loads(result.read_text(encoding="utf-8"))
    return found_by_last


def main() -> None:
    """Every run of the file, in its order."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    file, results = Path(asked["results"]), {}
    for name, ranks, arguments, in_float64 in asked["runs"]:
        print(f"=== {name}", flush=True)
        results[name] = on_ranks(ranks, arguments, in_float64, file.with_suffix(".run"))
        file.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()

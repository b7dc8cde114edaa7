"""Runs over two hosts, of which one dies and comes back, as torchrun's users start them.

A host is a namespace of the network, of processes and of names, on one machine: it has an address,
a host name and process ids of its own, and shares the run's folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.settings import to_toml
from launch.storage.checkpoint import checkpoints
from tests.distributed.namespaces import Host, command, two_hosts
from tests.launch.common import tiny
from tests.launch.processes import TRAIN, Process, started
from tests.launch.test_signals import wait_for_step

STEPS = 24
# As a host: its name, the names of all, then the program.
BOOT = 'echo "$0" >/proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"'


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@contextmanager
def job(
    hosts: Sequence[Host], folder: Path, name: str, store: Host, *options: str, **variables: str
) -> Iterator[list[Process]]:
    """torchrun on each of some hosts; ``store`` is the one that keeps the rendezvous."""
    names = folder / "hosts"
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    [
                        *(*host.enter, "unshare", "--uts", "--pid", "--mount", "--mount-proc"),
                        *("--fork", "--kill-child", "sh", "-c", BOOT, host.name, str(names)),
                        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                        *("--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d"),
                        f"--rdzv-endpoint={store.name}:29500",
                        *(TRAIN, "run.toml", *options),
                    ],
                    folder,
                    f"{name}-{host.link}",
                    **variables,
                )
            )
            for host in hosts
        ]


def curve(folder: Path) -> list[tuple[int, Any, Any]]:
    """Step, loss and gradient norm of each logged step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


APART = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dead", [0, 1], ids=["with_rank_0", "without_rank_0"])
def test_a_host_that_comes_back_goes_on_with_the_same_curve(
    root: Path, tmp_path: Path, hosts: tuple[Host, Host], dead: int
) -> None:
    run = {"steps": STEPS, "folder": "run", "resume": True, "checkpoint_every": 6, "log_every": 1}
    settings = tiny(root, parallel={"cp": 4}, run={**run, "keep_checkpoints": 0})
    (tmp_path / "run.toml").write_text(to_toml(settings))
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{names}")

    # The first host, by name, has ranks 0 and 1; the rendezvous is on the one that lives.
    store, lost = hosts[1 - dead], hosts[dead]
    with job(hosts, tmp_path, "first", store, **APART) as both:
        wait_for_step(both[0], tmp_path, 8)
        # Its power fails: the other host hears nothing more from it.
        command("ip", "-n", lost.name, "link", "set", lost.link, "down")
        both[dead].end()
        command("ip", "-n", lost.name, "link", "set", lost.link, "up")
        assert both[1 - dead].popen.poll() is None
        with job([lost], tmp_path, "again", store, **APART) as (back,):
            assert [both[1 - dead].wait(), back.wait()] == [0, 0], back.text
    broken = curve(tmp_path / "run")
    assert [step for step, *_ in broken] == list(range(1, STEPS + 1))
    assert len(checkpoints(tmp_path / "run")) == STEPS // 6

    with job(hosts, tmp_path, "whole", store, "--run.folder", "whole", **APART) as both:
        assert [one.wait() for one in both] == [0, 0]
    assert broken == curve(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_for_slurm(root: Path, tmp_path: Path) -> None:
    """With programs of Slurm's names that run what they are given here, on one node."""
    settings = tiny(root, run={"steps": 2, "validation_streams": 1})
    (tmp_path / "run.toml").write_text(to_toml(settings))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in {
        "scontrol": "echo localhost",
        "srun": 'shift; echo "flight $TORCH_NCCL_DEBUG_INFO_TEMP_FILE"; exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    # Slurm runs a copy of the script, in the folder that it was submitted from.
    (tmp_path / "launch").symlink_to(Path(TRAIN).parent)
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    script = Path(TRAIN).parents[1] / "configs" / "multinode.sbatch"
    line = ["bash", str(script), "run.toml", "run", "--parallel.cp", "2"]
    with started(line, tmp_path, **job, PATH=path, GPUS_PER_NODE="2") as process:
        assert process.wait() == 0, process.text
        assert "flight run/flight/rank_" in process.text
        assert "dp 1 x cp 2 on cpu" in process.text
    assert [step for step, *_ in curve(tmp_path / "run")] == [1, 2]
    assert len(checkpoints(tmp_path / "run")) == 1

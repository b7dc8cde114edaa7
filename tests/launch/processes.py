"""The programs as processes of their own: torchrun, or ranks that a test starts one by one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import local

TRAIN = str(Path(local.__file__).with_name("train.py"))
# Seconds: longer than busy cores take. A test's own limit ends it before, and says what it waits
# for.
PATIENCE = 600


def torchrun(size: int, *options: str) -> list[str]:
    """The command line that starts ``size`` ranks of train.py."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={size}", *options, TRAIN),
    ]


def environment(**more: str) -> dict[str, str]:
    """That of ``launch/local.py``, with output at once and one thread."""
    return {**local.environment(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


class Process:
    """One started program, its output in a file."""

    def __init__(self, line: Sequence[str], folder: Path, name: str, **variables: str) -> None:
        self.output = folder / f"{name}.out"
        # Marks whatever descends from it.
        self.mark = f"NSA_DIST_TEST={name}-{os.getpid()}-{time.monotonic_ns()}"
        key, value = self.mark.split("=")
        with self.output.open("w") as out:
            self.popen = subprocess.Popen(
                line,
                cwd=folder,
                env=environment(**{key: value}, **variables),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s:\n{self.text}") from None

    def wait_for(self, text: str, seconds: float = PATIENCE) -> None:
        """Until the output holds ``text``."""
        wait_until(lambda: text in self.text or self.popen.poll() is not None, seconds, self)
        assert text in self.text, f"ended without {text!r}:\n{self.text}"

    def ranks(self) -> dict[int, int]:
        """Process ids of train.py's ranks that are alive, by rank."""
        found = {}
        for pid in self.alive():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = [v for v in variables if v.startswith(b"RANK=")]
            if rank and TRAIN.encode() in line[:4] and b"torch.distributed.run" not in line:
                found[int(rank[0][5:])] = pid
        return found

    def alive(self) -> list[int]:
        """All processes that descend from this one and are not zombies."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() not in (path / "environ").read_bytes().split(b"\0"):
                    continue
                if (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        """Kill whatever is left."""
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.popen.wait()


@contextmanager
def started(
    line: Sequence[str], folder: Path, name: str = "run", **variables: str
) -> Iterator[Process]:
    """A program that is killed, with all that descends from it, at the end."""
    process = Process(line, folder, name, **variables)
    try:
        yield process
    except BaseException:
        print(process.text)  # pytest shows it; its time limit too raises here.
        raise
    finally:
        process.end()


@contextmanager
def started_ranks(
    lines: Sequence[Sequence[str]], folders: Sequence[Path]
) -> Iterator[list[Process]]:
    """Ranks of one job without torchrun: rank r runs ``lines[r]`` in ``folders[r]``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": str(len(lines)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        Process(line, folder, f"rank{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **job)
        for rank, (line, folder) in enumerate(zip(lines, folders, strict=True))
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.end()


def wait_until(done: Callable[[], bool], seconds: float, process: Process) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not so within {seconds} s:\n{process.text}"
        time.sleep(0.05)

"""Runs that are stopped: they save, say so, and leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.processes.stopping import INTERRUPTED, SIGNALS, STOPPED, Stopping
from launch.settings import to_toml
from launch.storage.checkpoint import checkpoints
from tests.launch.common import tiny
from tests.launch.processes import PATIENCE, TRAIN, Process, started, torchrun, wait_until

ENDLESS = 100_000


def write_config(root: Path, folder: Path, cp: int = 2, **run: Any) -> None:
    run = {"steps": ENDLESS, "folder": "run", "resume": True, "checkpoint_every": 0, **run}
    (folder / "run.toml").write_text(to_toml(tiny(root, parallel={"cp": cp}, run=run)))


def write_much(folder: Path) -> Path:
    """Documents whose validation takes minutes."""
    (folder / "documents").mkdir()
    for index in range(40):
        text = " ".join(f"{index} and {word}" for word in range(20_000))
        (folder / "documents" / f"{index}.txt").write_text(text)
    return folder


def saved_step(folder: Path) -> int:
    """Of the newest checkpoint."""
    return int(checkpoints(folder / "run")[-1].name[5:])


def logged_steps(folder: Path) -> list[int]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def wait_for_step(process: Process, folder: Path, step: int = 1) -> None:
    def there() -> bool:
        path = folder / "run" / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return f'"step": {step},' in text or process.popen.poll() is not None

    wait_until(there, PATIENCE, process)
    assert process.popen.poll() is None, process.text


def test_a_signal_saves_and_the_run_goes_on_from_there(root: Path, tmp_path: Path) -> None:
    # One process, without torchrun: its status is its own.
    write_config(root, tmp_path, cp=1, log_every=1)
    line = [sys.executable, TRAIN]
    with started([*line, "run.toml"], tmp_path) as process:
        wait_for_step(process, tmp_path, 3)
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == STOPPED, process.text
        assert "stopped" in process.text
        assert "Traceback" not in process.text
    stopped = saved_step(tmp_path)
    # The step that ran, and at most one more.
    assert logged_steps(tmp_path) == list(range(1, stopped + 1))
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_torchrun_passes_signals_on_and_all_ranks_save_one_step(
    root: Path, tmp_path: Path, name: str
) -> None:
    write_config(root, tmp_path)
    # What launch/local.py sets has torchrun pass on SIGUSR1 too. It does not start again.
    with started([*torchrun(2, "--max-restarts=2"), "run.toml"], tmp_path) as process:
        wait_for_step(process, tmp_path)
        process.popen.send_signal(signal.Signals[name])
        # torchrun's own, whatever its ranks ended with.
        assert process.wait() == 1
        assert process.alive() == []
    # The state of all of them, of one step.
    stopped = saved_step(tmp_path)
    assert stopped > 1
    assert logged_steps(tmp_path)[-1] == stopped


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_one_step(root: Path, tmp_path: Path, rank: int) -> None:
    write_config(root, tmp_path)
    with started([*torchrun(2), "run.toml"], tmp_path) as process:
        wait_for_step(process, tmp_path)
        os.kill(process.ranks()[rank], signal.SIGTERM)
        assert process.wait() == 1
        assert f"exitcode  : {STOPPED}" in process.text
        assert process.alive() == []
    stopped = saved_step(tmp_path)
    options = ["--run.steps", str(stopped + 3), "--run.log-every", "1"]
    with started([*torchrun(2), "run.toml", *options], tmp_path, "again") as again:
        assert again.wait() == 0, again.text
    assert logged_steps(tmp_path)[-4:] == [stopped, stopped + 1, stopped + 2, stopped + 3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_interrupt_ends_at_once(root: Path, tmp_path: Path) -> None:
    write_config(root, tmp_path, cp=1, sample_tokens=ENDLESS, steps=2, validation_streams=1)
    with started([sys.executable, TRAIN, "run.toml"], tmp_path) as process:
        # In the middle of something: a stopped process takes both signals when it goes on.
        wait_for_step(process, tmp_path)
        process.popen.send_signal(signal.SIGSTOP)
        process.popen.send_signal(signal.SIGINT)
        process.popen.send_signal(signal.SIGCONT)
        process.popen.send_signal(signal.SIGINT)
        assert process.wait() in (INTERRUPTED, STOPPED)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", ["validation", "sample"])
def test_a_signal_after_the_last_step_cuts_the_rest_short(
    root: Path, tmp_path: Path, phase: str
) -> None:
    long = {"validation_streams": 10**6} if phase == "validation" else {"sample_tokens": ENDLESS}
    options = {"steps": 3, "log_every": 1, **long}
    if phase == "validation":
        root = write_much(tmp_path)
    write_config(root, tmp_path, **options)
    with started([*torchrun(2), "run.toml"], tmp_path) as process:
        wait_until(lambda: bool(checkpoints(tmp_path / "run")), PATIENCE, process)
        time.sleep(2)
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    assert saved_step(tmp_path) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_validation_that_was_cut_short_is_done_on_resume(root: Path, tmp_path: Path) -> None:
    write_much(tmp_path)
    options = {"steps": 8, "log_every": 1, "validate_every": 4, "checkpoint_every": 4}
    write_config(tmp_path, tmp_path, cp=1, validation_streams=10**6, **options)
    line = [sys.executable, TRAIN, "run.toml"]
    with started(line, tmp_path) as process:
        wait_until(lambda: bool(checkpoints(tmp_path / "run")), PATIENCE, process)
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait(60) == STOPPED
    assert saved_step(tmp_path) == 4
    write_config(tmp_path, tmp_path, cp=1, validation_streams=2, **options)
    with started(line, tmp_path, "again") as again:
        assert again.wait() == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in lines]
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_before_the_first_step_ends_the_process(root: Path, tmp_path: Path) -> None:
    # It waits for another rank, which never comes.
    write_config(root, tmp_path)
    with socket.socket() as master:
        master.bind(("127.0.0.1", 0))
        master.listen()
        port = str(master.getsockname()[1])
        job = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with started([sys.executable, TRAIN, "run.toml"], tmp_path, **job) as process:
            connection, _ = master.accept()
            process.popen.send_signal(signal.SIGTERM)
            assert process.wait(60) == STOPPED
            connection.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", ["torchrun", "local.py"])
def test_killing_the_launcher_saves_and_ends_its_ranks(
    root: Path, tmp_path: Path, program: str
) -> None:
    write_config(root, tmp_path)
    line = torchrun(2) if program == "torchrun" else [sys.executable, local.__file__]
    with started([*line, "run.toml"], tmp_path) as process:
        wait_for_step(process, tmp_path)
        ranks = process.ranks()
        assert sorted(ranks) == [0, 1]
        process.popen.kill()
        wait_until(lambda: process.alive() == [], 60, process)
        assert saved_step(tmp_path) > 1
        assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_takes_the_others_along_and_a_restart_goes_on(
    root: Path, tmp_path: Path
) -> None:
    write_config(root, tmp_path, checkpoint_every=5, keep_checkpoints=0)
    with started([*torchrun(2, "--max-restarts=1"), "run.toml"], tmp_path) as process:
        wait_until(lambda: bool(checkpoints(tmp_path / "run")), PATIENCE, process)
        first = process.ranks()
        os.kill(first[0], signal.SIGKILL)

        def again() -> bool:
            return len(process.ranks()) == 2 and not set(process.ranks().values()) & set(
                first.values()
            )

        # The agent starts it again at once: the lock of a dead process does not keep it waiting.
        wait_until(again, 60, process)
        before = saved_step(tmp_path)
        wait_until(lambda: saved_step(tmp_path) > before + 5, 100, process)
        assert "waiting for a sign" not in process.text
        os.kill(process.ranks()[1], signal.SIGKILL)
        assert process.wait() == 1
        assert process.alive() == []
    steps = logged_steps(tmp_path)
    assert steps == sorted(set(steps))


def test_local_py_has_torchrun_pass_on_what_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    if "--signals-to-handle" not in get_args_parser().format_help():
        pytest.skip("this torchrun cannot be told which signals to pass on")
    for name, value in local.environment().items():
        monkeypatch.setenv(name, value)
    options = get_args_parser().parse_args(["train.py"])
    assert options.signals_to_handle == local.SIGNALS
    # Older ones have no such option.
    assert getattr(options, "shutdown_timeout", 300) == 300
    # A person's own wins.
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "7")
    assert local.environment()["PET_SHUTDOWN_TIMEOUT"] == "7"


def test_the_flag_rises_only_in_its_context() -> None:
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with Stopping() as stopping:
            stopping.steps_begin()
            assert not stopping.asked
            # What a step starts, such as a compiler, is not ended by what is sent to all processes.
            with subprocess.Popen(["sleep", "60"]) as child:
                for number in SIGNALS:
                    child.send_signal(number)
                with pytest.raises(subprocess.TimeoutExpired):
                    child.wait(0.3)
                child.kill()
            os.kill(os.getpid(), signal.SIGUSR1)
            end = time.monotonic() + 10
            while not stopping.asked:
                assert time.monotonic() < end
                time.sleep(0.01)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in kept.items():
            signal.signal(number, handler)

"""Logs are exact after a resume, and never what ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.reporting import history, logs
from launch.reporting.history import History
from launch.reporting.logs import MetricsFile
from launch.reporting.report import Report
from launch.settings import Settings
from tests.launch.common import tiny
from tests.launch.processes import environment

VALUES = {
    "loss": 1.0,
    "mean_loss": 1.0,
    "grad_norm": 1.0,
    "tokens_per_second": 1.0,
    "throughput(tps)": 1.0,
    "tflops": 1.0,
}


def run(settings: Settings, folder: Path, first: int, last: int, saves: tuple[int, ...]) -> None:
    """Log steps ``first`` + 1 to ``last``, a validation every third, as a run does."""
    with Report(settings, folder, active=True, first_step=first) as report:
        for step in range(first + 1, last + 1):
            report.step({"step": step, **VALUES, "loss": step + first / 100}, {"halo": step})
            if step in saves:
                report.sync()
            if step % 3 == 0:
                report.validation(step, float(step), 2.0)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("resumed", [0, 3, 5, 8])
def test_no_step_is_logged_twice_and_none_is_missing(
    root: Path, tmp_path: Path, resumed: int
) -> None:
    settings = tiny(root, run={"tensorboard": True})
    run(settings, tmp_path, 0, 8, saves=(3, 5, 8))
    run(settings, tmp_path, resumed, 12, saves=())
    records = read(tmp_path)
    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    expected = [(s, float(s)) for s in range(1, resumed + 1)]
    expected += [(s, s + resumed / 100) for s in range(resumed + 1, 13)]
    assert steps == expected
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6, 9, 12]
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
    assert scalars(tmp_path, "loss") == [(s, pytest.approx(v)) for s, v in expected]
    assert [step for step, _ in scalars(tmp_path, "bytes/halo")] == list(range(1, 13))
    assert [step for step, _ in scalars(tmp_path, "validation_loss")] == [3, 6, 9, 12]


def test_a_validation_that_is_repeated_is_logged_once(root: Path, tmp_path: Path) -> None:
    settings = tiny(root, run={"tensorboard": True})
    run(settings, tmp_path, 0, 6, saves=(6,))
    with Report(settings, tmp_path, active=True, first_step=6) as report:
        assert report.has_validation(6)
        assert not report.has_validation(5)
        report.validation(6, 6.0, 2.0)
    assert [r["step"] for r in read(tmp_path) if "validation_loss" in r] == [3, 6]
    assert [step for step, _ in scalars(tmp_path, "validation_loss")] == [3, 6]


@pytest.mark.parametrize(
    "tail",
    [
        *(
            b'{"step": 3, "lo',
            b'{"step": 3}',
            b"\0\0\0\0",
            b"\xff\n",
            b"[1]\n",
            b'{"step": true}\n',
        ),
        b"[" * 100_000,
    ],
    ids=["cut", "no_end", "nul", "no_utf8", "list", "true", "nested"],
)
def test_lines_torn_by_a_kill_are_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 0.5}\n{"step": 2, "validation_loss": 1.5}\n'
    path.write_bytes(whole + tail)
    file = MetricsFile(path, 2, warn=lambda text: pytest.fail(text))
    assert file.validated == {2}
    file.write({"step": 3})
    file.close()
    assert path.read_bytes() == whole + b'{"step": 3}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_line_without_its_end_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    file = MetricsFile(path, 2, warn=lambda text: pytest.fail(text))
    file.write({"step": 3})
    file.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_full_disk_is_told_once_and_lines_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, warn=told.append)
    write, room = os.write, [30]

    def limited(file: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = write(file, data[: room[0]])
        room[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(logs.os, "write", limited)
        for step in range(1, 6):
            file.write({"step": step})
            # What is there is whole lines.
            assert all(line.endswith(b"}\n") for line in path.read_bytes().splitlines(True))
    assert len(told) == 1
    assert "metrics.jsonl: No space left on device" in told[0]
    file.write({"step": 6})
    file.close()
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_lines_are_held_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "HELD_LINES", 3)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    told: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, warn=told.append)
    for step in range(10):
        file.write({"step": step})
    file.sync()
    file.close()
    assert len(told) == 1
    assert len(file._held) == 3


def test_a_full_disk_under_tensorboard_is_told_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    settings = tiny(root, run={"tensorboard": True})
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with Report(settings, tmp_path, active=True, first_step=0) as report:
        report.step({"step": 1, **VALUES}, {})
        report.sync()
        monkeypatch.setattr(RecordWriter, "write", full)
        monkeypatch.setattr(RecordWriter, "flush", full)
        for step in range(2, 60):
            report.step({"step": step, **VALUES}, {})
            report.sync()
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 60))


def test_tensorboard_goes_on_when_there_is_room_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    settings = tiny(root, run={"tensorboard": True})
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with Report(settings, tmp_path, active=True, first_step=0) as report:
        for step in range(1, 9):
            with monkeypatch.context() as patch:
                if step in (3, 4):
                    patch.setattr(RecordWriter, "write", full)
                    patch.setattr(RecordWriter, "flush", full)
                report.step({"step": step, **VALUES}, {})
                report.sync()
    steps = [step for step, _ in scalars(tmp_path, "loss")]
    assert steps == [1, 2, 5, 6, 7, 8] or steps == [1, 2, 6, 7, 8]


def test_a_folder_that_cannot_be_logged_to_is_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    (tmp_path / "metrics.jsonl").mkdir()
    settings = tiny(root, run={"tensorboard": True})
    with Report(settings, tmp_path, active=True, first_step=0) as report:
        report.step({"step": 1, **VALUES}, {})
        report.validation(1, 1.0, 2.0)
    told = capsys.readouterr().out
    assert told.count("warning:") == 2
    assert "step      1" in told


def test_a_pipe_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    told: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, warn=told.append)
    file.write({"step": 1})
    file.close()
    assert len(told) == 1
    assert "metrics.jsonl: No such device or address" in told[0]


PRINTS = """
import sys
sys.path.insert(0, sys.argv[1])
from launch.reporting.logs import Screen
screen = Screen(highlight=False)
for line in range(50):
    screen.say("line", line)
sys.stderr.write("went on")
"""


@pytest.mark.parametrize("kind", ["closed_pipe", "full_disk"])
def test_nobody_reading_does_not_end_a_run(kind: str) -> None:
    line = [sys.executable, "-c", PRINTS, str(Path(local.__file__).parents[1])]
    if kind == "full_disk":
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                line, stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
            )
        told = "No space left on device"
    else:
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            line, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment()
        )
        os.close(writer)
        told = "nobody reads it any more"
    assert done.returncode == 0
    assert done.stderr == f"warning: standard output: {told}; the run goes on\nwent on"


def test_the_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    steps = history.UNREAD * 2 + 5
    kept = History()
    for step in range(steps):
        kept.add(torch.tensor([float(step), -float(step), 7.0]))
        assert len(kept._unread) < history.UNREAD
    kept.read()
    assert list(kept.losses) == [float(step) for step in range(steps)]
    assert kept.grad_norms[-1] == -(steps - 1)
    assert kept.last == [steps - 1, -(steps - 1), 7.0]
    assert kept.latest_losses(3) == [steps - 3, steps - 2, steps - 1]
    assert kept.losses.maxlen == kept.grad_norms.maxlen == history.KEPT

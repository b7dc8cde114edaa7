"""A hang is told while it lasts: by which ranks, and where they wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.processes.watchdog import Watchdog, named
from tests.launch.processes import started, torchrun
from tests.launch.test_signals import wait_for_step, write_config

SECONDS = 0.5


@contextmanager
def stalled(folder: Path, rank: int, size: int) -> Iterator[Watchdog]:
    """A watchdog whose rank has made no progress for long enough to say so."""
    with Watchdog(folder, rank, size, SECONDS) as watchdog:
        watchdog.now("step 7")
        time.sleep(1.2 * SECONDS)
        yield watchdog


def test_rank_0_says_who_waits_and_who_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stalled(tmp_path, 1, 4), stalled(tmp_path, 2, 4), stalled(tmp_path, 0, 4):
        pass
    text = capsys.readouterr().err
    assert "no progress for 0 s, and the run ends after run.timeout = 0.5 s without any" in text
    assert "  ranks 0-2: step 7, outside of this program\n" in text
    assert "  rank 3: no answer: stopped, dead, or elsewhere than in a wait\n" in text
    assert str(tmp_path / "stalls") in text
    stacks = (tmp_path / "stalls" / "rank_00001.txt").read_text()
    assert f"rank 1, process {os.getpid()} on " in stacks
    assert "thread MainThread" in stacks and "time.sleep(1.2 * SECONDS)" in stacks


def test_a_rank_that_goes_on_says_so_and_is_watched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stalled(tmp_path, 1, 2) as watchdog:
        watchdog.now("step 8")
        time.sleep(0.1)
        assert capsys.readouterr().err == "rank 1 goes on: step 8\n"
        path = tmp_path / "stalls" / "rank_00001.txt"
        assert not path.exists() and path.with_suffix(".earlier.txt").exists()
        time.sleep(1.1 * SECONDS)
        assert path.read_text().startswith("step 8, ")


def test_progress_is_not_a_stall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watchdog(tmp_path, 0, 1, SECONDS) as watchdog:
        for step in range(8):
            watchdog.now(f"step {step}")
            time.sleep(SECONDS / 5)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stalls").write_text("")
    with stalled(tmp_path, 1, 2):
        pass
    text = capsys.readouterr().err
    assert "it would have written:\nstep 7, outside of this program" in text


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([1, 3], "ranks 1, 3")]
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert named(ranks) == text


def test_the_thread_ends_with_the_run(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 600.0):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_is_stopped_is_told_before_the_run_ends(root: Path, tmp_path: Path) -> None:
    write_config(root, tmp_path, timeout=15.0)
    with started([*torchrun(2), "run.toml"], tmp_path) as process:
        wait_for_step(process, tmp_path)
        os.kill(process.ranks()[1], signal.SIGSTOP)
        process.wait_for("no progress for 1")
        process.wait_for("rank 1: no answer: stopped, dead, or elsewhere than in a wait")
        assert process.wait() == 1
    (line,) = [x for x in process.text.splitlines() if "  rank 0: step " in x]
    # Whichever it was in: a message of the attention, or a sum of the engine's.
    assert ", in the message '" in line or ", in all_" in line, line

"""`make test-gpu` gives each process a GPU of its own, then all of them, and ends in time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests import on_gpus

CONFTEST = "from tests.on_gpus import take_own_gpu\n\ntake_own_gpu()\n"
TESTS = """
import os
import time
from pathlib import Path

import pytest

SEEN = Path(__file__).with_name("seen")


def note(name):
    time.sleep(0.5)  # So that no process takes all tests.
    with SEEN.open("a") as file:
        file.write(f"{name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(6))
def test_one(number):
    note("one")


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_several():
    note("several")
    raise AssertionError


def test_none():
    note("none")
"""


def test_each_process_has_a_gpu_and_then_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(on_gpus, "MOST_WORKERS_A_GPU", 1)
    monkeypatch.setattr(on_gpus.os, "sched_getaffinity", lambda _: range(8))
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (tmp_path / "test_gpus.py").write_text(TESTS, encoding="utf-8")
    assert on_gpus.main([str(tmp_path)]) == pytest.ExitCode.TESTS_FAILED
    seen = (tmp_path / "seen").read_text(encoding="utf-8").splitlines()
    assert sorted(set(seen)) == ["one 3", "one 5", "several 3,5"]
    assert len(seen) == 7


@pytest.mark.parametrize(
    "code",
    ["pass", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
    ids=["sums_up", "hangs"],
)
def test_what_takes_too_long_is_ended(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpus, "SECONDS_TO_SUM_UP", 1)
    command = [sys.executable, "-c", f"import time; {code}; time.sleep(100)"]
    started = time.monotonic()
    assert on_gpus.run(command, {}, 0.5) == pytest.ExitCode.INTERRUPTED
    assert time.monotonic() - started < 50


def test_processes_by_gpus_and_cores() -> None:
    assert on_gpus.halves(["0"], 16)[0][1] == 14
    assert [run[1] for run in on_gpus.halves(["0", "1", "2", "3"], 64)] == [56, 5]
    assert [run[1] for run in on_gpus.halves(["0", "1"], 2)] == [1, 1]


def test_no_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit):
        on_gpus.main([])
    assert "must run on a machine with a GPU" in capsys.readouterr().err

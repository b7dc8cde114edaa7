"""The run's folder: one on all ranks, of one run at a time, never of two."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.settings import Settings, to_toml
from launch.storage import folder as folders
from launch.storage import lock as locks
from launch.storage.lock import FolderLock, Owner
from tests.distributed.ranks import Ranks
from tests.launch.common import hold_folder, hold_folders, put_settings, replaced, tiny
from tests.launch.processes import TRAIN, started, started_ranks, torchrun

RanksOf = Callable[[int], Ranks]


def write_lock(folder: Path, age: float = 0.0, **changes: object) -> Owner:
    """A lock that another process left, ``age`` seconds ago."""
    owner = dataclasses.replace(Owner.here(), **changes)  # type: ignore[arg-type]
    path = folder / locks.NAME
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    heard = time.time() - age
    os.utime(path, (heard, heard))
    return owner


def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def in_folder(root: Path, folder: Path, **options: object) -> Settings:
    return tiny(root, run={"folder": str(folder), **options})


def test_a_folder_is_locked_while_it_is_used_and_free_afterwards(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    seen = starting_ranks(2).run(hold_folder, in_folder(root, tmp_path / "a" / "b"))
    assert {folder for folder, _ in seen} == {tmp_path / "a" / "b"}
    assert all(names == [locks.NAME] for _, names in seen)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_failing_run_frees_its_folder(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    for ok, _ in starting_ranks(2).try_run(hold_folder, in_folder(root, tmp_path), "fail"):
        assert not ok
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_live_owner_keeps_the_folder(starting_ranks: RanksOf, root: Path, tmp_path: Path) -> None:
    # This process lives, however long it has not been heard of.
    owner = write_lock(tmp_path, age=1000)
    for ok, text in starting_ranks(2).try_run(hold_folder, in_folder(root, tmp_path)):
        assert not ok
        must = f"a folder in which no other run trains ({owner} does)"
        assert f"run.folder must be {must}, got '{tmp_path}'" in text
    assert FolderLock(tmp_path).holder() == owner


@pytest.mark.parametrize(
    "changes",
    [{"pid": dead_pid()}, {"started": "1"}],
    ids=["dead", "pid_taken_by_another_process"],
)
def test_a_dead_owner_on_this_machine_frees_the_folder_at_once(
    starting_ranks: RanksOf, root: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    write_lock(tmp_path, age=0, **changes)
    start = time.monotonic()
    starting_ranks(2).run(hold_folder, in_folder(root, tmp_path))
    assert time.monotonic() - start < locks.STALE_SECONDS / 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["", "null", "[" * 100_000, '{"pid": 1}', "a list for a token", "text for a pid"],
    ids=["empty", "null", "nested", "cut", "token", "pid"],
)
def test_a_lock_that_does_not_say_whose_it_is(tmp_path: Path, content: str) -> None:
    changes: dict[str, dict[str, object]] = {
        "a list for a token": {"token": []},
        "text for a pid": {"pid": "1"},
    }
    write_lock(tmp_path, 0, **changes.get(content, {}))
    if content not in changes:
        (tmp_path / locks.NAME).write_text(content)
    found = FolderLock(tmp_path).holder()
    assert found is not None
    assert found.lives() is None
    assert str(found) == "process 0 on an unknown host"


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
def test_what_is_no_lock_in_its_place_is_told(
    starting_ranks: RanksOf, root: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / locks.NAME
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(kind, lambda: path.symlink_to("nowhere"))()
    for ok, text in starting_ranks(2).try_run(hold_folder, in_folder(root, tmp_path)):
        assert not ok
        assert (
            f"run.folder must be a folder to write in, got [Errno 22] No regular file: '{path}'"
            in text
        )
    assert [file.name for file in tmp_path.iterdir()] == [locks.NAME]


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen(["sleep", "100"])
    owner = dataclasses.replace(Owner.here(), pid=child.pid, started=locks._started(child.pid))
    assert owner.lives() is True
    child.kill()
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert owner.lives() is False
    child.wait()


def test_an_owner_elsewhere_is_waited_for_until_it_is_stale(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    write_lock(tmp_path, age=locks.STALE_SECONDS - 2, host="elsewhere", machine="another")
    start = time.monotonic()
    starting_ranks(2).run(hold_folder, in_folder(root, tmp_path))
    assert 1 < time.monotonic() - start < locks.STALE_SECONDS / 2
    # Long stale: at once.
    write_lock(tmp_path, age=1000, host="elsewhere", machine="another")
    start = time.monotonic()
    starting_ranks(2).run(hold_folder, in_folder(root, tmp_path))
    assert time.monotonic() - start < locks.STALE_SECONDS / 2


def test_a_heartbeat_of_the_future_gets_old(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    write_lock(tmp_path, age=-1e6, host="elsewhere", machine="another")
    starting_ranks(2).run(hold_folder, in_folder(root, tmp_path), "impatient")
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_from_elsewhere_shows_a_live_owner(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    owner = write_lock(tmp_path, age=5, host="elsewhere", machine="another")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.3):
            os.utime(tmp_path / locks.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for ok, text in starting_ranks(2).try_run(hold_folder, in_folder(root, tmp_path)):
            assert not ok
            assert f"a folder in which no other run trains ({owner} does), got" in text
    finally:
        done.set()
        thread.join()


def test_a_rank_on_the_owners_machine_tells_that_it_is_dead(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    # Rank 0 cannot see it, rank 1 can.
    write_lock(tmp_path, age=0, pid=dead_pid())
    start = time.monotonic()
    starting_ranks(2).run(hold_folder, in_folder(root, tmp_path), "rank 0 elsewhere")
    assert time.monotonic() - start < locks.STALE_SECONDS / 2


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        if round_ % 2:
            write_lock(folder, pid=dead_pid())
        contenders = [FolderLock(folder) for _ in range(2)]
        took = []

        def contend(lock: FolderLock, took: list[FolderLock] = took) -> None:
            while not lock.take():
                holder = lock.holder()
                if holder is None:
                    continue
                if holder.lives():
                    return
                assert holder.lives() is False
                lock.remove(holder)
            took.append(lock)

        threads = [threading.Thread(target=contend, args=(lock,)) for lock in contenders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(took) == 1
        assert FolderLock(folder).holder() == took[0].owner
        took[0].release()
        assert list(folder.iterdir()) == []


def test_a_dead_ones_removal_leaves_a_newer_lock(tmp_path: Path) -> None:
    dead = write_lock(tmp_path, pid=dead_pid())
    late = FolderLock(tmp_path)
    FolderLock(tmp_path).remove(dead)
    winner = FolderLock(tmp_path)
    assert winner.take()
    late.remove(dead)
    assert winner.holder() == winner.owner
    winner.release()
    assert list(tmp_path.iterdir()) == []


def test_the_heartbeat_renews_and_notices_a_new_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    lost: list[str] = []
    lock = FolderLock(tmp_path, lost=lost.append)
    assert lock.take()
    os.utime(lock.path, (1, 1))
    wait(lambda: (lock.heard() or 0) > 1)
    # Removed by hand: made again.
    lock.path.unlink()
    wait(lambda: lock.holder() == lock.owner)
    other = write_lock(tmp_path)
    wait(lambda: bool(lost))
    assert str(other) in lost[0]
    lock.release()
    assert lock.holder() == other


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["a/b", "..", "a\\b", "a\nb", "../../x"])
def test_a_name_that_would_leave_its_folder_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.name must be a name without slashes"):
        folders.check_folder_options(tiny(root, run={"name": name}).run)
    folders.check_folder_options(tiny(root, run={"name": name, "folder": "f"}).run)


def test_a_resume_without_a_folder_is_refused(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"run\.resume must be False without run\.folder.*, got True"
    ):
        folders.check_folder_options(tiny(root, run={"resume": True}).run)


def test_new_folders_of_one_second_are_two(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders.time, "strftime", lambda _: "20260101-000000")
    run = tiny(root, run={"name": "mine"}).run
    assert [folders._make(run) for _ in range(3)] == [
        "runs/mine-20260101-000000",
        "runs/mine-20260101-000000-2",
        "runs/mine-20260101-000000-3",
    ]


def test_a_folder_that_is_not_shared_is_refused_on_every_rank(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    each = [str(tmp_path / str(rank)) for rank in range(2)]
    for ok, text in starting_ranks(2).try_run(hold_folders, in_folder(root, Path("run")), each):
        assert not ok
        assert (
            "run.folder must be a folder that all nodes share, by its whole path (rank 1 (on "
            in text
        )
        assert "cannot see what rank 0" in text
    # No lock, no token file is left.
    assert list((tmp_path / "0" / "run").iterdir()) == []
    # A relative name from one folder is one folder.
    starting_ranks(2).run(hold_folders, in_folder(root, Path("run")), [each[0]] * 2)


@pytest.mark.parametrize("kind", ["file", "below_a_file"])
def test_a_folder_that_cannot_be_made_is_refused_on_every_rank(
    starting_ranks: RanksOf, root: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" if kind == "file" else tmp_path / "file" / "below"
    for ok, text in starting_ranks(2).try_run(hold_folder, in_folder(root, path)):
        assert not ok
        assert "ValueError: run.folder must be a folder to write in, got " in text
        assert "run.folder must be a folder to write in, got " in text


def test_settings_that_cannot_be_written_are_told_on_every_rank(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.toml").mkdir()
    for ok, text in starting_ranks(2).try_run(put_settings, in_folder(root, tmp_path)):
        assert not ok
        assert "ValueError: run.folder must be a folder to write in, got " in text
        assert "settings.toml" in text
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]


def test_a_full_disk_leaves_the_settings_that_were_there(
    starting_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.toml").write_text("before")
    for ok, text in starting_ranks(2).try_run(put_settings, in_folder(root, tmp_path), 100):
        assert not ok
        assert (
            "ValueError: run.folder must be a folder to write in, got [Errno 27] File too large: "
            in text
        )
        assert "settings.toml" in text
    assert (tmp_path / "settings.toml").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_two_runs_started_at_once_one_goes_on(root: Path, tmp_path: Path) -> None:
    settings = replaced(tiny(root, parallel={"cp": 2}), "run", folder="run", steps=40)
    (tmp_path / "run.toml").write_text(to_toml(settings))
    line = torchrun(2)
    with (
        started([*line, "run.toml"], tmp_path, "a") as a,
        started([*line, "run.toml"], tmp_path, "b") as b,
    ):
        codes = [process.wait() for process in (a, b)]
        assert sorted(codes) == [0, 1]
        loser = (a, b)[codes.index(1)]
        assert "run.folder must be a folder in which no other run trains" in loser.text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_in_unshared_folders_end_with_status_1(root: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    config = tmp_path / "run.toml"
    config.write_text(to_toml(tiny(root, run={"folder": "run"})))
    lines = [[sys.executable, TRAIN, str(config)]] * 2
    with started_ranks(lines, [tmp_path / "0", tmp_path / "1"]) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert (
                "run.folder must be a folder that all nodes share, by its whole path (rank 1"
                in rank.text
            )


def test_a_lock_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the folder may not be written to any more."""
    lock = FolderLock(tmp_path)
    assert lock.take()

    def denied(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", denied)
        lock.release()
    assert "run.lock: not removed: [Errno 13] Permission denied" in capsys.readouterr().err

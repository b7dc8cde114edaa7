"""Only whole checkpoints are used, a kill loses none, and other files are not touched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.settings import Settings, from_toml, to_toml
from launch.storage.manifest import FORMAT
from launch.train import Result
from tests.distributed.ranks import RankError, Ranks
from tests.launch.checkpoints import (
    BUSY,
    DAMAGE,
    DENIED,
    fail_while_it_saves,
    find,
    find_as_rank_0_sees,
    find_damaged,
    kill_at_each_call,
    make_old,
    reseal,
    run_slowly_saved,
    run_with_full_disk,
    save_steps,
    save_with_trouble,
    shard,
    train_and_tell,
    try_resume,
)
from tests.launch.common import replaced, run_training, tiny

RanksOf = Callable[[int], Ranks]
REPOSITORY = Path(__file__).resolve().parents[2]


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def three(ranks_of: RanksOf, root: Path) -> tuple[Settings, Result]:
    """A run of two ranks with checkpoints of steps 1 to 3."""
    run = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 0}
    settings = tiny(root, parallel={"cp": 2}, run={**run, "folder": str(root / "three")})
    return settings, ranks_of(2).run(run_training, settings)[0]


@pytest.fixture(scope="module")
def damaged(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, tuple[str, list[str]]]]:
    """Of each rank what it finds after each kind of damage."""
    scratch = tmp_path_factory.mktemp("damaged")
    return ranks_of(2).run(find_damaged, Path(three[0].run.folder), scratch)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    damaged: list[dict[str, tuple[str, list[str]]]], kind: str
) -> None:
    for rank, found in enumerate(damaged):
        name, told = found[kind]
        assert name == "step_00000002"
        # Told once, by the rank that all follow.
        assert len(told) == (rank == 0)
    _, (text,) = damaged[0][kind]
    assert re.search(rf"step_00000003 is passed over: .*{DAMAGE[kind][1]}", text), text


def test_a_run_goes_on_from_the_one_before_and_writes_the_damaged_one_anew(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    settings, expected = three
    folder = tmp_path / "run"
    shutil.copytree(settings.run.folder, folder)
    broken = folder / "checkpoints" / "step_00000003"
    shard(broken).write_bytes(b"")
    settings = replaced(settings, "run", folder=str(folder), resume=True)
    (result, told), _ = ranks_of(2).run(train_and_tell, settings)
    assert result.losses == expected.losses[2:]
    assert len(told) == 1
    assert "__0_0.distcp has 0 bytes" in told[0]
    assert ranks_of(2).run(find, folder) == [("step_00000003", [])] * 2
    assert steps(folder) == ["step_00000001", "step_00000002", "step_00000003"]


def test_fewer_steps_than_the_checkpoint_log_nothing_of_another_step(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    settings, expected = three
    shutil.copytree(settings.run.folder, tmp_path / "run")
    run = {"folder": str(tmp_path / "run"), "resume": True, "steps": 2}
    result, _ = ranks_of(2).run(run_training, replaced(settings, "run", **run))
    assert result.validation_loss == expected.validation_loss
    before, after = (
        (folder / "metrics.jsonl").read_text()
        for folder in (Path(settings.run.folder), tmp_path / "run")
    )
    assert after == before


def test_without_a_whole_checkpoint_a_run_does_not_start_anew(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    for path in (Path(three[0].run.folder) / "checkpoints").iterdir():
        shutil.copytree(path, tmp_path / "checkpoints" / path.name)
        shard(tmp_path / "checkpoints" / path.name).unlink()
    answers = ranks_of(2).try_run(find, tmp_path)
    for ok, text in answers:
        assert not ok
        for step in (1, 2, 3):
            assert f"step_0000000{step}: __0_0.distcp is missing" in text
        assert "ValueError: run.resume must find a whole checkpoint in" in text
    assert ranks_of(2).run(find, tmp_path / "nothing") == [(None, [])] * 2
    # What cannot be listed may hold some.
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "checkpoints").write_text("")
    with pytest.raises(RankError, match=r"CheckpointError: .*Not a directory"):
        ranks_of(2).run(find, tmp_path / "file")


def test_rank_0_finds_the_step_for_all(ranks_of: RanksOf, three: tuple[Settings, Result]) -> None:
    folder = Path(three[0].run.folder)
    assert ranks_of(2).run(find_as_rank_0_sees, folder) == [("step_00000003", [])] * 2


def test_a_later_format_is_refused(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    shutil.copytree(three[0].run.folder, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000003"
    reseal(newest, lambda table: table.update(format=FORMAT + 1))
    with pytest.raises(RankError, match=r"format of .*manifest\.json must be at most 1 .*, got 2"):
        ranks_of(2).run(find, tmp_path / "run")
    text = to_toml(three[0]).replace("format = 1", "format = 2")
    (tmp_path / "later.toml").write_text(text)
    with pytest.raises(ValueError, match=r"format must be 1 to 1 .*, got 2"):
        from_toml(tmp_path / "later.toml")


def test_a_checkpoint_without_format_loads_with_a_warning(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    settings, expected = three
    folder = tmp_path / "run"
    shutil.copytree(settings.run.folder, folder)
    for step in (1, 2, 3):
        make_old(folder / "checkpoints" / f"step_0000000{step}")
    # By the rules of then it is not whole.
    (folder / "checkpoints" / "step_00000003" / ".metadata").unlink()
    settings = replaced(settings, "run", folder=str(folder), resume=True)
    (result, told), (_, others) = ranks_of(2).run(train_and_tell, settings)
    assert result.losses == expected.losses[2:]
    assert [re.sub(r".*step_", "", text) for text in told] == [
        "00000003 is passed over: .metadata is missing",
        "00000002 is from before checkpoints had manifests: it is read without verification",
    ]
    assert not others


def test_the_same_documents_elsewhere_go_on_and_others_do_not(
    ranks_of: RanksOf, three: tuple[Settings, Result], root: Path, tmp_path: Path
) -> None:
    settings, expected = three
    folder = tmp_path / "run"
    shutil.copytree(settings.run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000003")
    documents = tmp_path / "moved"
    shutil.copytree(root / "documents", documents)
    settings = replaced(settings, "run", folder=str(folder), resume=True)
    settings = replaced(settings, "data", path=str(documents), pattern="*.txt")
    ranks = ranks_of(2)
    (result, told), _ = ranks.run(train_and_tell, settings)
    assert result.losses == expected.losses[2:]
    assert not told

    shutil.rmtree(folder / "checkpoints" / "step_00000003")
    (documents / "07.txt").write_text((documents / "08.txt").read_text())
    message = rf"data\.path must give the checkpoint's tokens .*, got '{documents}' with digest"
    with pytest.raises(RankError, match=message):
        ranks.run(run_training, settings)
    other = replaced(settings, "data", tokenizer="another.json")
    with pytest.raises(
        RankError, match=r"data\.tokenizer must give .*, got 'another\.json' with digest"
    ):
        ranks.run(try_resume, folder, other, "another digest")
    # Before there were digests, only the path could tell.
    make_old(folder / "checkpoints" / "step_00000002")
    with pytest.raises(
        RankError, match=r"data\.path must be .*, the checkpoint's value, got .*moved'"
    ):
        ranks.run(try_resume, folder, settings, "any digest")


@pytest.fixture(scope="module")
def small(root: Path) -> Settings:
    return tiny(root, run={"keep_checkpoints": 2})


def test_names_that_are_not_ours_are_neither_taken_nor_removed(
    ranks_of: RanksOf, small: Settings, tmp_path: Path
) -> None:
    ranks = ranks_of(1)
    ranks.run(save_steps, tmp_path, [1, 2], small)
    folder = tmp_path / "checkpoints"
    others = ["step_00000003.bak", "step_00000001_best", "step_00000009_universal", "step_9"]
    for name in (*others, "step_000000007", "step_0000000a", "notes"):
        shutil.copytree(folder / "step_00000002", folder / name)
    (folder / "step_00000008").symlink_to(folder / "step_00000002")
    (folder / "step_00000007").write_text("a file")
    (folder / "step_00000004").mkdir()
    (folder / "step_00000004" / "mine.txt").write_text("where a checkpoint is to be")
    before = steps(tmp_path)
    ((name, told),) = ranks.run(find, tmp_path)
    assert name == "step_00000002"
    assert len(told) == 1
    assert "step_00000004 is passed over" in told[0]

    (told,) = ranks.run(save_steps, tmp_path, [3, 4, 5], small)
    gone = {"step_00000001", "step_00000002"}
    now = {"step_00000004", "step_00000005", "step_00000004.moved"}
    assert set(steps(tmp_path)) == (set(before) - gone) | now
    assert (folder / "step_00000004.moved" / "mine.txt").exists()
    assert len(told) == 1
    assert "step_00000004 is not a checkpoint" in told[0]


def test_damaged_checkpoints_count_for_none_that_are_kept(
    ranks_of: RanksOf, small: Settings, tmp_path: Path
) -> None:
    ranks = ranks_of(1)
    ranks.run(save_steps, tmp_path, [2, 4], replaced(small, "run", keep_checkpoints=0))
    ranks.run(save_steps, tmp_path, [6], replaced(small, "run", keep_checkpoints=0))
    (tmp_path / "checkpoints" / "step_00000004" / "a.distcp").write_text("")
    # Of a branch that the run left.
    ranks.run(save_steps, tmp_path, [5], small)
    assert steps(tmp_path) == [f"step_0000000{step}" for step in (2, 4, 5, 6)]
    ranks.run(save_steps, tmp_path, [7], small)
    assert steps(tmp_path) == [f"step_0000000{step}" for step in (6, 7)]


def test_the_universal_form_goes_with_its_checkpoint(
    ranks_of: RanksOf, small: Settings, tmp_path: Path
) -> None:
    ranks = ranks_of(1)
    ranks.run(save_steps, tmp_path, [1, 2], small)
    for step in (1, 2, 4):
        (tmp_path / "checkpoints" / f"step_0000000{step}_universal" / "zero").mkdir(parents=True)
    ranks.run(save_steps, tmp_path, [3, 4], small)
    assert steps(tmp_path) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize(
    "call, number", [("rmtree", BUSY), ("rename", DENIED)], ids=["busy", "denied"]
)
def test_rotation_warns_and_the_run_goes_on(
    ranks_of: RanksOf, small: Settings, tmp_path: Path, call: str, number: int
) -> None:
    ranks = ranks_of(1)
    (told,) = ranks.run(save_with_trouble, tmp_path, [1, 2, 3, 4], small, call, number)
    assert told
    assert all("is left and can be removed" in text for text in told)
    ((name, _),) = ranks.run(find, tmp_path)
    assert name == "step_00000004"
    # When the trouble is over everything is put right.
    assert ranks.run(save_steps, tmp_path, [5], small) == [[]]
    assert steps(tmp_path) == ["step_00000004", "step_00000005"]


def test_a_kill_at_any_moment_leaves_the_old_one_or_a_whole_new_one(
    ranks_of: RanksOf, small: Settings, tmp_path: Path
) -> None:
    ranks = ranks_of(1)
    ranks.run(save_steps, tmp_path / "run", [1, 2], small)
    ((results),) = ranks.run(kill_at_each_call, tmp_path / "run", tmp_path, small)
    newest = [name for name, _ in results]
    assert len(results) > 15
    assert newest == sorted(newest)
    assert set(newest) == {"step_00000002", "step_00000003"}
    assert {name for _, name in results} == {"step_00000003"}


@pytest.mark.parametrize(("rank", "in_background"), [(0, False), (1, False), (1, True)])
def test_a_full_disk_of_one_rank_is_told_on_every_rank(
    ranks_of: RanksOf,
    three: tuple[Settings, Result],
    tmp_path: Path,
    rank: int,
    in_background: bool,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(three[0].run.folder, folder)
    settings = replaced(three[0], "run", folder=str(folder), resume=True, steps=4)
    settings = replaced(settings, "run", async_checkpoints=in_background)
    texts = ranks_of(2).run(run_with_full_disk, run_training, settings, rank, 2000)
    assert texts[0] == texts[1]
    told = rf"step_00000004: not written \(rank {rank}: .* bytes were free, .* are without it"
    assert re.search(told, texts[0])
    assert steps(folder) == [f"step_0000000{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_is_full_for_a_while_ends_no_run(
    ranks_of: RanksOf, root: Path, tmp_path: Path, in_background: bool
) -> None:
    """A checkpoint is tried again soon, and nothing that was trained is lost."""
    run = {"steps": 9, "checkpoint_every": 4, "keep_checkpoints": 0, "log_every": 1}
    settings = tiny(root, parallel={"cp": 2}, run={**run, "folder": str(tmp_path / "run")})
    settings = replaced(settings, "run", async_checkpoints=in_background)
    text, _ = ranks_of(2).run(run_with_full_disk, run_training, settings, 1, 2000, {4, 5})
    assert text == ""
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    told = [(record["step"], record["not_saved"]) for record in records if "not_saved" in record]
    assert "step_00000004: not written (rank 1: " in told[0][1]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 10))
    if in_background:  # How far the run is when one fails is not always the same.
        assert steps(tmp_path / "run")[-2:] == ["step_00000008", "step_00000009"]
    else:
        assert [step for step, _ in told] == [4, 5]
        assert [name[-1] for name in steps(tmp_path / "run")] == ["6", "8", "9"]


def test_a_run_ends_that_cannot_save_until_the_next_checkpoint_is_due(
    ranks_of: RanksOf, root: Path, tmp_path: Path
) -> None:
    run = {"steps": 20, "checkpoint_every": 4, "folder": str(tmp_path / "run")}
    settings = tiny(root, parallel={"cp": 2}, run=run)
    texts = ranks_of(2).run(run_with_full_disk, run_training, settings, 0, 2000)
    assert texts[0] == texts[1]
    assert "step_00000008: not written (rank 0: " in texts[0]
    assert steps(tmp_path / "run") == []


def test_a_run_that_saves_in_the_background_is_the_same(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    """Losses, and every byte of every checkpoint's tensors: what is copied is not what comes."""
    settings, expected = three
    settings = replaced(settings, "run", folder=str(tmp_path / "run"), async_checkpoints=True)
    result, *_ = ranks_of(2).run(run_slowly_saved, settings)
    assert result.losses == expected.losses
    assert steps(tmp_path / "run") == steps(expected.folder)
    for name in steps(expected.folder):
        for path in sorted((expected.folder / "checkpoints" / name).glob("*.distcp")):
            other = tmp_path / "run" / "checkpoints" / name / path.name
            assert other.read_bytes() == path.read_bytes(), (name, path.name)
    again = replaced(settings, "run", resume=True, steps=4)
    result, *_ = ranks_of(2).run(run_training, again)
    assert steps(tmp_path / "run")[-1] == "step_00000004"


def test_a_failed_run_keeps_what_it_was_writing(
    ranks_of: RanksOf, three: tuple[Settings, Result], tmp_path: Path
) -> None:
    settings, _ = three
    settings = replaced(settings, "run", folder=str(tmp_path / "run"), async_checkpoints=True)
    texts = ranks_of(2).run(fail_while_it_saves, settings)
    assert set(texts) == {"the second step fails"}
    assert steps(tmp_path / "run") == ["step_00000001"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_steps_beyond_eight_digits_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.steps must be below 10\^8 .*, got 100000000"):
        tiny(root, run={"steps": 10**8})

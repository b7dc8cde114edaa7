"""If ranks were started with different options, every rank raises before anything hangs."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.processes.startup import describe, judge, show_ranks, show_values, source_digest
from launch.settings import Settings, to_toml
from tests.distributed.ranks import Ranks
from tests.launch.common import meet, meet_again, meet_replaced, replaced, start_each, tiny
from tests.launch.processes import TRAIN, started_ranks

RanksOf = Callable[[int], Ranks]


@pytest.mark.parametrize(
    "section, option, values",
    [
        ("optimizer", "lr", (3e-3, 1e-3)),
        ("run", "seed", (0, 1)),
        ("run", "folder", ("", "elsewhere")),
        ("parallel", "cp", (1, 2)),
        ("run", "dtype", ("float32", "float64")),
    ],
)
def test_an_option_that_differs_is_named_on_every_rank(
    starting_ranks: RanksOf, root: Path, section: str, option: str, values: tuple[object, object]
) -> None:
    each = [replaced(tiny(root), section, **{option: value}) for value in values]
    for ok, text in starting_ranks(2).try_run(start_each, each):
        assert not ok
        both = f"rank 0: {values[0]!r}, rank 1: {values[1]!r}"
        assert f"{section}.{option} must be the same on every rank, got {both}" in text


def test_a_problem_of_one_rank_is_told_on_every_rank(starting_ranks: RanksOf, root: Path) -> None:
    each = [tiny(root), tiny(root, run={"device": "cuda"})]
    for ok, text in starting_ranks(2).try_run(start_each, each):
        assert not ok
        assert "run.device must be 'cpu' where no GPU is usable, got 'cuda'" in text
        assert "(on rank 1)" in text


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_meet_by_the_store_and_compare(starting_ranks: RanksOf, size: int) -> None:
    each = [{"a": "1", "b": str(rank // 3)} for rank in range(size)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank, (ok, found) in enumerate(starting_ranks(size).try_run(meet, each, port)):
        assert ok == (size < 4)
        if ok:
            assert found == (rank, size)
        else:
            assert (
                "ValueError: b must be the same on every rank, got ranks 0-2: 0, rank 3: 1" in found
            )


def test_a_restart_reads_nothing_of_the_attempt_before(starting_ranks: RanksOf) -> None:
    # torchrun keeps its store.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    same, other = [{"a": "1"}] * 2, [{"a": "1"}, {"a": "2"}]
    for found in starting_ranks(2).run(meet_again, [same, other, same], store.port):
        assert found[0] == found[2] == ""
        assert found[1].startswith("a must be the same on every rank, got rank 0: 1, rank 1: 2")


def test_ranks_of_a_host_that_was_replaced_meet_those_that_were_restarted(
    starting_ranks: RanksOf,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert starting_ranks(2).run(meet_replaced, [{"a": "1"}] * 2, port) == [(0, 2), (1, 2)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_with_another_option_end_with_its_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(tiny(root)))
    line = [sys.executable, TRAIN, "run.toml"]
    lines = [line, [*line, "--optimizer.lr", "0.5"]]
    with started_ranks(lines, [tmp_path, tmp_path]) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert (
                "optimizer.lr must be the same on every rank, got rank 0: 0.003, rank 1: 0.5"
                in rank.text
            )
            assert "Traceback" not in rank.text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_without_its_config_ends_them_all(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(tiny(root)))
    lines = [[sys.executable, TRAIN, name] for name in ("run.toml", "run.toml", "missing.toml")]
    with started_ranks(lines, [tmp_path] * 3) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert "config must be a TOML file, got 'missing.toml'" in rank.text
            assert "(on rank 2)" in rank.text


def table(settings: Settings) -> dict[str, str]:
    return describe(settings, device="cpu")


def test_code_and_the_device_found_are_compared(root: Path) -> None:
    ours = table(tiny(root))
    assert judge([ours, dict(ours)]) == ""
    theirs = {**ours, "code version": "nsa-dist 0"}
    assert judge([ours, ours, theirs]).startswith(
        "code version must be the same on every rank, got ranks 0-1"
    )
    there = {**ours, "run.device, as found": "cuda"}
    assert (
        "run.device, as found must be the same on every rank, got rank 0: cpu, rank 1: cuda"
        in judge([ours, there])
    )


def test_the_digest_is_of_the_sources_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "module.py").write_text("x = 1\n")
        (tmp_path / name / "__pycache__" / f"{name}.pyc").write_text(name)
    first = source_digest([tmp_path / "a"])
    assert source_digest([tmp_path / "b"]) == first
    (tmp_path / "b" / "module.py").write_text("x = 2\n")
    assert source_digest([tmp_path / "b"]) != first
    (tmp_path / "b" / "module.py").rename(tmp_path / "b" / "other.py")
    (tmp_path / "b" / "other.py").write_text("x = 1\n")
    assert source_digest([tmp_path / "b"]) != first


def test_ranks_are_shown_in_runs() -> None:
    assert show_ranks([3]) == "rank 3"
    assert show_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
    assert show_values(["a", "b", "a"]) == "ranks 0, 2: a, rank 1: b"

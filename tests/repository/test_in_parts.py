"""The parts of `make test` have every test, and tell what failed in any of them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from tests.in_parts import NOTHING_SELECTED, PARTS, run_parts

TESTS = Path(__file__).resolve().parents[1]
PASSING, FAILING = "def test_a(): pass\n", "def test_b(): assert 1 == 2\n"


def test_every_test_folder_is_in_a_part() -> None:
    """One that is in none would run nowhere."""
    folders = {f"tests/{x.relative_to(TESTS).parts[0]}" for x in TESTS.rglob("test_*.py")}
    outer = [x for x in chain(*PARTS) if x.count("/") == 1]
    assert sorted(outer) == sorted(folders)


def test_a_folder_inside_another_runs_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    for folder, name in ((tmp_path, "outer"), (tmp_path / "inner", "inner")):
        (folder / f"test_{name}.py").write_text(PASSING, encoding="utf-8")
    parts = ((f"{tmp_path}/inner",), (str(tmp_path),))
    assert run_parts(parts, ["-p", "no:cacheprovider", "-v"]) == (0, [])
    said = capsys.readouterr().out
    assert said.count("test_inner.py::test_a PASSED") == 1
    assert said.count("test_outer.py::test_a PASSED") == 1


@pytest.mark.parametrize(
    "texts, options, code",
    [
        ((PASSING, PASSING), [], 0),
        ((PASSING, FAILING), [], 1),
        ((FAILING, PASSING), ["-k", "test_a"], 0),
        ((PASSING, PASSING), ["-k", "test_c"], NOTHING_SELECTED),
        ((PASSING, "import nothing_of_this_name\n"), [], 2),
    ],
    ids=["passes", "fails", "nothing_in_one", "nothing_anywhere", "no_import"],
)
def test_what_all_parts_say(
    tmp_path: Path,
    texts: tuple[str, ...],
    options: list[str],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = []
    for number, text in enumerate(texts):
        folder = tmp_path / f"part_{number}"
        folder.mkdir()
        (folder / f"test_part_{number}.py").write_text(text, encoding="utf-8")
        parts.append((str(folder),))
    found, failed = run_parts(tuple(parts), ["-p", "no:cacheprovider", *options])
    assert found == code
    assert len(failed) == (code in (1, 2))
    assert all("test_part_1.py" in line for line in failed)
    said = capsys.readouterr().out
    assert all(f"== {folder}: " in said for (folder,) in parts)

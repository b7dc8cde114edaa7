"""Every trap has a test, and every test fails when the bug of its trap is put in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.traps.mutation import ROOT, Mutation, all_mutations
from tests.traps.run_mutations import TREE_AS_IT_IS, can_run

TRAPS = (
    "inverted compression mask",
    "block visible one token early",
    "Eq. 9's sign",
    "finite mask value that leaks future blocks",
    "k larger than the blocks there are",
    "ties",
    "index order changing bits",
    "rows or ranks fully masked",
    "zero compression windows",
    "zero-length documents",
    "slack rows past cu_seqlens[-1]",
    "global grad norm different at cp=1 and cp=4 only with packed documents",
    "tail padding that drops keys",
    "int32 offsets",
    "KV base pointer wrong with batches",
    "unmasked dK/dV store",
    "fp16 dq",
    "float32 atomics not repeatable",
    "global rank used inside a subgroup",
    "labels rolled after sharding",
    "one valid label in the whole batch",
    "NaN left behind in a masked tile",
    "plan cached by shape and used for other documents",
)
# Those that a kernel can fall into.
KERNEL_TRAPS = {
    *TRAPS[:10],
    *TRAPS[12:18],
    "NaN left behind in a masked tile",
}
HEADERS = {
    "traps": "| trap | mutation put in | test that fails |",
    "ops": "| trap | mutation of a kernel | test of `ops` that fails |",
    "adapters": "| trap | mutation of an adapter | test of `adapters` that fails |",
}
MUTATIONS, MISSING = all_mutations()
"""MISSING: the files of tests that need a package that is not here."""


def test_every_trap_has_a_mutation() -> None:
    assert {m.trap for m in MUTATIONS if m.folder == "traps"} == set(TRAPS)
    if not any(file.startswith("ops/") for file in MISSING):
        assert {m.trap for m in MUTATIONS if m.of_kernel} == KERNEL_TRAPS


@pytest.mark.parametrize("folder", HEADERS)
def test_readme_lists_the_mutations(folder: str) -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    table = text.split(f"{HEADERS[folder]}\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    missing = [f"`{file.removeprefix(f'{folder}/')}::" for file in MISSING]
    listed = [row for row in table if not any(file in row for file in missing)]
    assert sorted(listed) == sorted(m.row for m in MUTATIONS if m.folder == folder)


def test_every_mutation_names_a_test() -> None:
    """A renamed row is seen by `make test`, not only where mutations are put in."""
    here = list(filter(can_run, MUTATIONS))
    files = sorted({m.node.partition("::")[0] for m in here})
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--run-slow", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = set(finished.stdout.splitlines())
    found |= {line.partition("[")[0] for line in found}
    assert [m.node for m in here if m.node not in found] == [], finished.stderr


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """pytest's exit status and output for each row of the table, and for the tree as it is."""
    report: Path = tmp_path_factory.mktemp("mutations") / "outcomes.json"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.traps.run_mutations", "--json", str(report)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), finished.stdout + finished.stderr
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_traps_pass_on_the_tree_as_it_is(outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[TREE_AS_IT_IS]
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("mutation", list(filter(can_run, MUTATIONS)), ids=lambda m: m.label)
def test_mutation_is_caught(mutation: Mutation, outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[mutation.row]
    assert code == 1, f"the test passes, or does not run, with the bug in\n{output}"

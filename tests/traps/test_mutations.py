"""Every trap has a test, and every test fails when the bug of its trap is put in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.traps.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
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


def label(mutation: Mutation) -> str:
    """A test id that a person can read."""
    return re.sub(r"[^a-z0-9]+", "-", f"{mutation.trap}: {mutation.bug}".lower())


def test_every_trap_has_a_mutation() -> None:
    assert {mutation.trap for mutation in MUTATIONS} == set(TRAPS)
    assert len({mutation.row for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=label)
def test_mutation_fits_the_code(mutation: Mutation) -> None:
    source = ROOT / mutation.file
    compile(mutation.mutated(ROOT), str(source), "exec")
    file, test = mutation.test.split("::")
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert f"def {test.split('[')[0]}(" in text


def test_readme_lists_the_mutations() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    table = text.split("| trap | mutation put in | test that fails |\n|---|---|---|\n")[1]
    rows = table.split("\n\n")[0].splitlines()
    assert rows == [mutation.row for mutation in MUTATIONS]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """pytest's exit status and output for each row of the table, and for the tree as it is."""
    report = tmp_path_factory.mktemp("mutations") / "outcomes.json"
    program = Path(__file__).with_name("run_mutations.py")
    finished = subprocess.run(
        [sys.executable, str(program), "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), finished.stdout + finished.stderr
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_traps_pass_on_the_tree_as_it_is(outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes["the tree as it is"]
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=label)
def test_mutation_is_caught(mutation: Mutation, outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[mutation.row]
    assert code == 1, f"the test passes, or does not run, with the bug in\n{output}"

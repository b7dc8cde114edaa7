"""Every trap has a test, and every test fails when the bug of its trap is put in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.traps.adapter_mutations import ADAPTER_MUTATIONS, is_installed
from tests.traps.kernel_mutations import KERNEL_MUTATIONS
from tests.traps.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
TREE_AS_IT_IS = "the tree as it is"
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
QUICK = [mutation for mutation in KERNEL_MUTATIONS if mutation.quick]
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton and no GPU"
)
EVERY = [
    *MUTATIONS,
    *(pytest.param(m, marks=interpreted) for m in KERNEL_MUTATIONS),
    *filter(is_installed, ADAPTER_MUTATIONS),
]
HEADERS = {
    "| trap | mutation put in | test that fails |": MUTATIONS,
    "| trap | mutation of a kernel | test of `ops/triton` that fails |": KERNEL_MUTATIONS,
    "| trap | mutation of an adapter | test of `adapters` that fails |": ADAPTER_MUTATIONS,
}


def label(mutation: Mutation) -> str:
    """A test id that a person can read."""
    return re.sub(r"[^a-z0-9]+", "-", f"{mutation.trap}: {mutation.bug}".lower())


def test_every_trap_has_a_mutation() -> None:
    assert {mutation.trap for mutation in MUTATIONS} == set(TRAPS)
    assert {mutation.trap for mutation in KERNEL_MUTATIONS} == KERNEL_TRAPS
    every = (*MUTATIONS, *KERNEL_MUTATIONS, *ADAPTER_MUTATIONS)
    assert len({mutation.row for mutation in every}) == len(every)


@pytest.mark.parametrize("mutation", [*MUTATIONS, *KERNEL_MUTATIONS, *ADAPTER_MUTATIONS], ids=label)
def test_mutation_fits_the_code(mutation: Mutation) -> None:
    source = ROOT / mutation.file
    compile(mutation.mutated(ROOT), str(source), "exec")
    file, test = mutation.test.split("::")
    text = (ROOT / "tests" / mutation.folder / file).read_text(encoding="utf-8")
    assert f"def {test.split('[')[0]}(" in text


def test_readme_lists_the_mutations() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    for header, mutations in HEADERS.items():
        table = text.split(f"{header}\n|---|---|---|\n")[1]
        assert table.split("\n\n")[0].splitlines() == [mutation.row for mutation in mutations]


def run(tmp_path_factory: pytest.TempPathFactory, *options: str) -> dict[str, tuple[int, str]]:
    """pytest's exit status and output for each row of the table, and for the tree as it is."""
    report = tmp_path_factory.mktemp("mutations") / "outcomes.json"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.traps.run_mutations", "--json", str(report), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), finished.stdout + finished.stderr
    return json.loads(report.read_text(encoding="utf-8"))


@interpreted
def test_quick_mutations_are_caught(tmp_path_factory: pytest.TempPathFactory) -> None:
    outcomes = run(tmp_path_factory, "--quick")
    assert outcomes.pop(TREE_AS_IT_IS)[0] == 0
    assert {row: code for row, (code, _) in outcomes.items()} == {m.row: 1 for m in QUICK}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    return run(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_traps_pass_on_the_tree_as_it_is(outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[TREE_AS_IT_IS]
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("mutation", EVERY, ids=label)
def test_mutation_is_caught(mutation: Mutation, outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[mutation.row]
    assert code == 1, f"the test passes, or does not run, with the bug in\n{output}"

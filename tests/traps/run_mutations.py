"""Puts the bugs that stand at tests (``mutation.py``) in, to see each test fail.

    python -m tests.traps.run_mutations [--only TEXT] [--jobs N] [--json FILE]

For every mutation the source tree is copied, the function is changed, and the test runs there in a
process of its own. It must fail; on the tree as it is all of them must pass. Processes are forked
from one that has imported torch, which is most of the time that a test takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.traps.mutation import ROOT, MisfitError, Mutation, all_mutations

COPIED = ("nsa_dist", "kernels", "tests", "launch", "pyproject.toml")
TREE_AS_IT_IS = "the tree as it is"
MISFIT = 71


@dataclass(frozen=True)
class Outcome:
    """How pytest ended: 0 all passed, 1 some failed, above: it could not run them."""

    code: int
    output: str


def run_tests(tree: Path, nodes: list[str]) -> int:
    """pytest's exit status on ``tree``. Changes this process for good: call it in a forked one."""
    os.chdir(tree)
    sources = [str(tree), str(tree / "kernels")]
    sys.path[:] = sources + [path for path in sys.path if path != str(ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # those of this tree
    # Rank processes start from the environment, and import the main module if it has a file.
    os.environ["PYTHONPATH"] = os.pathsep.join(sources)
    sys.modules["__main__"] = types.ModuleType("__main__")
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--run-slow", f"--rootdir={tree}"]
    return int(pytest.main([*options, "-c", str(tree / "pyproject.toml"), *nodes]))


def fork(run: Callable[[], int], log: Path) -> int:
    """Start ``run`` in a process of its own, output to ``log``; its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def copy_tree(target: Path) -> None:
    """The sources and tests, as they are."""
    target.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=skipped)
        else:
            shutil.copy(source, target / name)


def can_run(mutation: Mutation) -> bool:
    """On a GPU a wrong kernel may take the device down; the interpreter only fails."""
    return not (mutation.of_kernel and torch.cuda.is_available())


def write_trees(work: Path, only: str) -> int:
    """A folder of ``work`` for each mutation whose row has ``only``: its row, node and tree.

    Imports the modules of all tests with mutations: call it in a process of its own.
    """
    import tests.conftest  # noqa: F401  (what kernels need before they are imported)

    mutations, _ = all_mutations()
    for number, mutation in enumerate(m for m in mutations if only in m.row and can_run(m)):
        folder = work / str(number)
        folder.mkdir()
        about = {"row": mutation.row, "node": mutation.node}
        try:
            file, text = mutation.change.text(ROOT)
        except MisfitError as error:
            about["misfit"] = str(error)
        else:
            copy_tree(folder / "tree")
            (folder / "tree" / file.relative_to(ROOT)).write_text(text, encoding="utf-8")
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return 0


def run_all(only: str, jobs: int) -> dict[str, Outcome]:
    """Outcomes by the row of a mutation, and of all its tests on the tree as it is."""
    torch.set_num_threads(1)  # before the forks, which cannot share threads
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        log = work / "trees.log"
        _, status = os.waitpid(fork(lambda: write_trees(work, only), log), 0)
        if status:
            raise RuntimeError(log.read_text(encoding="utf-8"))
        outcomes: dict[str, Outcome] = {}
        nodes: dict[str, None] = {}
        waiting: list[tuple[str, Path, list[str]]] = []
        for file in sorted(work.glob("*/about.json"), key=lambda x: int(x.parent.name)):
            about = json.loads(file.read_text(encoding="utf-8"))
            nodes[about["node"]] = None
            if "misfit" in about:
                outcomes[about["row"]] = Outcome(MISFIT, about["misfit"])
                tell(about["row"], outcomes[about["row"]])
            else:
                waiting.append((about["row"], file.parent / "tree", [about["node"]]))
        if nodes:
            copy_tree(work / "as-it-is")
            waiting.insert(0, (TREE_AS_IT_IS, work / "as-it-is", list(nodes)))
        running: dict[int, tuple[str, Path]] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                row, tree, tests = waiting.pop(0)
                log = tree.with_suffix(".log")
                process = fork(lambda tree=tree, tests=tests: run_tests(tree, tests), log)
                running[process] = (row, log)
            process, status = os.wait()
            if process in running:
                row, log = running.pop(process)
                code = os.waitstatus_to_exitcode(status)
                outcomes[row] = Outcome(code, log.read_text(encoding="utf-8", errors="replace"))
                tell(row, outcomes[row])
    return outcomes


def is_right(row: str, outcome: Outcome) -> bool:
    return outcome.code == (0 if row == TREE_AS_IT_IS else 1)


def tell(row: str, outcome: Outcome) -> None:
    """Print one outcome, and the first line of a failure."""
    reasons = [line for line in outcome.output.splitlines() if line.startswith("E  ")]
    if outcome.code == MISFIT:
        reasons = [outcome.output]
    word = "ok   " if is_right(row, outcome) else "WRONG"
    print(f"{word} {row}\n      {reasons[:1] or ['no failure']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose row contains this text")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write outcomes to this file")
    options = parser.parse_args()
    outcomes = run_all(options.only, options.jobs)
    if not outcomes:
        parser.error(f"--only must be part of a row of tests/README.md, got {options.only!r}")
    if options.json:
        table = {name: [o.code, o.output] for name, o in outcomes.items()}
        options.json.write_text(json.dumps(table), encoding="utf-8")
    wrong = sum(not is_right(row, outcome) for row, outcome in outcomes.items())
    print(f"{len(outcomes) - (TREE_AS_IT_IS in outcomes)} mutations, {wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

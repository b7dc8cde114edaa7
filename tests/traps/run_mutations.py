"""Puts the bugs of ``mutations.py`` and the files beside it in, to see each trap's test fail.

    python -m tests.traps.run_mutations [--only TEXT] [--quick] [--jobs N] [--json FILE]

For every mutation the source tree is copied, the one piece of text is replaced, and the trap's test
runs there in a process of its own. It must fail; on the tree as it is all of them must pass.
Processes are forked from one that has imported torch, which is most of the time that a test takes.
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
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.traps.adapter_mutations import ADAPTER_MUTATIONS, is_installed
from tests.traps.kernel_mutations import KERNEL_MUTATIONS
from tests.traps.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("nsa_dist", "kernels", "tests", "launch", "pyproject.toml")
TREE_AS_IT_IS = "the tree as it is"


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
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={tree}"]
    return int(pytest.main([*options, "-c", str(tree / "pyproject.toml"), *nodes]))


def fork(tree: Path, nodes: list[str], log: Path) -> int:
    """Start ``run_tests`` in a process of its own, output to ``log``; its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = run_tests(tree, nodes)
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


def run_all(mutations: list[Mutation], jobs: int) -> dict[str, Outcome]:
    """Outcomes by the row of a mutation, and of all its tests on the tree as it is."""
    torch.set_num_threads(1)  # before the forks, which cannot share threads
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        waiting: list[tuple[str, Path, list[str]]] = []
        as_it_is = work / "as-it-is"
        copy_tree(as_it_is)
        nodes = list(dict.fromkeys(m.node for m in mutations))
        waiting.append((TREE_AS_IT_IS, as_it_is, nodes))
        for number, mutation in enumerate(mutations):
            tree = work / f"mutation-{number}"
            copy_tree(tree)
            (tree / mutation.file).write_text(mutation.mutated(ROOT), encoding="utf-8")
            waiting.append((mutation.row, tree, [mutation.node]))
        outcomes: dict[str, Outcome] = {}
        running: dict[int, tuple[str, Path]] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                name, tree, tests = waiting.pop(0)
                log = tree.with_suffix(".log")
                running[fork(tree, tests, log)] = (name, log)
            process, status = os.wait()
            if process in running:
                name, log = running.pop(process)
                code = os.waitstatus_to_exitcode(status)
                outcomes[name] = Outcome(code, log.read_text(encoding="utf-8", errors="replace"))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose row contains this text")
    parser.add_argument("--quick", action="store_true", help="only those that every run puts in")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write outcomes to this file")
    options = parser.parse_args()
    # On a GPU a wrong kernel may take the device down; the interpreter only fails.
    kernels = () if torch.cuda.is_available() else KERNEL_MUTATIONS
    adapters = filter(is_installed, ADAPTER_MUTATIONS)
    chosen = [m for m in (*MUTATIONS, *kernels, *adapters) if options.only in m.row]
    if options.quick:
        chosen = [m for m in chosen if m.quick]
    if not chosen:
        parser.error(f"--only: found {options.only!r}; a part of a row of tests/README.md works")
    outcomes = run_all(chosen, options.jobs)
    if options.json:
        table = {name: [o.code, o.output] for name, o in outcomes.items()}
        options.json.write_text(json.dumps(table), encoding="utf-8")
    wrong = 0
    for name, outcome in outcomes.items():
        good = outcome.code == (0 if name == TREE_AS_IT_IS else 1)
        wrong += not good
        reasons = [line for line in outcome.output.splitlines() if line.startswith("E  ")]
        print(f"{'ok   ' if good else 'WRONG'} {name}\n      {reasons[:1] or ['no failure']}")
    print(f"{len(outcomes) - 1} mutations, {wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
